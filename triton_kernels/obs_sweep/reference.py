"""The definition of the sweep, in plain torch, and its implementation on CPUs."""

import torch
from torch import Tensor

# Columns updated one by one; the errors of farther ones enter by matrix products.
_STRIP = 16


def sweep_block_reference(
    asked: Tensor, original: Tensor, upper: Tensor, importance: Tensor, keep: Tensor, group: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Column k loses original_k where it is pruned, else -(asked_k + sum_{j<k} R_jk e_j) / R_kk; see `sweep_block`."""
    errors = torch.empty_like(original)
    keep = keep.clone() if group is None else torch.empty_like(keep)
    unit = 1 if group is None else group[1]
    strip = max(_STRIP // unit, 1) * unit
    for low in range(0, len(asked), strip):
        high = min(low + strip, len(asked))
        pending = torch.addmm(asked[low:high], upper[:low, low:high].T, errors[:low])
        if group is None:
            _lose(errors, pending, original, upper, keep, low, high)
            continue
        for start in range(low, high, unit):
            stop = start + unit
            within = torch.addmm(pending[start - low : stop - low], upper[low:start, start:stop].T, errors[low:start])
            values = original[start:stop] + _relaxed(within, upper[start:stop, start:stop])
            keep[start:stop] = _best(values.square_().mul_(importance[start:stop, None]), group[0])
            _lose(errors, within, original, upper, keep, start, stop)
    return errors, keep


def _lose(errors: Tensor, pending: Tensor, original: Tensor, upper: Tensor, keep: Tensor, low: int, high: int) -> None:
    """Fill errors[low:high]."""
    coefficients = upper[low:high, low:high].T.contiguous()
    scale = (-1 / upper.diagonal()[low:high]).tolist()
    part = errors[low:high]
    rows = zip(pending.unbind(), keep[low:high].unbind(), original[low:high].unbind(), part.unbind(), strict=True)
    for k, (waiting, stays, whole, out) in enumerate(rows):
        absorbed = torch.addmv(waiting, part[:k].T, coefficients[k, :k]).mul_(scale[k])
        torch.where(stays, absorbed, whole, out=out)


def _relaxed(pending: Tensor, upper: Tensor) -> Tensor:
    """By how much the columns of a group would move if all of them stayed."""
    return torch.linalg.solve_triangular(upper.T, pending, upper=False)


def _best(scores: Tensor, count: int) -> Tensor:
    """True for the `count` highest of each column of scores; ties go against the earlier row."""
    size = len(scores)
    beaten_by = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
    for low in range(size):
        for high in range(low + 1, size):
            later_wins = scores[high] >= scores[low]
            beaten_by[low] += later_wins
            beaten_by[high] += ~later_wins
    return beaten_by < count
