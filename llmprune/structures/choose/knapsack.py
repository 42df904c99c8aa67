"""How much of each structure to remove: the levels with the least error within one budget for the whole model.

Each structure (the FFN channels of a layer, its KV groups, ...) offers levels with a size and an error; one level of
each is chosen so that the total size is within the budget and the total error is minimal. This is the multiple-choice
knapsack problem. Dynamic programming over the budget solves it exactly if the sizes are multiples of a quantum that
fits the resolution (parameter counts nearly always are); otherwise sizes are rounded up, so that the budget still
holds. Bisection of the Lagrange multiplier gives a lower bound, which limits the distance from the optimum, and a
second solution, which only matters if rounding is lossy.

Errors of one layer say little about the model: weight them by their effect on it, for example by the KL divergence
measured with one structure at one level and everything else dense.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.errors import NumericsError, PatternError, RecipeError

# Bisection steps between a price at which everything is kept and one at which nothing is.
_PRICES = 64
# A size may exceed the budget by this fraction: rounding in sums of floats.
_SLACK = 1e-12


@dataclass(frozen=True, slots=True)
class LevelCurve:
    """The levels to which one structure can be pruned.

    Attributes:
        name: identifies the structure in error messages and results.
        errors: error at each level, finite, in the same unit for all structures.
        sizes: size at each level, >= 0, finite: parameters, FLOPs or seconds, the same unit for all structures.
        weight: effect of an error of 1 on the model, >= 0.
    """

    name: str
    errors: Sequence[float]
    sizes: Sequence[float]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.errors or len(self.errors) != len(self.sizes):
            raise PatternError(
                f"{self.name}: {len(self.errors)} errors and {len(self.sizes)} sizes", expected="one of each per level"
            )
        if not all(map(math.isfinite, (*self.errors, *self.sizes, self.weight))):
            raise NumericsError(f"{self.name}: an error, a size or the weight is not finite", expected="finite numbers")
        if min(self.sizes) < 0 or self.weight < 0:
            raise PatternError(f"{self.name}: a size or the weight is negative", expected="numbers >= 0")


@dataclass(frozen=True, slots=True)
class Allocation:
    """The chosen levels.

    Attributes:
        levels: name -> index of its level.
        error: sum of weight * error.
        size: sum of the sizes, at most the budget.
        bound: lower bound on the error of any choice within the budget.
    """

    levels: dict[str, int]
    error: float
    size: float
    bound: float


def aligned_levels(groups: int, multiple: int, most: int) -> tuple[int, ...]:
    """Numbers of groups to remove so that a multiple of `multiple` is kept; always includes 0.

    Args:
        groups: number of groups.
        multiple: the number of kept groups must be a multiple of this, >= 1.
        most: the largest number of groups to remove, in [0, groups].

    Raises:
        PatternError: a number is out of range.

    Example:
        >>> aligned_levels(704, 128, 352)
        (0, 64, 192, 320)
    """
    if multiple < 1 or not 0 <= most <= groups:
        raise PatternError(
            f"at most {most} of {groups} groups to remove, the rest a multiple of {multiple}",
            expected="a multiple >= 1, and at most all groups",
        )
    return (0, *(removed for removed in range(1, most + 1) if (groups - removed) % multiple == 0))


def allocate(ladders: Sequence[LevelCurve], budget: float, resolution: int = 20_000) -> Allocation:
    """Choose a level for each structure so that the total error within the budget is minimal.

    Args:
        ladders: the structures, with distinct names.
        budget: allowed sum of the sizes of the chosen levels.
        resolution: the largest number of steps into which the budget is divided, >= 1. Time and memory grow with it and
            with the number of levels.

    Returns:
        The optimum, if the sizes are multiples of budget / resolution or have a common divisor above it; otherwise at
        most `error - bound` from it. Ties are broken by the smaller size, then by the lower level.

    Raises:
        PatternError: names repeat, or even the smallest levels exceed the budget.
        RecipeError: the resolution is below 1.
    """
    _check(ladders, budget, resolution)
    errors = [torch.tensor(ladder.errors, dtype=torch.float64) * ladder.weight for ladder in ladders]
    sizes = [torch.tensor(ladder.sizes, dtype=torch.float64) for ladder in ladders]
    bound, bisected = _bisect(errors, sizes, budget)
    candidates = [bisected]
    if (exact := _program(errors, sizes, budget, resolution)) is not None:
        candidates.append(exact)
    totals = [(_chosen(errors, levels), _chosen(sizes, levels), levels) for levels in candidates]
    error, size, levels = min(totals)
    names = [ladder.name for ladder in ladders]
    return Allocation(dict(zip(names, levels, strict=True)), error, size, min(bound, error))


def _program(errors: list[Tensor], sizes: list[Tensor], budget: float, resolution: int) -> list[int] | None:
    """Dynamic programming: the least error for each number of quanta; None if rounding up leaves no solution."""
    # The part contained in every choice need not be quantised.
    least = [size.min() for size in sizes]
    extra = [size - low for size, low in zip(sizes, least, strict=True)]
    room = max(budget - float(sum(least)), 0.0)
    steps, quantum = _quantise(extra, room, resolution)
    cells = min(math.floor(room / quantum * (1 + _SLACK)), sum(int(step.max()) for step in steps)) if room else 0
    table = torch.zeros(cells + 1, dtype=torch.float64)
    choices = []
    for error, step in zip(errors, steps, strict=True):
        best, choice = torch.full_like(table, math.inf), torch.zeros(len(table), dtype=torch.int64)
        for level, (cost, width) in enumerate(zip(error.tolist(), step.tolist(), strict=True)):
            if width <= cells:
                offered = table[: cells + 1 - width] + cost
                better = offered < best[width:]
                best[width:][better], choice[width:][better] = offered[better], level
        table = best
        choices.append(choice)
    return _trace(table, choices, steps)


def _trace(table: Tensor, choices: list[Tensor], steps: list[Tensor]) -> list[int] | None:
    # The first cell with the least error is the smallest size that achieves it.
    cell = int((table == table.min()).nonzero()[0])
    if not math.isfinite(float(table[cell])):
        return None
    levels: list[int] = []
    for choice, step in zip(reversed(choices), reversed(steps), strict=True):
        levels.append(int(choice[cell]))
        cell -= int(step[levels[-1]])
    return levels[::-1]


def _quantise(sizes: list[Tensor], room: float, resolution: int) -> tuple[list[Tensor], float]:
    """Sizes as numbers of quanta: of their greatest common divisor if it is coarse enough, else rounded up."""
    values = torch.cat(sizes).tolist()
    if all(value.is_integer() for value in values):
        divisor = math.gcd(*map(int, values)) or 1
        if room / divisor <= resolution:
            return [(size / divisor).round().long() for size in sizes], divisor
    quantum = room / resolution or 1.0
    return [(size / quantum * (1 - _SLACK)).ceil().long() for size in sizes], quantum


def _bisect(errors: list[Tensor], sizes: list[Tensor], budget: float) -> tuple[float, list[int]]:
    """Bisect the price of size: the best lower bound found, and the best levels within the budget."""
    smallest = [_best(size, error) for error, size in zip(errors, sizes, strict=True)]
    best, bound = smallest, -math.inf
    low, high = 0.0, _highest_price(errors, sizes)
    for price in (low, *(None,) * _PRICES):
        tried = (low + high) / 2 if price is None else price
        levels = [_best(error + tried * size, size) for error, size in zip(errors, sizes, strict=True)]
        size = _chosen(sizes, levels)
        bound = max(bound, _chosen(errors, levels) + tried * (size - budget))
        if size <= budget * (1 + _SLACK):
            high = tried
            if _chosen(errors, levels) < _chosen(errors, best):
                best = levels
        else:
            low = tried
    return bound, best


def _highest_price(errors: list[Tensor], sizes: list[Tensor]) -> float:
    """A price at which every structure takes its smallest level: the steepest slope between two levels."""
    steepest = 0.0
    for error, size in zip(errors, sizes, strict=True):
        gaps = size[:, None] - size
        slopes = (error - error[:, None]) / gaps
        rising = slopes[gaps > 0]
        steepest = max(steepest, float(rising.max()) if len(rising) else 0.0)
    return 2 * steepest or 1.0


def _best(values: Tensor, tie: Tensor) -> int:
    """Index of the least value; among equals the least of `tie`, then the first."""
    least = values == values.min()
    return int(tie.masked_fill(~least, math.inf).argmin())


def _chosen(values: list[Tensor], levels: list[int]) -> float:
    return math.fsum(float(value[level]) for value, level in zip(values, levels, strict=True))


def _check(ladders: Sequence[LevelCurve], budget: float, resolution: int) -> None:
    if resolution < 1:
        raise RecipeError(f"the resolution is {resolution}", expected="at least 1")
    if len({ladder.name for ladder in ladders}) < len(ladders) or not ladders:
        raise PatternError(
            f"{len(ladders)} structures: {', '.join(ladder.name for ladder in ladders)}",
            expected="at least one structure, with distinct names",
        )
    least, whole = (math.fsum(bound(ladder.sizes) for ladder in ladders) for bound in (min, max))
    if not least <= budget * (1 + _SLACK):
        raise PatternError(
            f"the budget keeps {budget / whole:.1%} of the structures, but their smallest levels need "
            f"{least / whole:.1%}",
            expected=f"a budget that keeps {least / whole:.1%} or more",
            fix="remove less, or allow more to be removed from each structure (budget.most)",
        )
