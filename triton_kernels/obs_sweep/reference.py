"""The definition of the column loop, in plain torch, and its implementation on CPUs."""

from collections.abc import Callable

import torch
from torch import Tensor

# Columns updated one by one; the errors of more distant ones are added by matmuls.
_STRIP = 16


def sweep_block_reference(
    sums: Tensor, original: Tensor, upper: Tensor, importance: Tensor, keep: Tensor, group: tuple[int, int] | None
) -> None:
    """The error e_k of column k is original_k where pruned, else -(sums_k + sum_{j<k} R_jk e_j) / R_kk.

    See `sweep_block`.
    """
    sweep = _Sweep(sums, original, upper, importance, keep, group)
    run_columns(sums, upper, sweep.strip, sweep.decide)


def run_columns(sums: Tensor, upper: Tensor, step: int, decide: Callable[[int, int], None]) -> None:
    """Decide columns from left to right, `step` at a time.

    The columns are halved recursively, so that the errors of the left half are added to the right half's sums by one
    large matmul instead of many small ones.

    Args:
        sums: [columns, rows]: what earlier columns contribute to each column; its decision replaces them by its errors.
        upper: [columns, columns], upper triangular: the factor of a column's error in the sums of each later one.
        step: columns that are decided together.
        decide: called with the first column to decide and the end, exclusive.
    """
    _run(sums, upper, step, decide, 0, len(sums))


# Not nested in `run_columns`: a recursive closure refers to itself, and would keep the operands alive until the next
# garbage collection.
def _run(sums: Tensor, upper: Tensor, step: int, decide: Callable[[int, int], None], low: int, high: int) -> None:
    if high - low <= step:
        decide(low, high)
        return
    middle = low + -(-(high - low) // step) // 2 * step
    _run(sums, upper, step, decide, low, middle)
    sums[middle:high].addmm_(upper[low:middle, middle:high].T, sums[low:middle])
    _run(sums, upper, step, decide, middle, high)


class _Sweep:
    """The operands of one block, and the decisions on a strip of its columns."""

    def __init__(
        self,
        sums: Tensor,
        original: Tensor,
        upper: Tensor,
        importance: Tensor,
        keep: Tensor,
        group: tuple[int, int] | None,
    ) -> None:
        self._sums, self._original, self._upper, self._importance, self._keep = sums, original, upper, importance, keep
        self._count, self._unit = group or (1, 1)
        self._chooses = group is not None
        self.strip = max(_STRIP // self._unit, 1) * self._unit
        self._scales = (-1 / upper.diagonal()).tolist()
        if self._chooses:
            units = len(upper) // self._unit
            squares = torch.stack(
                [upper[k : k + self._unit, k : k + self._unit] for k in range(0, len(upper), self._unit)]
            )
            identity = torch.eye(self._unit, dtype=upper.dtype, device=upper.device).expand(units, -1, -1)
            self._inverses = torch.linalg.solve_triangular(squares, identity, upper=True).mT

    def decide(self, low: int, high: int) -> None:
        """Decide the columns low:high, whose sums include the contributions of all columns before them."""
        if not self._chooses:
            self._lose(low, high)
            return
        for start in range(low, high, self._unit):
            self._choose(low, start)
            self._lose(start, start + self._unit)

    def _choose(self, low: int, start: int) -> None:
        """Decide which columns of a group are kept, after adding the errors of low:start to its sums."""
        stop = start + self._unit
        pending = self._sums[start:stop].addmm_(self._upper[low:start, start:stop].T, self._sums[low:start])
        # Their values if all of them were kept.
        present = torch.addmm(self._original[start:stop], self._inverses[start // self._unit], pending)
        scores = present.square_().mul_(self._importance[start:stop, None])
        self._keep[start:stop] = _best(scores, self._count)

    def _lose(self, low: int, high: int) -> None:
        """Replace the sums low:high, column by column, with the columns' errors."""
        stays = self._keep[low:high].to(self._sums.dtype)
        pruned = self._original[low:high] * (1 - stays)
        coefficients = self._upper[low:high, low:high].T.contiguous()
        part = self._sums[low:high]
        for k, (column, staying, whole) in enumerate(zip(part.unbind(), stays.unbind(), pruned.unbind(), strict=True)):
            absorbed = torch.addmv(column, part[:k].T, coefficients[k, :k])
            torch.addcmul(whole, absorbed, staying, value=self._scales[low + k], out=column)


def _best(scores: Tensor, count: int) -> Tensor:
    """True for the `count` highest of each column of scores; among ties the earlier row is pruned first."""
    size = len(scores)
    counted = torch.uint8 if size < 256 else torch.int32
    # Each is assumed to be beaten by all before it; then those that it beats are subtracted. Half of the comparisons.
    beaten_by = torch.arange(size, dtype=counted, device=scores.device)[:, None].repeat(1, scores.shape[1])
    for low in range(size - 1):
        later_wins = (scores[low + 1 :] >= scores[low]).view(torch.uint8)
        beaten_by[low] += later_wins.sum(0, dtype=counted)
        beaten_by[low + 1 :] -= later_wins
    return beaten_by < count
