"""OWL: layers with more outliers stay denser (Yin et al. 2023, arXiv 2310.05175, equations 2 and 3)."""

from collections.abc import Sequence

from torch import Tensor

from llmprune.allocation.spread import denser


def outlier_share(scores: Sequence[Tensor], multiple: float = 5.0) -> float:
    """The share of a layer's Wanda scores that exceed a multiple of their mean: D_l, in [0, 1].

    Args:
        scores: of each matrix [out, in], |W_ij| times the norm of input j; all matrices are pooled.
        multiple: M, > 0.
    """
    count = sum(score.numel() for score in scores)
    limit = multiple * sum(float(score.double().sum()) for score in scores) / count
    return sum(int((score > limit).sum()) for score in scores) / count


def owl(shares: Sequence[float], sparsity: float, spread: float = 0.08) -> list[float]:
    """The sparsity of each layer: S - (D_l - mean D), with D scaled to [0, 2 lambda].

    Args:
        shares: the outliers of each layer, see `outlier_share`.
        sparsity: the target S, in [0, 1].
        spread: lambda, in [0, 1].
    """
    return denser(shares, sparsity, spread)
