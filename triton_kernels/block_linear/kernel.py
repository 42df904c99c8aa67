"""The block-sparse matmul as one Triton kernel for any number of tokens.

A program owns a tile of y^T, [ROWS, TOKENS], inside one block row, and iterates over the stored blocks of that row,
STEP inputs at a time: part of a block, a block, or several small ones, so that the tensor cores get enough to reduce
over. The weights are the left operand of `tl.dot` because a block row has few outputs while a batch may have many
tokens.

With few tokens the time is bound by the bytes of the weights, which many programs have to read: the blocks of a row are
divided among several of them, each writes its sum to a workspace, and a second launch adds the sums in a fixed order.
Without atomics the result is bit-identical every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..splits import add_splits
from .configuration import Configuration


@triton.jit
def _product_kernel(
    x, values, crow, col, bias, y,
    tokens, block_rows, block_columns, per_row,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    BALANCED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    # Given in blocks, so that the compiler knows divisors of the strides and loads 128 bits at a time.
    out_features, in_features = block_rows * BLOCK, block_columns * BLOCK
    row_tile, token_tile = _tile(tl.program_id(0), out_features // ROWS, tl.cdiv(tokens, TOKENS), GROUP)
    block_row = row_tile * ROWS // BLOCK
    # Positions count the inputs of the stored blocks as if these were side by side, over all block rows.
    if BALANCED:
        position = block_row * per_row * BLOCK
        end = position + per_row * BLOCK
    else:
        position = tl.load(crow + block_row) * BLOCK
        end = tl.load(crow + block_row + 1) * BLOCK
    split, splits = tl.program_id(1), tl.num_programs(1)
    share = tl.cdiv(tl.cdiv(end - position, STEP), splits) * STEP
    position += split * share
    end = tl.minimum(end, position + share)

    k = tl.arange(0, STEP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    present = token < tokens - token_tile * TOKENS
    origin = position // BLOCK
    weights = values + origin.to(tl.int64) * (BLOCK * BLOCK)
    weights += (row % BLOCK)[:, None] * BLOCK + (k // BLOCK * (BLOCK * BLOCK) + k % BLOCK)[None, :]
    inputs = x + (token_tile * TOKENS).to(tl.int64) * in_features + token[None, :] * in_features
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    # Columns are read one step ahead: a load whose address depends on another load would halve the pipeline's depth.
    following = _columns(col, position, end, k, BLOCK, STEP)
    for here in range(position, end, STEP):
        column = following + k % BLOCK
        column = tl.max_contiguous(tl.multiple_of(column, min(STEP, BLOCK)), min(STEP, BLOCK))
        following = _columns(col, here + STEP, end, k, BLOCK, STEP)
        weight = weights + ((here // BLOCK - origin) * (BLOCK * BLOCK) + here % BLOCK)
        if TAIL:
            left = here + k < end
            w = tl.load(weight, mask=left[None, :], other=0.0)
            a = tl.load(inputs + column[:, None], mask=left[:, None] & present[None, :], other=0.0)
        else:
            w = tl.load(weight)
            a = tl.load(inputs + column[:, None], mask=present[None, :], other=0.0)
        total = tl.dot(w, a, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + row).to(tl.float32)[:, None]
    first = (split * tokens + token_tile * TOKENS).to(tl.int64) * out_features
    target = y + first + token[None, :] * out_features + row[:, None]
    tl.store(target, total.to(y.dtype.element_ty), mask=present[None, :])


@triton.jit
def _tile(program, row_tiles, token_tiles, GROUP: tl.constexpr):
    """Take GROUP row tiles through all token tiles before the next ones: programs at work then share x and W in L2."""
    group = program // (GROUP * token_tiles)
    inside = program % (GROUP * token_tiles)
    breadth = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + inside % breadth, inside // breadth


@triton.jit
def _columns(col, position, end, k, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """First inputs, [STEP], in x of the blocks that hold position + k; add k % BLOCK. 0 past the end."""
    column = tl.zeros_like(k) + position % BLOCK
    # One scalar load per block: a vector of columns would change its register layout in every step.
    for i in tl.static_range(tl.cdiv(STEP, BLOCK)):
        block = tl.load(col + position // BLOCK + i, mask=position + i * BLOCK < end, other=0)
        column += tl.where(k // BLOCK == i, block * BLOCK, 0)
    return column


def block_linear_triton(
    x: Tensor,
    values: Tensor,
    indices: tuple[Tensor, Tensor],
    bias: Tensor | None,
    y: Tensor,
    per_row: int | None,
    configuration: Configuration,
    workspace: Tensor | None,
) -> None:
    """Write x @ W.T + bias to y; see `block_linear`.

    Args:
        x: [tokens, in], contiguous, tokens >= 1.
        values: [blocks, B, B], contiguous.
        indices: crow int32 [out / B + 1] and col int32 [blocks].
        bias: [out] or None.
        y: [tokens, out], contiguous; overwritten.
        per_row: the number of blocks in every block row, or None if it differs.
        configuration: fits B, as `Configuration.check` says.
        workspace: [splits, tokens, out] float32, overwritten; needed if the configuration has more than one split.
    """
    (tokens, in_features), (_, out_features) = x.shape, y.shape
    block, chosen = values.shape[-1], configuration
    whole = chosen.step <= block or (per_row is not None and per_row * block % chosen.step == 0)
    tiles = out_features // chosen.rows * triton.cdiv(tokens, chosen.tokens)
    _product_kernel[(tiles, chosen.splits)](
        x, values, *indices, bias if workspace is None else None, y if workspace is None else workspace,
        tokens, out_features // block, in_features // block, per_row or 0,
        BLOCK=block, ROWS=chosen.rows, TOKENS=chosen.tokens, STEP=chosen.step, GROUP=chosen.group,
        BALANCED=per_row is not None, TAIL=not whole, num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    if workspace is not None:
        add_splits(workspace, bias, y, chosen.splits)


def block_linear_allocating(
    x: Tensor,
    values: Tensor,
    indices: tuple[Tensor, Tensor],
    bias: Tensor | None,
    out_features: int,
    per_row: int | None,
    configuration: Configuration,
) -> Tensor:
    """Return x @ W.T + bias, [tokens, out], in new memory of PyTorch's allocator, as CUDA graphs need it."""
    y = x.new_empty(x.shape[0], out_features)
    workspace = None
    if configuration.splits > 1:
        workspace = x.new_empty(configuration.splits, *y.shape, dtype=torch.float32)
    block_linear_triton(x, values, indices, bias, y, per_row, configuration, workspace)
    return y
