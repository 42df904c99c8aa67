"""Sweep one block of columns of an optimal-brain-surgeon solver (SparseGPT), one kernel launch for the whole block.

The column loop of the textbook launches a few small kernels for every column and is bound by their launches on a GPU.
Rows are independent given the mask, so a program can take some rows through all columns of the block on its own.
"""

import torch
import torch.utils._triton  # not there by itself
from torch import Tensor

from .reference import run_columns, sweep_block_reference

__all__ = ["run_columns", "sweep_block"]

# The longest N:M group that the kernel unrolls; longer ones take the reference.
MAX_GROUP = 16


def sweep_block(
    sums: Tensor, original: Tensor, upper: Tensor, importance: Tensor, keep: Tensor, group: tuple[int, int] | None
) -> None:
    """Decide the columns of a block one after another, in place.

    All operands are transposed: a column of the weight matrix is a row here. Column k is decided after every j < k.

    Args:
        sums: [columns, rows], float32, contiguous: what the columns done before the block ask of each column; then what
            each column loses, original minus pruned.
        original: [columns, rows], float32: the weights before pruning.
        upper: [columns, columns], float32: the block's part of the factor R, upper triangular.
        importance: [columns], float32: the weight of a column's squared value in its score.
        keep: [columns, rows], bool, contiguous: the mask, True where a weight stays; filled if `group` is given.
        group: (N, M) to choose the mask inside: the N best of M columns stay, judged by their values when the group's
            turn comes; None for a mask that is fixed already.
    """
    if sums.is_cuda and _has_triton() and (group is None or group[1] <= MAX_GROUP):
        from .kernel import sweep_block_triton

        sweep_block_triton(sums, original, upper, importance, keep, group)
    else:
        sweep_block_reference(sums, original, upper, importance, keep, group)


def _has_triton() -> bool:
    return torch.utils._triton.has_triton()
