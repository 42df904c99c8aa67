"""From how many tokens on expanded rows are faster than the sparse kernel on this machine, as measured.

The limit is measured once for a shape (`.measuring`) and recorded where tuning records its choices
(`..configurations`), under the processor, the hash of the kernels' sources, the instruction set and the number of
threads. Until then the sparse kernel takes fewer than `DEFAULT_TOKENS` tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import configurations
from .compiler import source_hash
from .finding import library
from .library import KINDS, STORED

OPERATION = "cpu_linear.dispatch"

# Where the sparse kernel and expanded rows cost about the same on the CPU that they were written on.
DEFAULT_TOKENS = 64

# Fewer tokens are bound by the bytes of the weights: there the sparse kernel is always the faster one.
FEWEST_TOKENS = 8

_CPU = torch.device("cpu")


def dense_from(packed: Sequence[Tensor], sizes: Sequence[int]) -> int:
    """The number of tokens from which a product expands dense rows."""
    limit = measured_limit(packed, sizes)
    return DEFAULT_TOKENS if limit is None else limit


def measured_limit(packed: Sequence[Tensor], sizes: Sequence[int]) -> int | None:
    """The same as far as it was measured; None: not yet."""
    return configurations.measured_as(_limit, _operation(), _CPU, **shape_key(packed, sizes))


def record_limit(packed: Sequence[Tensor], sizes: Sequence[int], limit: int, *, kept: bool = True) -> None:
    """Record a measured limit, for this process alone unless it is to be kept.

    Raises:
        OSError: the cache folder cannot be written; the limit holds in this process.
    """
    record = configurations.record if kept else configurations.hold
    record(_operation(), _CPU, {"limit": limit}, **shape_key(packed, sizes))


def shape_key(packed: Sequence[Tensor], sizes: Sequence[int]) -> dict[str, int]:
    """What a limit depends on: the matrices' layout, types and shape, the instruction set, and the threads."""
    found = library().describe(packed[0])
    return {
        "kind": KINDS[found.kind],
        "stored": STORED[found.stored],
        "out_features": sum(sizes),
        "in_features": found.shape[1],
        "itemsize": packed[0].itemsize,
        "level": library().level,
        "threads": torch.get_num_threads(),
    }


def _operation() -> str:
    # Kernels that were changed since are measured anew.
    return f"{OPERATION}.{source_hash()}"


def _limit(limit: int) -> int:
    return int(limit)
