"""DLP: layers whose scores are small on average stay denser (Chen et al. 2025, arXiv 2505.23807).

A high average score goes with few outliers, on which a layer would depend.
"""

from collections.abc import Sequence

from torch import Tensor

from llmprune.allocation.spread import denser


def mean_score(scores: Sequence[Tensor]) -> float:
    """The mean of a layer's Wanda scores: r_l.

    Args:
        scores: of each matrix [out, in], |W_ij| times the norm of input j; all matrices are pooled.
    """
    return sum(float(score.double().sum()) for score in scores) / sum(score.numel() for score in scores)


def dlp(means: Sequence[float], sparsity: float, spread: float = 0.15) -> list[float]:
    """The sparsity of each layer, from its importance 1 - r_l / sum r.

    Args:
        means: r_l of each layer, >= 0.
        sparsity: the target, in [0, 1].
        spread: the largest distance from the middle of the range, in [0, 1].
    """
    total = sum(means)
    return denser([1 - mean / total if total else 1.0 for mean in means], sparsity, spread)
