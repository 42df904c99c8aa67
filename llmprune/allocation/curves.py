"""Sensitivity: the levels with the least total damage, chosen from measured curves by dynamic programming."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmprune.errors import NumericsError
from llmprune.structures.choose.knapsack import LevelCurve, allocate


@dataclass(frozen=True, slots=True)
class DamageCurve:
    """What pruning one matrix alone does to the model.

    Attributes:
        size: weights of the matrix.
        levels: sparsities, ascending, in [0, 1].
        damage: at each level, in nats/token; made to rise with the level.
    """

    size: int
    levels: Sequence[float]
    damage: Sequence[float]

    def at(self, level: float) -> float:
        """The damage at a sparsity between the first and the last level, interpolated linearly."""
        rising = running_maximum(self.damage)
        for place in range(1, len(self.levels)):
            low, high = self.levels[place - 1], self.levels[place]
            if level <= high:
                part = (level - low) / (high - low)
                return rising[place - 1] + part * (rising[place] - rising[place - 1])
        return rising[-1]


def running_maximum(values: Sequence[float]) -> list[float]:
    """Each value, or an earlier one that is larger: removing more never counts as a gain, however noisy the curve."""
    rising: list[float] = []
    for value in values:
        rising.append(max(value, rising[-1]) if rising else value)
    return rising


def choose_levels(
    curves: Mapping[str, DamageCurve], sparsity: float, grid: float = 0.025, most: float = 1.0
) -> dict[str, float]:
    """Choose a sparsity for each matrix so that the sum of the damages is minimal.

    Args:
        curves: name -> its curve; all cover the target.
        sparsity: of all weights together, in (0, 1).
        grid: distance between the sparsities that are considered, > 0.
        most: the highest sparsity that is considered, at least the target.

    Returns:
        Name -> sparsity; together at least the target, and by less than one grid step of the largest matrix above it.

    Raises:
        NumericsError: a curve is not finite.
        PatternError: no choice reaches the target.
    """
    ladders, levels = [], {}
    for name, curve in curves.items():
        first, last = curve.levels[0], min(curve.levels[-1], most)
        count = max(round((last - first) / grid), 1)
        own = sorted({*(first + (last - first) * place / count for place in range(count + 1)), sparsity})
        levels[name] = [level for level in own if first <= level <= last]
        damage = [curve.at(level) for level in levels[name]]
        if not all(value == value for value in damage):
            raise NumericsError(f"{name}: a damage is not finite", expected="finite divergences")
        ladders.append(LevelCurve(name, damage, [curve.size * (1 - level) for level in levels[name]]))
    kept = (1 - sparsity) * sum(curve.size for curve in curves.values())
    # Sizes are rounded up to a step of the budget each: at most a percent of it in all, whatever the number of curves.
    chosen = allocate(ladders, kept, max(2000, 100 * len(curves))).levels
    return {name: levels[name][level] for name, level in chosen.items()}
