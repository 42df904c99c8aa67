"""Desired sparsities become whole steps, whose zeros add up exactly."""

import contextlib
import math
import time
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as some

from llmprune.allocation.counts import Portion, _moves, distribute, portion
from llmprune.errors import PatternError
from llmprune.patterns import Block, Pattern, Unstructured, parse

portions = some.builds(
    lambda step, steps, part: Portion(step, steps, round(part * steps)),
    some.integers(1, 1000),
    some.integers(1, 300),
    some.floats(0, 1),
)


def distributed(matrices: list[Portion], desired: list[float]) -> list[int] | None:
    with contextlib.suppress(PatternError):
        return distribute(matrices, desired)
    return None


@given(some.lists(some.tuples(portions, some.floats(-1, 2)), min_size=1, max_size=8))
def test_the_total_is_exact_or_refused(pairs: list[tuple[Portion, float]]) -> None:
    matrices, desired = [one for one, _ in pairs], [value for _, value in pairs]
    steps = distributed(matrices, desired)
    # Steps of one size can always be exchanged.
    if steps is None and len({one.step for one in matrices}) > 1:
        return
    assert steps is not None
    assert all(0 <= count <= one.steps for count, one in zip(steps, matrices, strict=True))
    assert sum(c * one.step for c, one in zip(steps, matrices, strict=True)) == sum(one.zeros for one in matrices)


@given(some.lists(portions, min_size=1, max_size=8))
def test_what_is_exact_already_stays(matrices: list[Portion]) -> None:
    assert distribute(matrices, [one.uniform / one.steps for one in matrices]) == [one.uniform for one in matrices]


def test_rows_of_different_lengths_are_exchanged() -> None:
    # 4 * 10 + 6 * 10 = 100 zeros; 0.4 and 0.6 would be 32 + 72 = 104.
    steps = distribute([Portion(4, 20, 10), Portion(6, 20, 10)], [0.4, 0.6])
    assert 4 * steps[0] + 6 * steps[1] == 100
    assert steps[0] < 10 < steps[1]


@pytest.mark.parametrize("sizes", [{3, 7}, {4, 6, 10}, {5, 9, 14}])
def test_moves_are_as_few_as_possible(sizes: set[int]) -> None:
    """Compared with every combination."""
    fewest: dict[int, int] = {}
    for counts in product(range(-6, 7), repeat=len(sizes)):
        left = sum(count * size for count, size in zip(counts, sorted(sizes), strict=True))
        fewest[left] = min(sum(map(abs, counts)), fewest.get(left, 99))
    for left in range(-30, 31):
        if left % math.gcd(*sizes):
            with pytest.raises(PatternError, match="cannot be made exact"):
                _moves(sizes, left)
            continue
        moves = _moves(sizes, left)
        assert sum(size * count for size, count in moves.items()) == left
        assert sum(map(abs, moves.values())) == fewest[left]


def test_awkward_sizes_do_not_take_a_visit_to_every_sum() -> None:
    sizes = {112_927, 101_113, 40_007, 97_341, 51_909}
    start = time.process_time()
    moves = _moves(sizes, 23_457)
    assert time.process_time() - start < 0.5
    assert sum(size * count for size, count in moves.items()) == 23_457


def test_the_largest_remainder_is_rounded_up() -> None:
    assert distribute([Portion(1, 10, 5)] * 3, [0.33, 0.58, 0.59]) == [3, 6, 6]


def test_a_number_that_cannot_be_met_is_refused() -> None:
    matrices = [Portion(7, 3, 3), Portion(3, 2, 0), Portion(5, 2, 0)]
    with pytest.raises(PatternError, match="cannot be made exact: 1 zero is left over"):
        distribute(matrices, [0.3, 0.3, 0.6])


@pytest.mark.parametrize("pattern", ["0.37/row", "0.37/matrix", "0.37@2x3", "0.37@2x3/row"])
def test_a_step_is_what_the_pattern_adds(pattern: str) -> None:
    shape, parsed = (8, 12), parse(pattern)
    assert isinstance(parsed, Unstructured | Block)
    found = portion(parsed, shape)
    assert found.size == 96
    assert found.zeros == parsed.zeros(shape)
    for steps in range(found.steps + 1):
        again = parse(pattern.replace("0.37", repr(steps / found.steps)))
        assert again.zeros(shape) == steps * found.step


@pytest.mark.parametrize("pattern", [parse("2:4"), parse("0.5/layer"), parse("0.5")])
def test_patterns_without_a_sparsity_of_their_own_are_refused(pattern: Pattern) -> None:
    with pytest.raises(PatternError, match="an allocation cannot change the pattern"):
        portion(pattern, (8, 8))
