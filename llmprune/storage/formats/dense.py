"""`dense`: the weight unchanged, including its zeros.

Byte specification, for a weight [out, in].

    weight   [out, in]   the weights' dtype

The tensor is the weight itself, under its usual name: nothing is changed, not even the sign of a zero.

Refused when read: a wrong shape, or a dtype that is not floating-point.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Shaped
from torch import Tensor

from llmprune.patterns import Pattern
from llmprune.storage.formats.layout import Spec, packed_bits, to_row, total_bytes, weight_bits


@dataclass(frozen=True, slots=True)
class DenseLayout:
    """Every weight is stored.

    Attributes:
        shape: (out, in) of the matrix.
    """

    name: ClassVar[str] = "dense"

    shape: tuple[int, int]

    @classmethod
    def fit(cls, weight: Shaped[Tensor, "out in"], pattern: Pattern) -> "DenseLayout":
        rows, columns = weight.shape
        return cls((rows, columns))

    def tensors(self) -> dict[str, Spec]:
        return {"weight": Spec(self.shape)}

    def pack(self, weight: Shaped[Tensor, "out in"]) -> dict[str, Tensor]:
        return {"weight": weight_bits(self, weight).view(weight.dtype)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Shaped[Tensor, "out in"]:
        bits, dtype = packed_bits(self, tensors)
        return bits.view(dtype)

    def to_dict(self) -> dict[str, Any]:
        return to_row(self)

    def nbytes(self, itemsize: int) -> int:
        return total_bytes(self, itemsize)
