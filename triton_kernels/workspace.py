"""Memory that all layers of a device share: the dense matrix of the current layer, and split-K partial sums.

It is allocated when layers are built, so that a forward pass allocates nothing but its output and can be captured in a
CUDA graph. A buffer that has been used is kept until `release`, even after a larger one has replaced it: a graph
captured in the meantime still writes to its address.

Its content lives from one kernel to the next within one operation. Operations on one stream follow one another; each
other stream that runs them gets a buffer of its own when it first needs one, of the size that layers reserved, so that
streams do not overwrite each other's sums. On a CPU, one thread at a time may run them.
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

    def grow(self, size: int, reserved: int) -> None:
        if self.memory is not None and size <= len(self.memory):
            return
        # A stream that a capture is the first to use gets what was reserved: it never has to grow. The memory belongs
        # to the graph's pool, where it is kept for as long as this refers to it.
        first = self.memory is None and size <= reserved
        if self.device.type == "cuda" and not first and torch.cuda.is_current_stream_capturing():
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
            self.memory = torch.empty(max(size, reserved), dtype=torch.uint8, device=self.device)

    def view(self, shape: tuple[int, ...], dtype: torch.dtype, reserved: int) -> Tensor:
        size = prod(shape) * dtype.itemsize
        self.grow(size, reserved)
        assert self.memory is not None
        self.handed_out = True
        return self.memory[:size].view(dtype).view(shape)


_SCRATCH, _PARTIALS = "scratch", "space for partial sums"

# By purpose, device and stream; and the most bytes that layers of a device have reserved.
_buffers: dict[tuple[str, torch.device, int], _Buffer] = {}
_reserved: dict[tuple[str, torch.device], int] = {}


def reserve(device: torch.device, scratch_bytes: int, partial_bytes: int) -> None:
    """Make sure that the buffers of a device have at least these sizes, on this stream and on those that come later.

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
    for purpose, size in ((_SCRATCH, scratch_bytes), (_PARTIALS, partial_bytes)):
        _buffer(purpose, device).grow(size, 0)
        _reserved[purpose, device] = max(size, _reserved.get((purpose, device), 0))


def scratch(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a view [*shape] of the scratch of a device's current stream, with arbitrary content.

    It grows if not enough was reserved. The next call on the same stream returns the same memory.

    Raises:
        RuntimeError: memory would have to grow while a CUDA graph is captured.
    """
    return _view(_SCRATCH, device, shape, dtype)


def partials(device: torch.device, shape: tuple[int, ...]) -> Tensor:
    """Return a float32 view [*shape] of the space for partial sums of a device's stream; otherwise like `scratch`."""
    return _view(_PARTIALS, device, shape, torch.float32)


def reserved(device: torch.device) -> int:
    """Count the bytes held for a device, on all its streams."""
    device = _indexed(device)
    buffers = [buffer for (_, held, _), buffer in _buffers.items() if held == device]
    return sum(len(memory) for buffer in buffers for memory in (buffer.memory, *buffer.retired) if memory is not None)


def release(device: torch.device) -> None:
    """Free the memory of a device; graphs captured before must not be replayed afterwards."""
    device = _indexed(device)
    for key in [key for key in _buffers if key[1] == device]:
        del _buffers[key]
    for purpose in (_SCRATCH, _PARTIALS):
        _reserved.pop((purpose, device), None)


def _view(purpose: str, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    device = _indexed(device)
    return _buffer(purpose, device).view(shape, dtype, _reserved.get((purpose, device), 0))


def _buffer(purpose: str, device: torch.device) -> _Buffer:
    key = purpose, device, _stream(device)
    if key not in _buffers:
        _buffers[key] = _Buffer(purpose, device)
    return _buffers[key]


def _stream(device: torch.device) -> int:
    """The current stream of a device; 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _indexed(device: torch.device) -> torch.device:
    """`cuda` means the current device, which another call may change."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
