"""Level switches (EvoPress, Sieberling et al. 2024, arXiv 2410.14649): what one matrix loses, another gets back."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.allocation.scalars import Evaluate


@dataclass(frozen=True, slots=True)
class Evolution:
    """How to search.

    Attributes:
        generations: how many times the best candidate has offspring, >= 0.
        offspring: candidates per generation, >= 1.
        step: by how much the sparsity of a matrix changes in one switch, in (0, 1).
        seed: of the choices.
    """

    generations: int
    offspring: int = 8
    step: float = 0.05
    seed: int = 0


def evolve(
    start: Sequence[float], divergence: float, sizes: Sequence[int], evaluate: Evaluate, evolution: Evolution
) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
    """Improve an allocation by random switches of levels, each of which keeps the number of zeros.

    Args:
        start: sparsities of the matrices.
        divergence: that of `start`.
        sizes: weights of the matrices.
        evaluate: measures the candidates of a generation together.
        evolution: how long and how to search.

    Returns:
        The best sparsities, their divergence, and the best divergence after each generation, which never rises.
    """
    generator = random.Random(evolution.seed)
    best, least, course = tuple(start), divergence, []
    for _ in range(evolution.generations if len(start) > 1 else 0):
        children = [_child(best, sizes, generator, evolution.step) for _ in range(evolution.offspring)]
        for child, found in zip(children, evaluate(children), strict=True):
            if found < least:
                best, least = child, found
        course.append(least)
    return best, least, tuple(course)


def _child(parent: Sequence[float], sizes: Sequence[int], generator: random.Random, step: float) -> tuple[float, ...]:
    """One to three switches, fewer more often, between matrices that stay within [0, 1]."""
    levels = list(parent)
    for _ in range(min(generator.randint(1, 3), generator.randint(1, 3))):
        sparser, denser = generator.sample(range(len(levels)), 2)
        # The same number of weights on both sides, and a step of at most this size on either.
        weights = step * min(sizes[sparser], sizes[denser])
        up, down = levels[sparser] + weights / sizes[sparser], levels[denser] - weights / sizes[denser]
        if up <= 1 and down >= 0:
            levels[sparser], levels[denser] = up, down
    return tuple(levels)
