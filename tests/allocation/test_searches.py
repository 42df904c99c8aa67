"""Searches find the minimum of functions that are known, and never return anything worse than uniform."""

from collections.abc import Sequence

import pytest

from llmprune.allocation.curves import DamageCurve, choose_levels
from llmprune.allocation.scalars import Position, search, shaped
from llmprune.allocation.switches import Evolution, evolve

POSITIONS = [Position(layer / 7, part == 0) for layer in range(8) for part in range(2)]


def test_the_three_numbers_shape_the_sparsities() -> None:
    found = shaped([Position(0.0, True), Position(0.5, False), Position(1.0, False)], 0.5, (0.2, 0.1, 0.05))
    assert found == pytest.approx([0.5 - 0.1 - 0.05 - 0.05, 0.5 + 0.05, 0.5 + 0.1 + 0.05 - 0.05])


def test_the_search_finds_the_bottom_of_a_bowl() -> None:
    target = shaped(POSITIONS, 0.7, (0.08, -0.06, 0.03))

    def bowl(rounds: Sequence[Sequence[float]]) -> list[float]:
        return [1 + sum((a - b) ** 2 for a, b in zip(one, target, strict=True)) for one in rounds]

    found = search(POSITIONS, 0.7, bowl)
    assert 12 <= len(found.tried) <= 20
    assert found.uniform == bowl([[0.7] * 16])[0]
    assert found.divergence - 1 < 0.1 * (found.uniform - 1)
    assert found.divergence == min(value for _, value in found.tried)


def test_uniform_wins_where_it_is_best_and_where_all_are_equal() -> None:
    for weight in (1.0, 0.0):
        found = search(POSITIONS, 0.5, lambda rounds, w=weight: [w * sum(abs(v - 0.5) for v in one) for one in rounds])
        assert found.sparsities == (0.5,) * 16
        assert found.divergence == found.uniform


def test_switches_keep_the_number_of_zeros_and_never_lose() -> None:
    sizes, start = [10, 30, 20, 5], [0.5, 0.7, 0.6, 0.9]
    seen: list[Sequence[float]] = []

    def distance(children: Sequence[Sequence[float]]) -> list[float]:
        seen.extend(children)
        return [sum(abs(v - goal) for v, goal in zip(one, (0.8, 0.55, 0.6, 1.0), strict=True)) for one in children]

    first = distance([start])[0]
    best, least, course = evolve(start, first, sizes, distance, Evolution(30, 8))
    zeros = sum(level * size for level, size in zip(start, sizes, strict=True))
    for one in (*seen, best):
        assert sum(level * size for level, size in zip(one, sizes, strict=True)) == pytest.approx(zeros)
        assert all(0 <= level <= 1 for level in one)
    assert list(course) == sorted(course, reverse=True)
    assert least == course[-1] < 0.7 * first
    assert evolve(start, first, sizes, distance, Evolution(30, 8))[:2] == (best, least)


def test_without_generations_nothing_changes() -> None:
    assert evolve([0.5, 0.5], 1.0, [1, 1], lambda children: [0.0], Evolution(0)) == ((0.5, 0.5), 1.0, ())


def test_the_knapsack_against_every_choice() -> None:
    curves = {
        "robust": DamageCurve(100, (0.0, 0.5, 1.0), (0.0, 0.01, 0.04)),
        "fragile": DamageCurve(100, (0.0, 0.5, 1.0), (0.0, 0.1, 0.9)),
    }
    chosen = choose_levels(curves, 0.5, 0.25)
    grid = (0.0, 0.25, 0.5, 0.75, 1.0)
    best = min((curves["robust"].at(a) + curves["fragile"].at(b), a, b) for a in grid for b in grid if a + b >= 1.0)
    assert (chosen["robust"], chosen["fragile"]) == best[1:]
    assert chosen["robust"] > chosen["fragile"]


def test_no_level_is_above_the_most() -> None:
    curves = {
        "robust": DamageCurve(100, (0.0, 0.5, 1.0), (0.0, 0.01, 0.04)),
        "fragile": DamageCurve(100, (0.0, 0.5, 1.0), (0.0, 0.1, 0.9)),
    }
    assert max(choose_levels(curves, 0.5, 0.1).values()) > 0.6
    assert choose_levels(curves, 0.5, 0.1, 0.6) == pytest.approx({"robust": 0.6, "fragile": 0.4})


def test_a_noisy_curve_never_rewards_removing_more() -> None:
    curve = DamageCurve(10, (0.0, 0.5, 1.0), (0.0, 0.3, 0.1))
    assert [curve.at(level) for level in (0.25, 0.5, 0.75, 1.0)] == pytest.approx([0.15, 0.3, 0.3, 0.3])
