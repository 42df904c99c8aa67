"""`int8-bitmask` and `int8-nm`: the weights that `bitmask` and `nm` store, as 8-bit numbers with a peak for each group.

Byte specification, for a weight [out, in] and groups of `group` consecutive columns, 1 to max(1, in); the last group of
a row may be shorter.

    values   int8, as many as in `bitmask` or `nm`
    mask     as in `bitmask`, or
    meta     as in `nm`
    peaks    [out, ceil(in / group)]    the weights' dtype: bfloat16, float16 or float32

* Order, mask and meta are those of the layout without int8, for a matrix of 8-bit numbers q.
* A weight is q * t / 127, where t is the peak of its row and group: in 16-bit dtypes t / 127 is rounded to float32, its
  product with q to float32 and then to the dtype; in float32 it is computed in float64 and rounded once.
* q is -127 to 127. A peak is the largest magnitude of its group, so a group with weights has a q of 127 or -127, and a
  group without any has the peak 0. A dense weight therefore has exactly one such form, which is found from its values
  alone, and 16-bit dtypes lose nothing on the way back.
* In 16-bit dtypes, 50 % zeros and groups of 128 take 0.32 of the dense bytes; 2:4 as much.

Refused when packed: weights that are not of this form, which `quantise` brings them into; other dtypes; values that
are not finite. Refused when read: what the layout without int8 refuses, q = -128, and peaks that are negative or not
finite.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int8, Shaped
from torch import Tensor

from llmprune.errors import FormatError, PatternError
from llmprune.patterns import Pattern
from llmprune.storage.formats.bitmask import BitmaskLayout
from llmprune.storage.formats.layout import Layout, Spec, corrupt, slabs, to_row, total_bytes
from llmprune.storage.formats.nm import NMLayout

# Columns of a group where nothing else is asked for.
GROUP = 128

# Groups that are looked for in weights, the usual ones first; a row is tried after the first.
_USUAL_GROUPS = (GROUP, None, 256, 64, 32)

_HIGHEST = 127
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# A floating dtype of the same size, for layouts that move weights as bits: its zeros are those of 0 and -128.
_AS_FLOAT = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Int8Layout:
    """What both layouts share; `inner` stores the 8-bit numbers."""

    name: ClassVar[str]

    shape: tuple[int, int]

    @classmethod
    def fit(cls, weight: Shaped[Tensor, "out in"], pattern: Pattern, group: int = GROUP) -> Layout:
        raise NotImplementedError

    @property
    def inner(self) -> BitmaskLayout | NMLayout:
        """The layout of the 8-bit numbers."""
        raise NotImplementedError

    @property
    def columns(self) -> int:
        """Columns of a group."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Spec]:
        specs = self.inner.tensors()
        peaks = Spec((self.shape[0], -(-self.shape[1] // self.columns)))
        return {**specs, "values": Spec(specs["values"].shape, torch.int8), "peaks": peaks}

    def pack(self, weight: Shaped[Tensor, "out in"]) -> dict[str, Tensor]:
        if tuple(weight.shape) != self.shape:
            raise FormatError(
                f"a weight of shape {list(weight.shape)} for a {self.name} layout of {list(self.shape)}",
                expected="the shape that the layout was made for",
            )
        _require_dtype(weight.dtype)
        weight = weight.detach()
        numbers = torch.empty(self.shape, dtype=torch.int8, device=weight.device)
        peaks = weight.new_empty(self.tensors()["peaks"].shape)
        for rows in slabs(*self.shape):
            peaks[rows] = _peaks(weight[rows], self.columns)
            numbers[rows] = _numbers(weight[rows], peaks[rows], self.columns)
            if not torch.equal(_dense(numbers[rows], peaks[rows], self.columns), weight[rows]):
                raise PatternError(
                    f"a weight of {self.shape[0]} x {self.shape[1]} (out x in) in the layout {self.name}: it has "
                    f"values that 8 bits and a peak for each {self.columns} columns do not give",
                    expected="weights quantised by the same groups",
                    fix="quantise them first, or store them as nm or bitmask",
                )
        stored = self.inner.pack(numbers.view(_AS_FLOAT))
        return {**stored, "values": stored["values"].view(torch.int8), "peaks": peaks}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Shaped[Tensor, "out in"]:
        self.require(tensors)
        values, peaks = tensors["values"], tensors["peaks"]
        inner = {name: tensor for name, tensor in tensors.items() if name != "peaks"}
        numbers = self.inner.unpack({**inner, "values": values.view(_AS_FLOAT)}).view(torch.int8)
        dense = peaks.new_empty(self.shape)
        for rows in slabs(*self.shape):
            dense[rows] = _dense(numbers[rows], peaks[rows], self.columns)
        return dense

    def to_dict(self) -> dict[str, Any]:
        return to_row(self)

    def nbytes(self, itemsize: int) -> int:
        return total_bytes(self, itemsize)

    def require(self, tensors: Mapping[str, Tensor]) -> None:
        """Check all but the mask or the meta.

        Raises:
            FormatError: a tensor is missing, unexpected or of another kind; a number or a peak is out of range.
        """
        specs = self.tensors()
        if set(tensors) != set(specs):
            raise corrupt(self, f"tensors {sorted(tensors)}", f"exactly {sorted(specs)}")
        for suffix, spec in specs.items():
            tensor, allowed = tensors[suffix], (spec.dtype,) if spec.dtype else _DTYPES
            if tuple(tensor.shape) != spec.shape or tensor.dtype not in allowed:
                found = f"{suffix!r} has shape {list(tensor.shape)} and dtype {tensor.dtype}"
                raise corrupt(self, found, f"{list(spec.shape)}, {' or '.join(map(str, allowed))}")
        values, peaks = tensors["values"], tensors["peaks"]
        if values.is_meta:
            return
        if bool((values == -_HIGHEST - 1).any()):
            raise corrupt(self, f"'values' has {-_HIGHEST - 1}", f"-{_HIGHEST} to {_HIGHEST}")
        if not bool((torch.isfinite(peaks) & (peaks >= 0)).all()):
            raise corrupt(self, "'peaks' has a negative number or one that is not finite", "magnitudes")


@dataclass(frozen=True, slots=True)
class Int8BitmaskLayout(Int8Layout):
    """8-bit weights; zeros may be anywhere.

    Attributes:
        shape: (out, in) of the dense matrix.
        nonzeros: number of stored weights.
        group: columns that share a peak, 1 to max(1, in).
    """

    name: ClassVar[str] = "int8-bitmask"

    nonzeros: int
    group: int

    def __post_init__(self) -> None:
        BitmaskLayout(self.shape, self.nonzeros)
        _require_group(self.group, self.shape)

    @classmethod
    def fit(cls, weight: Shaped[Tensor, "out in"], pattern: Pattern, group: int = GROUP) -> "Int8BitmaskLayout":
        inner = BitmaskLayout.fit(weight, pattern)
        return cls(inner.shape, inner.nonzeros, _fitting(group, inner.shape))

    @property
    def inner(self) -> BitmaskLayout:
        return BitmaskLayout(self.shape, self.nonzeros)

    @property
    def columns(self) -> int:
        return self.group


@dataclass(frozen=True, slots=True)
class Int8NMLayout(Int8Layout):
    """8-bit weights; at most `keep` of every `of` consecutive ones along the input dimension are not zero.

    Attributes:
        shape: (out, in) of the dense matrix; `of` divides `in`.
        keep: number of weights stored per group of the pattern, 0 to `of`.
        of: length of a group of the pattern, 1 to 256.
        group: columns that share a peak, 1 to max(1, in).
    """

    name: ClassVar[str] = "int8-nm"

    keep: int
    of: int
    group: int

    def __post_init__(self) -> None:
        NMLayout(self.shape, self.keep, self.of)
        _require_group(self.group, self.shape)

    @classmethod
    def fit(cls, weight: Shaped[Tensor, "out in"], pattern: Pattern, group: int = GROUP) -> "Int8NMLayout":
        inner = NMLayout.fit(weight, pattern)
        return cls(inner.shape, inner.keep, inner.of, _fitting(group, inner.shape))

    @property
    def inner(self) -> NMLayout:
        return NMLayout(self.shape, self.keep, self.of)

    @property
    def columns(self) -> int:
        return self.group


def quantise(weight: Float[Tensor, "out in"], group: int = GROUP) -> Float[Tensor, "out in"]:
    """Round a weight [out, in] to 8-bit numbers with a peak for each group of columns in a row, its largest magnitude.

    Zeros stay zeros, and weights below 1/254 of their peak become zeros. The error of a weight is at most 1/254 of its
    peak, and the rounding to the dtype.

    Args:
        weight: bfloat16, float16 or float32; finite.
        group: columns that share a peak; at least 1.

    Raises:
        FormatError: another dtype, or a value that is not finite.
    """
    _require_dtype(weight.dtype)
    group = _fitting(group, (weight.shape[0], weight.shape[1]))
    peaks = _peaks(weight, group)
    return _dense(_numbers(weight, peaks, group), peaks, group)


def quantised_group(weight: Float[Tensor, "out in"]) -> int | None:
    """The columns that share a peak if a weight [out, in] is of the form that 8 bits store.

    They are 32, 64, 128, 256 or all; None if it is not of this form, or has other groups.
    """
    if weight.dtype not in _DTYPES or not weight.numel() or not bool(torch.isfinite(weight).all()):
        return None
    for group in dict.fromkeys(min(group or weight.shape[1], weight.shape[1]) for group in _USUAL_GROUPS):
        # Other weights fail in the first slab.
        if all(torch.equal(quantise(weight[rows], group), weight[rows]) for rows in _few_then_all(weight.shape[0])):
            return group
    return None


def _few_then_all(rows: int) -> list[slice]:
    return [slice(0, 1), slice(1, 16), *(slice(start, start + 1024) for start in range(16, rows, 1024))]


def _require_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise FormatError(f"8-bit weights of dtype {dtype}", expected=", ".join(map(str, _DTYPES)))


def _require_group(group: int, shape: tuple[int, int]) -> None:
    if not 1 <= group <= max(1, shape[1]):
        raise PatternError(f"groups of {group} of {shape[1]} columns", expected=f"1 to {max(1, shape[1])}")


def _fitting(group: int, shape: tuple[int, int]) -> int:
    return min(group, max(1, shape[1]))


def _peaks(weight: Shaped[Tensor, "rows in"], group: int) -> Shaped[Tensor, "rows groups"]:
    if not bool(torch.isfinite(weight).all()):
        raise FormatError("a weight with values that are not finite, in 8 bits", expected="finite values")
    parts = [part.abs().amax(1, keepdim=True) for part in weight.split(group, dim=1)] if weight.shape[1] else []
    return torch.cat(parts, 1) if parts else weight.new_empty(weight.shape[0], 0)


def _spread(peaks: Shaped[Tensor, "rows groups"], group: int, columns: int) -> Shaped[Tensor, "rows in"]:
    return peaks.repeat_interleave(group, dim=1)[:, :columns]


def _numbers(
    weight: Shaped[Tensor, "rows in"], peaks: Shaped[Tensor, "rows groups"], group: int
) -> Int8[Tensor, "rows in"]:
    whole = _spread(peaks, group, weight.shape[1]).double()
    shares = weight.double() * _HIGHEST / torch.where(whole > 0, whole, 1.0)
    return shares.round().to(torch.int8)


def _dense(
    numbers: Int8[Tensor, "rows in"], peaks: Shaped[Tensor, "rows groups"], group: int
) -> Shaped[Tensor, "rows in"]:
    whole = _spread(peaks, group, numbers.shape[1])
    if peaks.dtype == torch.float32:
        return (numbers.double() * whole.double() / _HIGHEST).float()
    return (numbers.float() * (whole.float() / _HIGHEST)).to(peaks.dtype)
