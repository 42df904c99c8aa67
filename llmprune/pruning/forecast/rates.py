"""How fast a device multiplies, where a forecast turns operations into seconds."""

import torch
import torch.nn.functional as F

from llmprune.devices import runs_per_second
from llmprune.precision import add_gram, float32_products
from llmprune.pruning.forecast.plan import Work

# The size of the square matrices used to measure rates.
_RATE_SIZES = {"cpu": 1024, "cuda": 4096}


def measure_rates(device: torch.device, dtype: torch.dtype) -> Work:
    """Measure how fast a device multiplies matrices, in operations per second.

    Args:
        device: where to measure.
        dtype: of the forward pass, from which Grams are computed; solving is in float32.
    """
    size = _RATE_SIZES.get(device.type, 1024)
    narrow = torch.randn(size, size, device=device).to(dtype)
    wide, total = narrow.float(), torch.zeros(size, size, device=device)
    with torch.no_grad():
        forward = runs_per_second(lambda: F.linear(narrow, narrow), device)
        gram = runs_per_second(lambda: add_gram(total, narrow), device)
        with float32_products("ieee"):
            solve = runs_per_second(lambda: wide @ wide, device)
    operations = 2 * size**3
    return Work(operations * forward, operations * gram, operations * solve, operations * forward)
