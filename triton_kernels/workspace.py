"""Memory that all layers of a device share: the dense matrix of the current layer, and split-K partial sums.

It is allocated when layers are built, so that a forward pass allocates nothing but its output and can be captured in a
CUDA graph. A buffer that has been used is kept until `release`, even after a larger one has replaced it: a graph
captured in the meantime still writes to its address.

Its content lives from one kernel to the next within one operation. The operations that use it must therefore run on one
stream of a device at a time: if two streams, or two threads, run them concurrently, they silently overwrite each
other's sums.
"""

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor


@dataclass(slots=True)
class _Buffer:
    """Bytes of one device for one purpose."""

    purpose: str
    device: torch.device
    memory: Tensor | None = None
    handed_out: bool = False
    retired: list[Tensor] = field(default_factory=list)

    def grow(self, size: int) -> None:
        if self.memory is not None and size <= len(self.memory):
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the {self.purpose} of {self.device} would grow to {size} bytes while a CUDA graph is captured\n"
                "expected: all of it allocated before the capture\n"
                "fix: reserve it when layers are built, or run the model once with these shapes first"
            )
        if self.memory is not None and self.handed_out:
            self.retired.append(self.memory)
        # Freed before the larger one is allocated, so that both need not fit.
        self.memory, self.handed_out = None, False
        with torch.inference_mode(False):  # it outlives the inference mode that its first caller may be in
            self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = prod(shape) * dtype.itemsize
        self.grow(size)
        assert self.memory is not None
        self.handed_out = True
        return self.memory[:size].view(dtype).view(shape)


_scratch: dict[torch.device, _Buffer] = {}
_partials: dict[torch.device, _Buffer] = {}


def reserve(device: torch.device, scratch_bytes: int, partial_bytes: int) -> None:
    """Make sure that the buffers of a device have at least these sizes.

    Args:
        device: where the layer is; on the meta device nothing is reserved.
        scratch_bytes: bytes of the layer's dense weight.
        partial_bytes: bytes of its partial sums: 4 × splits × tokens × out_features.

    Raises:
        RuntimeError: memory would have to grow while a CUDA graph is captured.
    """
    if device.type == "meta":
        return
    device = _indexed(device)
    _of(_scratch, "scratch", device).grow(scratch_bytes)
    _of(_partials, "space for partial sums", device).grow(partial_bytes)


def scratch(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a view [*shape] of the device's scratch, with arbitrary content.

    It grows if not enough was reserved. The next call returns the same memory.

    Raises:
        RuntimeError: memory would have to grow while a CUDA graph is captured.
    """
    device = _indexed(device)
    return _of(_scratch, "scratch", device).view(shape, dtype)


def partials(device: torch.device, shape: tuple[int, ...]) -> Tensor:
    """Return a float32 view [*shape] of the device's space for partial sums; otherwise like `scratch`."""
    device = _indexed(device)
    return _of(_partials, "space for partial sums", device).view(shape, torch.float32)


def reserved(device: torch.device) -> int:
    """Count the bytes held for a device."""
    device = _indexed(device)
    buffers = [table[device] for table in (_scratch, _partials) if device in table]
    return sum(len(memory) for buffer in buffers for memory in (buffer.memory, *buffer.retired) if memory is not None)


def release(device: torch.device) -> None:
    """Free the memory of a device; graphs captured before must not be replayed afterwards."""
    device = _indexed(device)
    _scratch.pop(device, None)
    _partials.pop(device, None)


def _of(table: dict[torch.device, _Buffer], purpose: str, device: torch.device) -> _Buffer:
    if device not in table:
        table[device] = _Buffer(purpose, device)
    return table[device]


def _indexed(device: torch.device) -> torch.device:
    """`cuda` means the current device, which another call may change."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
