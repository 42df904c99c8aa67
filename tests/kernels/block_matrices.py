"""Matrices of blocks with their dense twins, and how good a product of one has to be."""

import torch
import torch.nn.functional as F

from llmprune.kernels.block_linear import choose_default

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.float16, torch.bfloat16)


class Matrix:
    """A matrix of blocks, both ways; `kept` is bool [block rows, block columns]."""

    def __init__(self, block, kept, dtype=torch.float16):
        kept = torch.as_tensor(kept, dtype=torch.bool)
        (rows, columns), self.block = kept.shape, block
        tiles = torch.randn(rows, columns, block, block, dtype=torch.float64).to(dtype) * kept[:, :, None, None]
        # What follows the last block in memory is no number.
        memory = torch.full((int(kept.sum()) + 8, block, block), torch.nan, dtype=dtype)
        memory[:-8] = tiles[kept]
        self.values = memory.to(DEVICE)[:-8]
        self.crow = F.pad(kept.sum(1).cumsum(0), (1, 0)).int().to(DEVICE)
        self.col = kept.nonzero()[:, 1].int().to(DEVICE)
        self.dense = tiles.transpose(1, 2).reshape(rows * block, columns * block).to(DEVICE)
        self.bias = torch.randn(rows * block, dtype=torch.float64).to(dtype).to(DEVICE)
        counts = kept.sum(1)
        self.per_row = int(counts[0]) if bool((counts == counts[0]).all()) else None
        self.operands = (self.values, self.crow, self.col)

    def inputs(self, *shape):
        return torch.randn(*shape, self.dense.shape[1], dtype=torch.float64).to(self.dense.dtype).to(DEVICE)

    def default(self, tokens):
        """As on an H200."""
        size = self.values.element_size()
        return choose_default(tokens, len(self.dense), self.block, len(self.values), size, 132, 227 << 10)


def uneven(rows, columns):
    """One row of blocks is empty, one is full, the others have some; the first column is in one row only."""
    kept = torch.rand(rows, columns) < 0.5
    kept[:, 0] = False
    kept[0], kept[-1] = False, True
    return kept


def assert_as_good_as_dense(y, x, matrix, bias=True):
    """At most twice the error of the dense product in the same dtype, and one unit of rounding."""
    exact = x.double() @ matrix.dense.double().T + (matrix.bias.double() if bias else 0)
    eager = F.linear(x, matrix.dense, matrix.bias if bias else None).double()
    ours, theirs = ((result.double() - exact).abs().max() for result in (y, eager))
    assert not y.isnan().any()
    assert y.shape == exact.shape
    assert ours <= 2 * theirs + torch.finfo(x.dtype).eps * exact.abs().max() + 1e-12
