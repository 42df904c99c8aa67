"""The definition of the sweep, in plain torch, and its implementation on CPUs."""

import torch
from torch import Tensor

# Columns updated one by one; the errors of farther ones enter by matrix products.
_STRIP = 16


def sweep_block_reference(
    asked: Tensor, original: Tensor, lower: Tensor, importance: Tensor, keep: Tensor, group: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Column k loses original_k where it is pruned, else -(asked_k + sum_{j>k} L_jk e_j) / L_kk; see `sweep_block`."""
    errors = torch.empty_like(original)
    keep = keep.clone() if group is None else torch.empty_like(keep)
    unit = 1 if group is None else group[1]
    strip = max(_STRIP // unit, 1) * unit
    for top in range(len(asked), 0, -strip):
        bottom = max(0, top - strip)
        pending = torch.addmm(asked[bottom:top], lower[top:, bottom:top].T, errors[top:])
        if group is None:
            _lose(errors, pending, original, lower, keep, bottom, top)
            continue
        for high in range(top, bottom, -unit):
            low = high - unit
            within = torch.addmm(pending[low - bottom : high - bottom], lower[high:top, low:high].T, errors[high:top])
            values = original[low:high] + _relaxed(within, lower[low:high, low:high])
            keep[low:high] = _best(values.square() * importance[low:high, None], group[0])
            _lose(errors, within, original, lower, keep, low, high)
    return errors, keep


def _lose(errors: Tensor, pending: Tensor, original: Tensor, lower: Tensor, keep: Tensor, low: int, high: int) -> None:
    """Fill errors[low:high]."""
    coefficients = lower[low:high, low:high].T.contiguous()
    scale = -1 / lower.diagonal()[low:high]
    part = errors[low:high]
    for k in range(high - low - 1, -1, -1):
        absorbed = torch.addmv(pending[k], part[k + 1 :].T, coefficients[k, k + 1 :]).mul_(scale[k])
        torch.where(keep[low + k], absorbed, original[low + k], out=part[k])


def _relaxed(pending: Tensor, lower: Tensor) -> Tensor:
    """By how much the columns of a group would move if all of them stayed."""
    return torch.linalg.solve_triangular(lower.T, pending, upper=True)


def _best(scores: Tensor, count: int) -> Tensor:
    """True for the `count` highest of each column of scores; ties go against the later row (the lower column index)."""
    size = len(scores)
    beaten_by = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
    for low in range(size):
        for high in range(low + 1, size):
            low_wins = scores[low] >= scores[high]
            beaten_by[high] += low_wins
            beaten_by[low] += ~low_wins
    return beaten_by < count
