"""Process one block of columns of an optimal-brain-surgeon solver (SparseGPT) with one kernel launch.

The textbook's column loop launches a few small kernels per column, and is bound by these launches on a GPU. Rows are
independent given the mask, so one program can take some rows through all columns of the block; on a CPU, one thread of
the compiled kernels does.
"""

import torch
import torch.utils._triton  # `import torch` does not load it
from torch import Tensor

from .. import cpu
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
        sums: [columns, rows], float32, contiguous: on entry what the columns before the block contribute to each
            column; on return each column's error, original minus pruned.
        original: [columns, rows], float32: the weights before pruning.
        upper: [columns, columns], float32: the block's part of the factor R, upper triangular.
        importance: [columns], float32: the weight of a column's squared value in its score.
        keep: [columns, rows], bool, contiguous: the mask, True where a weight is kept; filled if `group` is given.
        group: (N, M) to choose the mask here: the N best of M columns are kept, judged by their values when the group
            is reached; None if the mask is already fixed.
    """
    if sums.is_cuda and _has_triton() and (group is None or group[1] <= MAX_GROUP):
        from .kernel import sweep_block_triton

        sweep_block_triton(sums, original, upper, importance, keep, group)
    elif _is_compiled(sums, group):
        _sweep_compiled(sums, original, upper, importance, keep, group)
    else:
        sweep_block_reference(sums, original, upper, importance, keep, group)


def _is_compiled(sums: Tensor, group: tuple[int, int] | None) -> bool:
    """Whether a CPU library takes it."""
    fits = sums.device.type == "cpu" and sums.dtype == torch.float32 and (group is None or group[1] <= cpu.MOST_GROUP)
    return fits and cpu.unavailable() is None


def _sweep_compiled(
    sums: Tensor, original: Tensor, upper: Tensor, importance: Tensor, keep: Tensor, group: tuple[int, int] | None
) -> None:
    """On a CPU, in blocks of at most as many columns as its kernels take."""
    unit = group[1] if group else 1

    def decide(low: int, high: int) -> None:
        part = slice(low, high)
        square = upper[part, part].contiguous()
        cpu.library().sweep(
            sums[part], original[part].contiguous(), square, importance[part].contiguous(), keep[part], group
        )

    run_columns(sums, upper, cpu.MOST_COLUMNS // unit * unit, decide)


def _has_triton() -> bool:
    return torch.utils._triton.has_triton()
