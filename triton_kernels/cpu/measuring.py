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

_REPEATS = 3


@torch.inference_mode()
def measure_dense_from(copies: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> int:
    """Measure and record the number of tokens from which expanding dense rows is faster.

    Args:
        copies: products of the same shape, to rotate through, so that weights come from memory as in a model.
        sizes: the rows of each of a product's matrices.

    Raises:
        OSError: the cache folder cannot be written; the limit holds in this process.
    """
    limit = find_limit(lambda tokens: _expanding_wins(copies, sizes, tokens))
    record_limit(copies[0], sizes, limit)
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


def _expanding_wins(copies: Sequence[Sequence[Tensor]], sizes: Sequence[int], tokens: int) -> bool:
    x = torch.randn(tokens, library().describe(copies[0][0]).shape[1]).to(copies[0][0].dtype)
    y = x.new_empty(tokens, sum(sizes))

    def sparse(packed: Sequence[Tensor]) -> None:
        library().multiply(list(packed), x, None, y)

    def expanded(packed: Sequence[Tensor]) -> None:
        expanded_linear(x, list(packed), None, list(sizes))

    return _seconds(expanded, copies) < _seconds(sparse, copies)


def _seconds(call: Callable[[Sequence[Tensor]], None], copies: Sequence[Sequence[Tensor]]) -> float:
    """The least seconds of a few calls, after one that does not count: other load only ever adds."""
    call(copies[-1])
    least = float("inf")
    for turn in range(_REPEATS):
        started = time.perf_counter()
        call(copies[turn % len(copies)])
        least = min(least, time.perf_counter() - started)
    return least
