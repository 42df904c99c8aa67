"""The Gram matrix of bfloat16 rows."""

import torch
from torch import Tensor

from .finding import library, unavailable
from .library import LEVELS

_NEEDED = LEVELS.index("AVX-512 with BF16")


def add_gram_compiled(total: Tensor, x: Tensor) -> bool:
    """Add the lower triangle of x^T x to `total` in place: exact products, float32 sums.

    Args:
        total: [in, in], contiguous; what lies above its diagonal is left unspecified.
        x: [tokens, in].

    Returns:
        False, with nothing added, unless x is bfloat16 and `total` float32, on a CPU with AVX-512 BF16 and no AMX.
    """
    # With AMX, torch's own product takes far fewer instructions.
    if torch.cpu._is_amx_tile_supported():
        return False
    fits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and total.dtype == torch.float32
    if not fits or not total.is_contiguous() or unavailable() is not None or library().level < _NEEDED:
        return False
    library().add_gram(total, x.contiguous())
    return True
