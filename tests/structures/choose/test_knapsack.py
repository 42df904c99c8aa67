"""Knapsack allocation against brute force over all choices."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from llmprune.errors import NumericsError, PatternError, RecipeError
from llmprune.structures.choose.knapsack import Allocation, LevelCurve, aligned_levels, allocate


def random_ladders(structures: int, levels: int, seed: int, *, whole: bool) -> list[LevelCurve]:
    """Errors that mostly rise as sizes fall, convex or not, with weights."""
    generator = torch.Generator().manual_seed(seed)
    ladders = []
    for index in range(structures):
        errors = torch.rand(levels, generator=generator, dtype=torch.float64).cumsum(0) ** 1.5
        sizes = 1 + 20 * torch.rand(levels, generator=generator, dtype=torch.float64).flip(0).cumsum(0).flip(0)
        weight = 0.5 + float(torch.rand(1, generator=generator))
        ladders.append(
            LevelCurve(f"layer {index}", errors.tolist(), (sizes.round() if whole else sizes).tolist(), weight)
        )
    return ladders


def brute_force(ladders: Sequence[LevelCurve], budget: float) -> float:
    best = math.inf
    for levels in itertools.product(*(range(len(ladder.errors)) for ladder in ladders)):
        pairs = list(zip(ladders, levels, strict=True))
        if math.fsum(ladder.sizes[level] for ladder, level in pairs) <= budget:
            best = min(best, math.fsum(ladder.weight * ladder.errors[level] for ladder, level in pairs))
    return best


def check_sums(ladders: Sequence[LevelCurve], found: Allocation, budget: float) -> None:
    """What the allocation says about itself is true, and it is legal."""
    assert list(found.levels) == [ladder.name for ladder in ladders]
    pairs = [(ladder, found.levels[ladder.name]) for ladder in ladders]
    assert found.size == pytest.approx(sum(ladder.sizes[level] for ladder, level in pairs))
    assert found.error == pytest.approx(sum(ladder.weight * ladder.errors[level] for ladder, level in pairs))
    assert found.size <= budget * (1 + 1e-9)
    assert found.bound <= found.error


def smallest(ladders: Sequence[LevelCurve]) -> float:
    return math.fsum(min(ladder.sizes) for ladder in ladders)


def largest(ladders: Sequence[LevelCurve]) -> float:
    return math.fsum(max(ladder.sizes) for ladder in ladders)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_whole_sizes_are_solved_exactly(seed: int, share: float) -> None:
    ladders = random_ladders(4, 5, seed, whole=True)
    budget = math.floor(smallest(ladders) + share * (largest(ladders) - smallest(ladders)))
    found = allocate(ladders, budget)
    check_sums(ladders, found, budget)
    best = brute_force(ladders, budget)
    assert found.error == pytest.approx(best, rel=1e-12)
    assert found.bound <= best * (1 + 1e-12)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(8))
def test_other_sizes_keep_the_budget_and_come_close(seed: int, share: float) -> None:
    ladders = random_ladders(4, 5, seed, whole=False)
    budget = smallest(ladders) + share * (largest(ladders) - smallest(ladders))
    found = allocate(ladders, budget, resolution=20_000)
    check_sums(ladders, found, budget)
    best = brute_force(ladders, budget)
    # At this resolution no choice of these is lost to rounding.
    assert found.error == pytest.approx(best, rel=1e-12)
    coarse = allocate(ladders, budget, resolution=20)
    check_sums(ladders, coarse, budget)
    assert coarse.bound <= best * (1 + 1e-12) <= coarse.error * (1 + 1e-9)


def test_common_divisors_spare_the_resolution() -> None:
    """Sizes in the millions, of which 768 is a divisor: a coarse quantum would round, the divisor does not."""
    ladders = [
        LevelCurve(ladder.name, ladder.errors, [768 * size for size in ladder.sizes], ladder.weight)
        for ladder in random_ladders(4, 5, 1, whole=True)
    ]
    budget = smallest(ladders) + 768 * 23
    assert allocate(ladders, budget, resolution=23).error == pytest.approx(brute_force(ladders, budget), rel=1e-12)


def test_prices_help_where_quanta_are_coarse() -> None:
    """In one quantum only one structure can stay whole; a price keeps the three dearest."""
    ladders = [LevelCurve(str(index), [0, 1], [1.5, 0.5], weight=index) for index in (1, 2, 3, 4, 5)]
    found = allocate(ladders, 5.6, resolution=1)
    assert (found.error, found.levels) == (3, {"1": 1, "2": 1, "3": 0, "4": 0, "5": 0})


def test_the_bound_is_tight_for_convex_ladders() -> None:
    ladders = [LevelCurve(str(index), [0, 1, 4, 9], [3, 2, 1, 0]) for index in range(5)]
    found = allocate(ladders, 10)
    assert (found.error, found.size) == (5, 10)
    assert found.bound == pytest.approx(5)


def test_weights_decide() -> None:
    ladders = [LevelCurve("cheap", [0, 1], [1, 0]), LevelCurve("dear", [0, 1], [1, 0], weight=2)]
    assert allocate(ladders, 1).levels == {"cheap": 1, "dear": 0}
    assert allocate(ladders[::-1], 1).levels == {"dear": 0, "cheap": 1}


def test_ties_go_to_the_smaller_size_then_to_the_lower_level() -> None:
    assert allocate([LevelCurve("a", [0, 0, 0], [5, 3, 3])], 5).levels == {"a": 1}
    assert allocate([LevelCurve("a", [1, 1], [2, 2])], 2).levels == {"a": 0}
    # Levels that no price would choose.
    assert allocate([LevelCurve("a", [0, 3, 3, 4], [4, 2, 2, 0])], 2).levels == {"a": 1}


def test_a_large_budget_takes_the_least_errors() -> None:
    ladders = random_ladders(6, 9, 0, whole=False)
    found = allocate(ladders, 1e9)
    assert set(found.levels.values()) == {0}
    assert found.bound == pytest.approx(found.error)


def test_it_is_deterministic() -> None:
    ladders = random_ladders(12, 30, 0, whole=False)
    budget = smallest(ladders) + 0.5 * (largest(ladders) - smallest(ladders))
    assert allocate(ladders, budget) == allocate(ladders, budget)


def test_sizes_of_zero() -> None:
    assert allocate([LevelCurve("a", [1, 0], [0, 0]), LevelCurve("b", [3, 2], [0, 0])], 0).levels == {"a": 1, "b": 1}


def test_a_budget_that_cannot_be_met() -> None:
    with pytest.raises(PatternError, match=r"keeps 38\.0% .* levels need 40\.0%"):
        allocate([LevelCurve("a", [0, 1], [5, 2])], 1.9)
    assert allocate([LevelCurve("a", [0, 1], [5, 2])], 2).levels == {"a": 1}
    with pytest.raises(PatternError, match="keeps nan%"):
        allocate([LevelCurve("a", [0, 1], [5, 2])], math.nan)


def test_names_and_resolution() -> None:
    with pytest.raises(PatternError, match="distinct names"):
        allocate([LevelCurve("a", [0], [1]), LevelCurve("a", [0], [1])], 2)
    with pytest.raises(PatternError, match="at least one"):
        allocate([], 2)
    with pytest.raises(RecipeError, match="resolution"):
        allocate([LevelCurve("a", [0], [1])], 2, resolution=0)


@pytest.mark.parametrize(
    ("errors", "sizes", "weight", "error"),
    [
        ([], [], 1.0, PatternError),
        ([0.0], [1.0, 2.0], 1.0, PatternError),
        ([math.nan], [1.0], 1.0, NumericsError),
        ([0.0], [math.inf], 1.0, NumericsError),
        ([0.0], [-1.0], 1.0, PatternError),
        ([0.0], [1.0], -1.0, PatternError),
    ],
)
def test_ladders_that_are_wrong(errors: list[float], sizes: list[float], weight: float, error: type[Exception]) -> None:
    with pytest.raises(error, match="layer 3"):
        LevelCurve("layer 3", errors, sizes, weight)


def test_aligned_levels() -> None:
    assert aligned_levels(704, 128, 352) == (0, 64, 192, 320)
    assert aligned_levels(704, 64, 128) == (0, 64, 128)
    assert aligned_levels(8, 1, 3) == (0, 1, 2, 3)
    assert aligned_levels(8, 4, 8) == (0, 4, 8)
    for groups, multiple, most in ((8, 0, 3), (8, 2, 9), (8, 2, -1)):
        with pytest.raises(PatternError):
            aligned_levels(groups, multiple, most)
