"""Sweep one block of columns of an optimal-brain-surgeon solver (SparseGPT), one kernel launch for the whole block.

The column loop of the textbook launches a few small kernels for every column and is bound by their launches on a GPU.
Rows are independent given the mask, so a program can take some rows through all columns of the block on its own.
"""

import torch
import torch.utils._triton  # not there by itself
from torch import Tensor

from .reference import sweep_block_reference

# The longest N:M group that the kernel unrolls; longer ones take the reference.
MAX_GROUP = 16


def sweep_block(
    asked: Tensor, original: Tensor, upper: Tensor, importance: Tensor, keep: Tensor, group: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Decide the columns of a block one after another, and return what they lose.

    All operands are transposed: a column of the weight matrix is a row here. Column k is decided after every j < k.

    Args:
        asked: [columns, rows], float32: what the columns done before the block ask of each column.
        original: [columns, rows], float32: the weights before pruning.
        upper: [columns, columns], float32: the block's part of the factor R, upper triangular.
        importance: [columns], float32: the weight of a column's squared value in its score.
        keep: [columns, rows], bool: the mask; ignored if `group` is given.
        group: (N, M) to choose the mask inside: the N best of M columns stay, judged by their values when the group's
            turn comes; None for a mask that is fixed already.

    Returns:
        (errors, keep): [columns, rows] float32, original minus pruned; [columns, rows] bool, True where a weight stays.
    """
    if asked.is_cuda and _has_triton() and (group is None or group[1] <= MAX_GROUP):
        from .kernel import sweep_block_triton

        return sweep_block_triton(asked, original, upper, importance, keep, group)
    return sweep_block_reference(asked, original, upper, importance, keep, group)


def _has_triton() -> bool:
    return torch.utils._triton.has_triton()
