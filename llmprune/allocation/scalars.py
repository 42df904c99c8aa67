"""A cheap search: three numbers describe the whole allocation, and held-out divergences of few candidates choose them.

The numbers are a slope over depth, a difference between attention and MLP, and a protection of both ends. Uniform is
the first candidate, so that nothing worse than it can be chosen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Sparsities of all matrices, one list per candidate -> the divergence of each candidate.
Evaluate = Callable[[Sequence[Sequence[float]]], Sequence[float]]

_AXES = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
Scalars = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a matrix is.

    Attributes:
        depth: of its layer, from 0 for the first to 1 for the last.
        attention: whether it belongs to the attention.
    """

    depth: float
    attention: bool


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search.

    Attributes:
        sparsities: of the best candidate, before exact counts.
        divergence: its held-out divergence, in nats/token.
        uniform: that of the uniform candidate.
        tried: (what was tried, its divergence), in order.
    """

    sparsities: tuple[float, ...]
    divergence: float
    uniform: float
    tried: tuple[tuple[tuple[float, ...], float], ...]


def shaped(positions: Sequence[Position], sparsity: float, scalars: Scalars) -> list[float]:
    """The sparsities that three numbers describe, up to a constant.

    Args:
        positions: of the matrices.
        sparsity: the target, in [0, 1].
        scalars: how much sparser the last layer is than the first; how much denser attention is than the MLP; how much
            denser the first and the last layer are, which falls with the fourth power of the distance to the middle.

    Example:
        >>> shaped([Position(0.0, True), Position(1.0, False)], 0.5, (0.2, 0.1, 0.0))
        [0.35, 0.65]
    """
    slope, attention, ends = scalars
    return [
        round(
            sparsity
            + slope * (one.depth - 0.5)
            - attention * (0.5 if one.attention else -0.5)
            - ends * (2 * one.depth - 1) ** 4,
            12,
        )
        for one in positions
    ]


def search(positions: Sequence[Position], sparsity: float, evaluate: Evaluate, step: float = 0.1) -> Found:
    """Search the three numbers in three rounds of at most 16 candidates in all.

    First uniform and a step up and down each axis; then what the three parabolas through these points suggest, and half
    of it, and the best point of each axis; last half a step up and down each axis from the best.

    Args:
        positions: of the matrices.
        sparsity: the target, in (0, 1).
        evaluate: measures the candidates of a round together.
        step: the first step along each axis, > 0.
    """
    centre: Scalars = (0.0, 0.0, 0.0)
    known: dict[Scalars, float] = {}

    def try_all(points: Sequence[Scalars]) -> None:
        new = [point for point in dict.fromkeys(points) if point not in known]
        if new:
            found = evaluate([shaped(positions, sparsity, point) for point in new])
            known.update(zip(new, found, strict=True))

    try_all([centre, *(_moved(centre, axis, sign * step) for axis in _AXES for sign in (1, -1))])
    lowest, best = [], []
    for axis in _AXES:
        before, here, after = (known[_moved(centre, axis, sign * step)] for sign in (-1, 0, 1))
        lowest.append(_vertex(before, here, after, step))
        # Uniform comes first, so that it wins a tie.
        best.append(min((here, 0.0), (after, step), (before, -step), key=lambda pair: pair[0])[1])
    try_all([_point(lowest), _point([value / 2 for value in lowest]), _point(best)])
    centre = min(known, key=lambda point: known[point])
    try_all([_moved(centre, axis, sign * step / 2) for axis in _AXES for sign in (1, -1)])
    # Uniform was tried first, so that it wins a tie.
    chosen = min(known, key=lambda point: known[point])
    sparsities = tuple(shaped(positions, sparsity, chosen))
    return Found(sparsities, known[chosen], known[(0.0, 0.0, 0.0)], tuple(known.items()))


def _point(values: Sequence[float]) -> Scalars:
    first, second, third = (round(value, 6) + 0.0 for value in values)
    return first, second, third


def _moved(point: Scalars, axis: Scalars, distance: float) -> Scalars:
    return _point([value + distance * along for value, along in zip(point, axis, strict=True)])


def _vertex(before: float, here: float, after: float, step: float) -> float:
    """Where the parabola through three equidistant points is lowest, at most two steps away."""
    curvature = before - 2 * here + after
    if curvature <= 0:
        return -step if before < after else step
    return min(max(step * (before - after) / (2 * curvature), -2 * step), 2 * step)
