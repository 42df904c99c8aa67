"""Have the system read tensors into its cache while something else is computed."""

import contextlib
import itertools
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from llmprune.storage.files import Stored
from llmprune.storage.packed_config import PackedWeight

# Spans of a file that are this close are read as one.
_GAP = 1 << 20


def read_ahead(tensors: Iterable[Stored | PackedWeight]) -> None:
    """Begin to read stored tensors, in the background.

    They are read into the cache of the system, which drops them where memory is short: no process needs more memory.
    Where the system takes no such advice, nothing happens. Files that cannot be read are reported when they are needed.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    packed = (tensor.parts.values() if isinstance(tensor, PackedWeight) else (tensor,) for tensor in tensors)
    spans = _merged(itertools.chain.from_iterable(packed))
    # In a thread: the call returns once all reads have been queued, which can take a while for gigabytes.
    threading.Thread(target=_advise, args=(spans,), daemon=True, name="llmprune-read-ahead").start()


def _merged(tensors: Iterable[Stored]) -> dict[Path, list[tuple[int, int]]]:
    """The spans of each file, in order; those close together are one."""
    spans: dict[Path, list[tuple[int, int]]] = {}
    for stored in sorted(tensors, key=lambda stored: (str(stored.file), stored.span)):
        own = spans.setdefault(stored.file, [])
        if own and stored.span[0] - own[-1][1] <= _GAP:
            own[-1] = own[-1][0], max(own[-1][1], stored.span[1])
        else:
            own.append(stored.span)
    return spans


def _advise(spans: Mapping[Path, Iterable[tuple[int, int]]]) -> None:
    for file, parts in spans.items():
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                for start, end in parts:
                    os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
