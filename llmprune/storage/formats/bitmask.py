"""`bitmask`: the non-zero weights, and one bit per weight that says whether it is stored.

Byte specification, for a weight [out, in] with `nonzeros` non-zero weights.

    values   [nonzeros]                     the weights' dtype
    mask     uint8 [out, ceil(in / 8)]

* Bit j % 8 (counted from the lowest) of mask[r, j // 8] is set if W[r, j] is stored. The bits after the last column are
  zero; each row starts a new byte.
* `values` holds the stored weights row by row, each row from left to right.
* 0.0 and -0.0 are not stored; both are read as 0.0.

Refused when read: a wrong shape or dtype, a number of set bits other than `nonzeros`, bits set after the last column. A
stored value may be zero.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from llmprune.errors import PatternError
from llmprune.patterns import Pattern
from llmprune.storage.formats.layout import (
    Spec,
    as_bits,
    corrupt,
    disobedient,
    from_bytes,
    nonzero,
    packed_bits,
    slabs,
    to_bytes,
    to_row,
    total_bytes,
    weight_bits,
)


@dataclass(frozen=True, slots=True)
class BitmaskLayout:
    """Zeros may be anywhere.

    Attributes:
        shape: (out, in) of the dense matrix.
        nonzeros: number of stored weights.
    """

    name: ClassVar[str] = "bitmask"

    shape: tuple[int, int]
    nonzeros: int

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if not 0 <= self.nonzeros <= rows * columns:
            raise PatternError(f"{self.nonzeros} stored weights of {rows} x {columns}", expected="at most all of them")

    @classmethod
    def fit(cls, weight: Shaped[Tensor, "out in"], pattern: Pattern) -> "BitmaskLayout":
        rows, columns = weight.shape
        bits = as_bits(weight)
        return cls((rows, columns), sum(int(nonzero(bits[part]).sum()) for part in slabs(rows, columns)))

    def tensors(self) -> dict[str, Spec]:
        rows, columns = self.shape
        return {"values": Spec((self.nonzeros,)), "mask": Spec((rows, -(-columns // 8)), torch.uint8)}

    def pack(self, weight: Shaped[Tensor, "out in"]) -> dict[str, Tensor]:
        bits, specs = weight_bits(self, weight), self.tensors()
        mask = torch.empty(specs["mask"].shape, dtype=torch.uint8, device=bits.device)
        values = [bits.new_empty(0)]
        for rows in slabs(*self.shape):
            stored = nonzero(bits[rows])
            mask[rows] = to_bytes(stored)
            values.append(bits[rows].masked_select(stored))
        found = torch.cat(values)
        if len(found) != self.nonzeros:
            raise disobedient(self, f"{len(found)} non-zeros", f"{self.nonzeros}")
        return {"values": found.view(weight.dtype), "mask": mask}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Shaped[Tensor, "out in"]:
        values, dtype = packed_bits(self, tensors)
        dense, first = values.new_zeros(self.shape), 0
        for rows in slabs(*self.shape):
            stored = from_bytes(tensors["mask"][rows], self.shape[1])
            if stored is None:
                raise corrupt(self, "'mask' has bits set after the last column", "zeros there")
            count = int(stored.sum())
            if first + count > self.nonzeros:
                break  # too many bits: refused below
            dense[rows].masked_scatter_(stored, values[first : first + count])
            first += count
        else:
            if first == self.nonzeros:
                return dense.view(dtype)
        raise corrupt(self, "the number of set bits in 'mask' is not that of 'values'", f"{self.nonzeros} set bits")

    def to_dict(self) -> dict[str, Any]:
        return to_row(self)

    def nbytes(self, itemsize: int) -> int:
        return total_bytes(self, itemsize)
