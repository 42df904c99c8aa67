"""The definition of the block-sparse matmul, in plain torch, and its implementation on CPUs."""

import torch
from torch import Tensor

# Elements of products and weights to work on at a time: few enough to stay in a CPU's cache.
_AT_ONCE = 1 << 20


def block_linear_reference(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """y[:, block row r] = sum over its stored blocks b of x[:, block column col_b] @ values_b.T, plus bias.

    Sums are float32. With bfloat16 weights the product of one block is rounded to bfloat16 first, because CPUs multiply
    that dtype fast. float16, whose range is too narrow for that, is multiplied in float32.
    """
    block, tokens = values.shape[-1], len(x)
    dtype = x.dtype if x.dtype == torch.bfloat16 else torch.float32
    tiles = x.view(tokens, x.shape[1] // block, block).transpose(0, 1)
    y = x.new_zeros(out_features // block, tokens, block, dtype=torch.float32)
    rows = _block_rows(crow, col)
    at_once = max(1, _AT_ONCE // (block * (block + 2 * tokens)))
    for start in range(0, len(col), at_once):
        some = slice(start, start + at_once)
        products = torch.bmm(tiles[col[some]].to(dtype), values[some].to(dtype).mT)
        y.index_add_(0, rows[some], products.float())
    y = y.transpose(0, 1).reshape(tokens, out_features)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def expand(values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> Tensor:
    """Write the blocks into a new dense matrix of this shape, [out, in]."""
    dense = values.new_empty(shape)
    expand_into(dense, values, crow, col)
    return dense


def expand_into(dense: Tensor, values: Tensor, crow: Tensor, col: Tensor) -> None:
    """Write the blocks, and zeros elsewhere, into a dense matrix [out, in], contiguous, of the values' dtype."""
    block = values.shape[-1]
    tiles = dense.zero_().view(dense.shape[0] // block, block, dense.shape[1] // block, block)
    tiles[_block_rows(crow, col), :, col] = values


def _block_rows(crow: Tensor, col: Tensor) -> Tensor:
    """The block row of each stored block, int64 [blocks]."""
    numbers = torch.arange(len(crow) - 1, device=crow.device)
    # With the size given, repeat_interleave does not synchronise with the GPU.
    return numbers.repeat_interleave(crow.diff(), output_size=len(col))
