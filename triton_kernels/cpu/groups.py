"""Which weights of N:M groups stay."""

import torch
from torch import Tensor

from .finding import library, unavailable
from .library import MOST_GROUP


def keep_in_groups_compiled(scores: Tensor, keep: int) -> Tensor | None:
    """True for the `keep` highest scores of each group; of equal ones the last.

    Args:
        scores: [groups, of], no NaN.
        keep: at most `of`.

    Returns:
        [groups, of], bool; None unless scores are float32 on a CPU that has kernels, in groups of at most `MOST_GROUP`.

    Raises:
        ValueError: `keep` is no number from 0 to `of`.
    """
    fits = scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.shape[1] <= MOST_GROUP
    if not fits or unavailable() is not None:
        return None
    return library().choose(scores.contiguous(), keep)
