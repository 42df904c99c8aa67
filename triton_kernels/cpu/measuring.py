"""Measure from how many tokens on expanded rows are faster than the sparse kernel, by the matrices of a model."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .choices import FEWEST_TOKENS, record_limit
from .finding import library
from .operator import expanded_linear

# Token counts at which both ways may be timed, and the limit if expanded rows win at none of them.
COUNTS = (FEWEST_TOKENS, 16, 32, 64, 128, 256)
NEVER = 1 << 31

_TURNS = 5

# The middle one of turns that nothing disturbs takes at most so many times the least.
_CALM = 1.3


@torch.inference_mode()
def measure_dense_from(copies: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> int:
    """Measure and record the number of tokens from which expanding dense rows is faster.

    What was measured while other programs disturbed it holds in this process, and the next one measures again.

    Args:
        copies: products of the same shape, to rotate through, so that weights come from memory as in a model.
        sizes: the rows of each of a product's matrices.

    Raises:
        OSError: the cache folder cannot be written; the limit holds in this process.
    """
    calm = True

    def wins(tokens: int) -> bool:
        nonlocal calm
        sparse, expanded = _times(copies, sizes, tokens)
        calm = calm and all(sorted(times)[_TURNS // 2] <= _CALM * min(times) for times in (sparse, expanded))
        return min(expanded) < min(sparse)  # other load only ever adds

    limit = find_limit(wins)
    record_limit(copies[0], sizes, limit, kept=calm)
    return limit


def find_limit(wins: Callable[[int], bool]) -> int:
    """The first of `COUNTS` at which expanding wins, or `NEVER`; by bisection, since it wins at all higher ones."""
    low, high = 0, len(COUNTS)
    while low < high:
        middle = (low + high) // 2
        if wins(COUNTS[middle]):
            high = middle
        else:
            low = middle + 1
    return COUNTS[low] if low < len(COUNTS) else NEVER


def _times(
    copies: Sequence[Sequence[Tensor]], sizes: Sequence[int], tokens: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of the sparse kernel and of expanded rows, in turns, after one of each that does not count."""
    x = torch.randn(tokens, library().describe(copies[0][0]).shape[1]).to(copies[0][0].dtype)
    y = x.new_empty(tokens, sum(sizes))

    def sparse(packed: Sequence[Tensor]) -> None:
        library().multiply(list(packed), x, None, y)

    def expanded(packed: Sequence[Tensor]) -> None:
        expanded_linear(x, list(packed), None, list(sizes))

    both = (sparse, expanded)
    for call in both:
        call(copies[-1])
    turns = [[_seconds(call, copies[turn % len(copies)]) for call in both] for turn in range(_TURNS)]
    first, second = zip(*turns, strict=True)
    return first, second


def _seconds(call: Callable[[Sequence[Tensor]], None], packed: Sequence[Tensor]) -> float:
    started = time.perf_counter()
    call(packed)
    return time.perf_counter() - started
