"""The interface of all on-disk layouts of one pruned matrix, and the bit handling that they share.

A layout describes a matrix W [out, in], a torch `Linear` weight, so completely that its packed tensors can be allocated
from config.json alone. Each tensor is stored as `<module>.<suffix>` in place of `<module>.weight`; elements are
little-endian as in any safetensors file. Weights are moved as integers of their size, so that every bit of a NaN
survives; only -0.0 changes, to +0.0. Packing and unpacking run on the tensors' device; in addition to input and output
they need a few dozen bytes for each of four million weights, and a second copy of the stored blocks.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Integer, Shaped, UInt8
from torch import Tensor

from llmprune.errors import FormatError, PatternError
from llmprune.patterns import Pattern

# The integers that a weight's bits are read as, by its size in bytes; their highest value is all bits but the sign.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Dtypes in which a weight is zero exactly if all its bits but the sign are. (In torch's fnuz types the sign bit alone
# is NaN.)
_WEIGHTS = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip

_SLAB = 1 << 22


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and dtype of one packed tensor.

    Attributes:
        shape: its dimensions.
        dtype: its element type; None for that of the weights, which the checkpoint determines.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@runtime_checkable  # so that annotations that name it can be executed in the tests
class Layout(Protocol):
    """How one matrix is stored; a frozen value."""

    name: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """The dimensions (out, in) of the dense matrix."""

    @classmethod
    def fit(cls, weight: Shaped[Tensor, "out in"], pattern: Pattern) -> "Layout":
        """The layout that holds this weight [out, in] in the fewest bytes.

        Args:
            weight: only its shape and its zeros are read.
            pattern: what the weight was pruned to; it gives the size of the groups or blocks.

        Raises:
            PatternError: the layout does not store this pattern, or the pattern does not divide the matrix.
        """

    def tensors(self) -> dict[str, Spec]:
        """The packed tensors: suffix -> shape and dtype."""

    def pack(self, weight: Shaped[Tensor, "out in"]) -> dict[str, Tensor]:
        """Store a weight [out, in] of any floating dtype; the result shares no memory with it, except in `dense`.

        Raises:
            PatternError: it has non-zeros that the layout has no room for.
            FormatError: it has the wrong shape, or is not floating-point.
        """

    def unpack(self, tensors: Mapping[str, Tensor]) -> Shaped[Tensor, "out in"]:
        """The dense weight [out, in]; the inverse of `pack`.

        Raises:
            FormatError: the tensors do not match the layout.
        """

    def to_dict(self) -> dict[str, Any]:
        """The layout as JSON types; `layout_from_dict` is the inverse."""

    def nbytes(self, itemsize: int) -> int:
        """Size of the packed tensors, for weights of `itemsize` bytes."""


def total_bytes(layout: Layout, itemsize: int) -> int:
    """Add up the packed tensors' sizes, for weights of `itemsize` bytes."""
    specs = layout.tensors().values()
    return sum(prod(spec.shape) * (spec.dtype.itemsize if spec.dtype else itemsize) for spec in specs)


def to_row(layout: Layout) -> dict[str, Any]:
    """The layout's name and fields as JSON types."""
    return {"layout": layout.name, **asdict(layout), "shape": list(layout.shape)}  # type: ignore[call-overload]


def weight_bits(layout: Layout, weight: Shaped[Tensor, "out in"]) -> Integer[Tensor, "out in"]:
    """Read a weight's bits as integers of its size; contiguous.

    Raises:
        FormatError: its shape differs from the layout's, or it is not floating-point.
    """
    if tuple(weight.shape) != layout.shape:
        raise FormatError(
            f"a weight of shape {list(weight.shape)} for a {layout.name} layout of {list(layout.shape)}",
            expected="the shape that the layout was made for",
        )
    if weight.dtype not in _WEIGHTS:
        raise FormatError(f"a weight of dtype {weight.dtype}", expected=", ".join(map(str, _WEIGHTS)))
    return as_bits(weight)


