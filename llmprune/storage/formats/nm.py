"""`nm`: N of every M consecutive weights of a row are stored.

Byte specification, for a weight [out, in] and N:M (fields `keep` and `of`); M divides `in`, and M <= 256.

    values   [out, in * N / M]                    the weights' dtype
    meta     uint8 [out, ceil(in * N / M * b / 8)]    b = max(1, ceil(log2 M)) bits per stored weight

* `values` holds each row's stored weights from left to right.
* `meta` holds the index of each stored weight within its group, 0 to M - 1, as an unsigned number of b bits. The
  numbers of a row follow one another without gaps: number j takes bits j * b to j * b + b - 1, lowest bit first, and
  bit k of the row is bit k % 8 (counted from the lowest) of its byte k // 8. The bits after the last number are zero;
  each row starts a new byte.
* Within a group the indices are strictly ascending. A group with fewer than N non-zeros is padded with zeros at its
  lowest unused indices. -0.0 becomes 0.0.
* 2:4 takes two bits per weight, four indices per byte: (i0 | i1 << 2) of one group in the low half, that of the next
  group in the high half. That is 9/16 of the dense bytes in 16-bit dtypes.

Refused when read: a wrong shape or dtype, an index of M or more, indices that do not ascend, bits set after the last
number. Zeros may be stored at any index, and their sign is preserved.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int64, Integer, Shaped, UInt8
from torch import Tensor

from llmprune.errors import PatternError
from llmprune.patterns import NM, Pattern
from llmprune.storage.formats.layout import (
    Spec,
    clear_negative_zeros,
    corrupt,
    disobedient,
    from_bytes,
    nonzero,
    packed_bits,
    padded,
    slabs,
    to_bytes,
    to_row,
    total_bytes,
    weight_bits,
)

_LONGEST = 256


@dataclass(frozen=True, slots=True)
class NMLayout:
    """At most `keep` of every `of` consecutive weights along the input dimension are not zero.

    Attributes:
        shape: (out, in) of the dense matrix; `of` divides `in`.
        keep: number of weights stored per group, 0 to `of`.
        of: length of a group, 1 to 256.
    """

    name: ClassVar[str] = "nm"

    shape: tuple[int, int]
    keep: int
    of: int

    def __post_init__(self) -> None:
        pattern = NM(self.keep, self.of)
        if self.of > _LONGEST:
            raise PatternError(f"{pattern} in the layout nm", expected=f"groups of at most {_LONGEST}")
        pattern.check(self.shape)

    @classmethod
    def fit(cls, weight: Shaped[Tensor, "out in"], pattern: Pattern) -> "NMLayout":
        if not isinstance(pattern, NM):
            raise PatternError(f"pattern {pattern} in the layout nm", expected="N:M such as 2:4")
        rows, columns = weight.shape
        return cls((rows, columns), pattern.keep, pattern.of)

    @property
    def index_bits(self) -> int:
        """Bits per index within a group."""
        return max(1, (self.of - 1).bit_length())

    @property
    def row_values(self) -> int:
        """Number of weights stored per row."""
        return self.shape[1] // self.of * self.keep

    def tensors(self) -> dict[str, Spec]:
        rows = self.shape[0]
        meta_bytes = -(-self.row_values * self.index_bits // 8)
        return {"values": Spec((rows, self.row_values)), "meta": Spec((rows, meta_bytes), torch.uint8)}

    def pack(self, weight: Shaped[Tensor, "out in"]) -> dict[str, Tensor]:
        bits, specs = weight_bits(self, weight), self.tensors()
        values = bits.new_empty(specs["values"].shape)
        meta = torch.empty(specs["meta"].shape, dtype=torch.uint8, device=bits.device)
        for rows in slabs(*self.shape):
            values[rows], meta[rows] = self._pack_rows(bits[rows], rows.start)
        return {"values": values.view(weight.dtype), "meta": meta}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Shaped[Tensor, "out in"]:
        values, dtype = packed_bits(self, tensors)
        dense = values.new_zeros(self.shape)
        for rows in slabs(*self.shape):
            indices = self._indices(tensors["meta"][rows])
            groups = dense[rows].view(-1, self.of)  # a view: rows are contiguous
            groups.scatter_(1, indices, values[rows].view(indices.shape))
        return dense.view(dtype)

    def to_dict(self) -> dict[str, Any]:
        return to_row(self)

    def nbytes(self, itemsize: int) -> int:
        return total_bytes(self, itemsize)

    def _pack_rows(
        self, bits: Integer[Tensor, "rows in"], first: int
    ) -> tuple[Integer[Tensor, "rows values"], UInt8[Tensor, "rows bytes"]]:
        groups = bits.view(-1, self.of)
        mask = nonzero(groups)
        crowded = mask.sum(1, dtype=torch.int32) > self.keep
        if bool(crowded.any()):
            row, group = divmod(int(crowded.nonzero()[0]), self.shape[1] // self.of)
            where = f"row {first + row}, columns from {group * self.of}"
            raise disobedient(self, f"too many non-zeros in {where}", f"at most {self.keep} of every {self.of}")
        # Padded to the same count, the positions of all groups form a rectangle.
        indices = padded(mask, self.keep).nonzero()[:, 1].view(len(groups), self.keep)
        values = clear_negative_zeros(groups.gather(1, indices))
        places = torch.arange(self.index_bits, dtype=torch.uint8, device=bits.device)
        numbers = indices.to(torch.uint8).view(bits.shape[0], self.row_values, 1)
        return values.view(bits.shape[0], self.row_values), to_bytes(((numbers >> places) & 1).bool().flatten(1))

    def _indices(self, meta: UInt8[Tensor, "rows bytes"]) -> Int64[Tensor, "groups keep"]:
        bits = from_bytes(meta, self.row_values * self.index_bits)
        if bits is None:
            raise corrupt(self, "'meta' has bits set after the last index", "zeros there")
        indices = torch.zeros(bits.shape[0], self.row_values, dtype=torch.uint8, device=meta.device)
        for place in range(self.index_bits):
            indices |= bits[:, place :: self.index_bits].to(torch.uint8) << place
        groups = indices.view(bits.shape[0] * (self.shape[1] // self.of), self.keep)
        if indices.numel() and (highest := int(indices.amax())) >= self.of:
            raise corrupt(self, f"'meta' has an index of {highest}", f"0 to {self.of - 1}")
        if bool((groups[:, 1:] <= groups[:, :-1]).any()):
            raise corrupt(self, "'meta' has a group whose indices do not ascend", "each index once, in ascending order")
        return groups.long()
