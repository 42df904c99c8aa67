"""Exact counts: desired sparsities become whole numbers of zeros, whose total is exactly that of the uniform recipe."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmprune.errors import PatternError
from llmprune.patterns import Block, Pattern, Unstructured

# Halvings of the interval that holds the shift; 60 reach the resolution of a double.
_HALVINGS = 60


@dataclass(frozen=True, slots=True)
class Portion:
    """The zeros that one matrix can have under its pattern.

    Attributes:
        step: zeros added by one step, >= 1: a weight, a column's worth of rows, or a block.
        steps: steps until the whole matrix is zero, >= 1.
        uniform: steps that the recipe takes without an allocation, in [0, steps].
    """

    step: int
    steps: int
    uniform: int

    @property
    def size(self) -> int:
        """Weights of the matrix."""
        return self.step * self.steps

    @property
    def zeros(self) -> int:
        """Zeros without an allocation."""
        return self.step * self.uniform


def portion(pattern: Pattern, shape: tuple[int, int]) -> Portion:
    """The steps in which a pattern adds zeros to a matrix of this shape (out, in).

    Args:
        pattern: with its scope filled in, unstructured or in blocks.
        shape: the pattern divides it.

    Raises:
        PatternError: the pattern has no sparsity that could differ from matrix to matrix.

    Example:
        >>> portion(Unstructured(0.5, "row"), (8, 6)), portion(Block(0.5, (2, 2)), (8, 6))
        (Portion(step=8, steps=6, uniform=3), Portion(step=4, steps=12, uniform=6))
    """
    rows, columns = shape
    if isinstance(pattern, Unstructured) and pattern.over in ("row", "matrix"):
        step = rows if pattern.over == "row" else 1
    elif isinstance(pattern, Block):
        step = (rows if pattern.over == "row" else pattern.size[0]) * pattern.size[1]
    else:
        raise PatternError(
            f"an allocation cannot change the pattern {pattern}",
            expected="a fraction such as 0.5, 0.5/row or 0.5@64x64, which may differ from matrix to matrix",
            fix="set allocation: uniform, or another pattern",
        )
    return Portion(step, rows * columns // step, pattern.zeros(shape) // step)


def distribute(portions: Sequence[Portion], desired: Sequence[float]) -> list[int]:
    """Turn desired sparsities into steps, with exactly as many zeros in total as without an allocation.

    All desired sparsities are shifted by one constant, and clipped to [0, 1], until their sum fits; then rounded by
    the largest remainder.

    Args:
        portions: the matrices.
        desired: their sparsities, any finite numbers.

    Returns:
        The number of steps of each matrix.

    Raises:
        PatternError: steps of different sizes cannot add up to the total.

    Example:
        >>> distribute([Portion(1, 10, 5), Portion(1, 10, 5)], [0.2, 0.7])
        [3, 7]
    """
    total = sum(one.zeros for one in portions)
    exact = _shifted(portions, desired, total)
    # A value that is a whole number but for rounding must not lose a step.
    steps = [min(math.floor(value + 1e-9), one.steps) for value, one in zip(exact, portions, strict=True)]
    left = total - sum(count * one.step for count, one in zip(steps, portions, strict=True))
    for place in sorted(range(len(portions)), key=lambda place: steps[place] - exact[place]):
        if portions[place].step <= left and steps[place] < portions[place].steps:
            steps[place] += 1
            left -= portions[place].step
    for step, count in _moves({one.step for one in portions}, left).items():
        if not _move(portions, exact, steps, step, count):
            raise _unreachable(left)
    return steps


def _shifted(portions: Sequence[Portion], desired: Sequence[float], total: int) -> list[float]:
    """The desired numbers of steps, not yet whole, whose zeros add up to the total."""

    def at(shift: float) -> list[float]:
        return [min(max(value + shift, 0.0), 1.0) * one.steps for value, one in zip(desired, portions, strict=True)]

    # Every sparsity is 0 at the lower end, and 1 at the upper.
    low, high = -max(desired), 1 - min(desired)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        zeros = math.fsum(value * one.step for value, one in zip(at(middle), portions, strict=True))
        low, high = (middle, high) if zeros < total else (low, middle)
    return at(high)


def _moves(sizes: set[int], left: int) -> dict[int, int]:
    """The fewest steps of these sizes, taken or given back, that add up to what is left: size -> number."""
    if left % math.gcd(*sizes):
        raise _unreachable(left)
    # Any sum can be walked in an order that stays within one step of the way from 0 to what is left.
    bound = abs(left) + 2 * max(sizes)
    steps = [sign * size for size in sorted(sizes) for sign in (1, -1)]
    # From both ends: where sizes have no common divisor, one end alone would visit every sum in the bound.
    came: list[dict[int, int]] = [{0: 0}, {left: 0}]
    edges = [[0], [left]]
    side = 0
    while (met := next((here for here in edges[side] if here in came[1 - side]), None)) is None:
        side = 1 - side
        edges[side] = list(_beyond(edges[side], steps, came[side], bound))
        if not edges[side]:
            raise _unreachable(left)
    moves: dict[int, int] = {}
    for side, direction in ((0, 1), (1, -1)):
        here = met
        while step := came[side][here]:
            moves[abs(step)] = moves.get(abs(step), 0) + (direction if step > 0 else -direction)
            here -= step
    return moves


def _beyond(edge: Sequence[int], steps: Sequence[int], came: dict[int, int], bound: int) -> Iterator[int]:
    """The new sums one step away from an edge; notes by which step each was reached."""
    for here in edge:
        for step in steps:
            there = here + step
            if abs(there) <= bound and there not in came:
                came[there] = step
                yield there


def _move(portions: Sequence[Portion], exact: Sequence[float], steps: list[int], step: int, count: int) -> bool:
    """Add `count` steps (negative: take them back) nearest to the exact values; whether there is room."""
    sign = 1 if count > 0 else -1
    for _ in range(abs(count)):
        able = [
            place for place, one in enumerate(portions) if one.step == step and 0 <= steps[place] + sign <= one.steps
        ]
        if not able:
            return False
        steps[min(able, key=lambda place: sign * (steps[place] - exact[place]))] += sign
    return True


def _unreachable(left: int) -> PatternError:
    return PatternError(
        f"the allocation cannot be made exact: {abs(left)} zero{'s are' if abs(left) > 1 else ' is'} "
        f"{'left over' if left > 0 else 'too many'}",
        expected="matrices whose rows or blocks add up to the number of zeros that the recipe asks for",
        fix="compare weights over each matrix (for example 0.5/matrix), or set allocation: uniform",
    )