def packed_bits(layout: Layout, tensors: Mapping[str, Tensor]) -> tuple[Integer[Tensor, "..."], torch.dtype]:
    """Check the packed tensors' names, shapes and dtypes.

    Returns:
        The values' bits as integers of their size, contiguous, and the dtype of the weights.

    Raises:
        FormatError: a tensor is missing or unexpected, or does not match the layout.
    """
    specs = layout.tensors()
    if set(tensors) != set(specs):
        raise corrupt(layout, f"tensors {sorted(tensors)}", f"exactly {sorted(specs)}")
    for suffix, spec in specs.items():
        tensor = tensors[suffix]
        if tuple(tensor.shape) != spec.shape:
            raise corrupt(layout, f"{suffix!r} has shape {list(tensor.shape)}", str(list(spec.shape)))
        allowed = (spec.dtype,) if spec.dtype else _WEIGHTS
        if tensor.dtype not in allowed:
            raise corrupt(layout, f"{suffix!r} has dtype {tensor.dtype}", ", ".join(map(str, allowed)))
    values = next(tensors[suffix] for suffix, spec in specs.items() if spec.dtype is None)
    return as_bits(values), values.dtype


def corrupt(layout: Layout, what: str, expected: str) -> FormatError:
    """The error for packed tensors that are damaged."""
    rows, columns = layout.shape
    return FormatError(
        f"a {layout.name} matrix of {rows} x {columns} (out x in): {what}",
        expected=expected,
        fix="download the checkpoint again, or pack the dense one again",
    )


def disobedient(layout: Layout, what: str, expected: str) -> PatternError:
    """The error for a weight that does not fit its layout."""
    rows, columns = layout.shape
    return PatternError(
        f"a weight of {rows} x {columns} (out x in) in the layout {layout.name}: {what}",
        expected=expected,
        fix="prune it to that pattern, or store it as bitmask or dense",
    )


def as_bits(tensor: Shaped[Tensor, "..."]) -> Integer[Tensor, "..."]:
    """Read a tensor's bits as signed integers of its size; contiguous."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.dtype.itemsize])


def nonzero(bits: Integer[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """True where the weight is neither 0.0 nor -0.0."""
    return (bits & torch.iinfo(bits.dtype).max) != 0


def clear_negative_zeros(bits: Integer[Tensor, "..."]) -> Integer[Tensor, "..."]:
    """Replace -0.0 with 0.0 in place; returns the tensor."""
    return bits.masked_fill_(~nonzero(bits), 0)


def padded(mask: Bool[Tensor, "... n"], count: int) -> Bool[Tensor, "... n"]:
    """Pad every group of a mask to `count` positions with its lowest unused ones; no group may have more."""
    missing = count - mask.sum(-1, keepdim=True, dtype=torch.int32)
    return mask | ((~mask).cumsum(-1, dtype=torch.int32) <= missing)


def slabs(rows: int, columns: int) -> Iterator[slice]:
    """Cut rows into slabs of about four million elements, which bounds the temporary memory."""
    step = max(1, _SLAB // max(1, columns))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def to_bytes(bits: Bool[Tensor, "rows n"]) -> UInt8[Tensor, "rows bytes"]:
    """Pack each row's bits, element j into bit j % 8 of byte j // 8; the bits after the last are zero."""
    rows, length = bits.shape
    bytes_ = torch.zeros(rows, -(-length // 8), dtype=torch.uint8, device=bits.device)
    for place in range(min(8, length)):
        column = bits[:, place::8]
        bytes_[:, : column.shape[1]] |= column.to(torch.uint8) << place
    return bytes_


def from_bytes(bytes_: UInt8[Tensor, "rows bytes"], length: int) -> Bool[Tensor, "rows n"] | None:
    """The first `length` bits of each row, the inverse of `to_bytes`; None if a bit after them is set."""
    places = torch.arange(8, dtype=torch.uint8, device=bytes_.device)
    bits = ((bytes_.unsqueeze(-1) >> places) & 1).bool().view(bytes_.shape[0], 8 * bytes_.shape[1])
    return None if bool(bits[:, length:].any()) else bits[:, :length]
