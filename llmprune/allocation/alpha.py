"""AlphaPruning: layers with heavy-tailed spectra stay denser (Lu et al. 2024, arXiv 2410.10912); needs no data."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Bins of the histogram whose peak is where the tail begins.
_BINS = 100
# Eigenvalues below this fraction of the largest are rounding errors.
_LEAST = 1e-10


def hill(eigenvalues: Tensor) -> float:
    """The Hill estimate of a spectrum's tail exponent: 1 + n / (sum ln l_i - n ln l_min), over the n with l_i >= l_min.

    The tail begins at l_min, the left edge of the fullest of 100 bins of log10 l.

    Args:
        eigenvalues: of W^T W, any order; zeros are left out.

    Returns:
        Infinite if no eigenvalue is positive, or all that are positive are equal.
    """
    values = eigenvalues.double()
    values = values[values > 0]
    if not len(values):
        return math.inf
    values = values[values > _LEAST * values.max()]
    logs = values.log()
    low, high = float(logs.min()), float(logs.max())
    if not high > low:
        return math.inf
    counts = torch.histc(logs, _BINS, low, high)
    start = low + (high - low) / _BINS * int(counts.argmax())
    # The left edge of the first bin is the smallest value; rounding must not exclude it.
    tail = logs[logs >= start - 1e-12 * abs(start)]
    excess = float(tail.sum()) - len(tail) * start
    return 1 + len(tail) / excess if excess > 0 else math.inf


def spectrum(weight: Tensor) -> Tensor:
    """The eigenvalues of W^T W that are not zero by its shape, from the smaller of the two Grams, in float64.

    Args:
        weight: [out, in], finite.
    """
    wide = weight.double()
    gram = wide @ wide.T if wide.shape[0] < wide.shape[1] else wide.T @ wide
    return torch.linalg.eigvalsh(gram).clamp_min(0)


def alpha(exponents: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float = 0.3) -> list[float]:
    """The sparsity of each layer: linear in its exponent, from 1 - eps to 1 + eps, scaled to the target.

    Args:
        exponents: mean exponent of each layer's matrices, finite; larger is less heavy-tailed, and becomes sparser.
        sizes: weights of each layer.
        sparsity: the target of all weights together, in [0, 1].
        spread: eps, in [0, 1].
    """
    low, high = min(exponents), max(exponents)
    factors = [1 - spread + 2 * spread * (value - low) / (high - low) if high > low else 1.0 for value in exponents]
    mean = sum(f * size for f, size in zip(factors, sizes, strict=True)) / sum(sizes)
    return [sparsity * factor / mean for factor in factors]
