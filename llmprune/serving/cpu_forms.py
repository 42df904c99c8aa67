"""The forms of packed matrices that only a CPU serves, and what is measured before it does."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from llmprune.kernels import cpu
from llmprune.serving import dense_product
from llmprune.storage.formats import BitmaskLayout, Int8BitmaskLayout, Int8NMLayout, Layout, NMLayout

if TYPE_CHECKING:
    from llmprune.serving.forms import Served

# A bitmask that takes more of the dense bytes than this gains nothing (eval/bench/LOG.md): expanding costs time too.
BITMASK_BYTES = 0.75

NOT_A_CPU = "made for a CPU"
NOT_UNSTRUCTURED = "not stored as a bitmask"
NOT_TWO_OF_FOUR = "not 2:4"
NOT_INT8 = "not stored in 8 bits"

_BITS = {"bitmask": "mask", "nm": "meta"}

# Smaller matrices are not measured: calls are what they cost, whichever way.
MEASURED_WEIGHTS = 1 << 17

# So many matrices of a shape, or so many bytes, exceed every cache, or take long enough to read.
_ROTATED = 16
_CACHED_BYTES = 64 << 20

# Matrices that are multiplied together, and the rows of each.
Packed = tuple[list[Tensor], list[int]]


class CpuForm:
    """One tensor, packed by `llmprune.kernels.cpu`, which checks mask and meta. Stateless.

    The kernels are not compiled for each layer as those of a GPU are, and are tested when they are loaded.
    """

    name: ClassVar[str]
    tested: ClassVar[bool] = False
    kind: ClassVar[str]
    bits: ClassVar[str]

    def refusal(self, layout: Layout, device: torch.device, dtype: torch.dtype, served: "Served") -> str | None:
        """Why this form cannot serve the matrix on this device; None if it can."""
        if device.type != "cpu":
            return NOT_A_CPU
        if reason := self.misfit(layout):
            return reason
        if served == "dense":
            return "dense weights were requested"
        if dtype not in cpu.TYPES:
            return f"the CPU kernels support 16- and 32-bit floats, not {str(dtype).removeprefix('torch.')}"
        return (self.no_gain(layout, dtype) if served == "auto" else None) or cpu.unavailable()

    def misfit(self, layout: Layout) -> str | None:
        """Why the kernel does not know the layout; None if it does."""
        raise NotImplementedError

    def no_gain(self, layout: Layout, dtype: torch.dtype) -> str | None:
        """Why the dense matmul is faster; None if it is not."""
        return None

    def build(self, layout: Layout, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pack the tensors on disk.

        Raises:
            FormatError: they do not match the layout.
        """
        try:
            return {"packed": cpu.pack(self.kind, layout.shape, stored[self.bits], stored["values"])}
        except ValueError:
            layout.unpack(stored)  # says what is wrong with them
            raise

    def restore(self, layout: Layout, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on disk, bit for bit."""
        bits, values = cpu.unpack(held["packed"])
        return {"values": values, self.bits: bits}

    def multiply(self, layout: Layout, held: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """X [..., in] times the transposed matrix, plus the bias [out]: [..., out]."""
        return cpu.linear(x, [held["packed"]], bias, [layout.shape[0]])


class CpuBitmask(CpuForm):
    """Unstructured zeros: 0.5625 of the bytes at 50 % sparsity in 16-bit dtypes."""

    name: ClassVar[str] = "cpu-bitmask"
    kind: ClassVar[str] = "bitmask"
    bits: ClassVar[str] = "mask"

    def misfit(self, layout: Layout) -> str | None:
        return None if isinstance(layout, BitmaskLayout) else NOT_UNSTRUCTURED

    def no_gain(self, layout: Layout, dtype: torch.dtype) -> str | None:
        dense = layout.shape[0] * layout.shape[1] * dtype.itemsize
        if layout.nbytes(dtype.itemsize) <= BITMASK_BYTES * dense:
            return None
        return f"a CPU is faster with the dense matrix if a bitmask takes more than {BITMASK_BYTES:.0%} of its bytes"


class CpuNM(CpuForm):
    """2:4: 0.5625 of the bytes in 16-bit dtypes, and half of the products."""

    name: ClassVar[str] = "cpu-nm"
    kind: ClassVar[str] = "nm"
    bits: ClassVar[str] = "meta"

    def misfit(self, layout: Layout) -> str | None:
        return None if isinstance(layout, NMLayout) and (layout.keep, layout.of) == (2, 4) else NOT_TWO_OF_FOUR


class CpuInt8(CpuForm):
    """8-bit weights at any places or 2:4: 0.32 of the bytes at 50 % sparsity in 16-bit dtypes.

    Activations are rounded to 16 bits in groups of 128 columns: an error of at most 1/65534 of the largest of a group.
    """

    name: ClassVar[str] = "cpu-int8"
    rounding: ClassVar[float] = 2.0**-16

    def misfit(self, layout: Layout) -> str | None:
        if not isinstance(layout, Int8BitmaskLayout | Int8NMLayout):
            return NOT_INT8
        if isinstance(layout, Int8NMLayout) and (layout.keep, layout.of) != (2, 4):
            return NOT_TWO_OF_FOUR
        if layout.group % cpu.FOLD and layout.group < layout.shape[1]:
            return f"groups of {layout.group} columns, which are not a multiple of {cpu.FOLD}"
        return None

    def no_gain(self, layout: Layout, dtype: torch.dtype) -> str | None:
        return CpuBitmask().no_gain(layout, dtype)

    def build(self, layout: Layout, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(layout, Int8BitmaskLayout | Int8NMLayout)
        layout.require(stored)
        kind = "nm" if isinstance(layout, Int8NMLayout) else "bitmask"
        bits, values, peaks = stored[_BITS[kind]], stored["values"], stored["peaks"]
        try:
            return {"packed": cpu.pack(kind, layout.shape, bits, values, peaks, layout.group)}
        except ValueError:
            layout.unpack(stored)  # says what is wrong with them
            raise

    def restore(self, layout: Layout, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bits, values, peaks = cpu.unpack(held["packed"])
        return {"values": values, _BITS["nm" if isinstance(layout, Int8NMLayout) else "bitmask"]: bits, "peaks": peaks}


CPU_FORMS: tuple[CpuForm, ...] = (CpuBitmask(), CpuNM(), CpuInt8())


def measure_products(model: nn.Module) -> None:
    """Decide by measurement how the products of a settled model are computed on this CPU; at once if it was before.

    For packed matrices, from how many tokens on their dense rows are expanded; for dense ones, the LM head among them,
    which product multiplies one token. Ordinary linear layers become `DenseLinear`.
    """
    packed: dict[str, list[Packed]] = defaultdict(list)
    dense: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
    for matrices in _packed(model):
        if sum(matrix.numel() for matrix in matrices) >= MEASURED_WEIGHTS:
            sizes = _rows(matrices)
            packed[str(cpu.shape_key(matrices, sizes))].append((matrices, sizes))
    for weight in _dense(model):
        if weight.numel() >= MEASURED_WEIGHTS:
            dense[weight.shape, weight.dtype].append(weight)
    for products in packed.values():
        _measure_limit(products[:_ROTATED])
    for weights in dense.values():
        dense_product.choose(weights[:_ROTATED])
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.device.type == "cpu":
            layer.__class__ = dense_product.DenseLinear


def measure_alone(layer: nn.Module) -> None:
    """The same for one packed matrix of an engine that loads a layer at a time, with copies in place of its likes."""
    for matrices in _packed(layer):
        nbytes = sum(matrix.nbytes for matrix in matrices)
        if sum(matrix.numel() for matrix in matrices) < MEASURED_WEIGHTS or _known(matrices):
            continue
        copies = min(_ROTATED, -(-_CACHED_BYTES // nbytes))
        likes = [[matrix.clone() for matrix in matrices] for _ in range(copies - 1)]
        _measure_limit([(product, _rows(product)) for product in (matrices, *likes)])


def _rows(matrices: list[Tensor]) -> list[int]:
    return [cpu.library().describe(matrix).shape[0] for matrix in matrices]


def _known(matrices: list[Tensor]) -> bool:
    return cpu.measured_limit(matrices, _rows(matrices)) is not None


def _measure_limit(products: Sequence[Packed]) -> None:
    matrices, sizes = products[0]
    if cpu.measured_limit(matrices, sizes) is None:
        with contextlib.suppress(OSError):  # without a cache that can be written, it is kept in this process
            cpu.measure_dense_from([matrices for matrices, _ in products], sizes)


def _packed(model: nn.Module) -> Iterator[list[Tensor]]:
    """The packed matrices on a CPU, those that are multiplied together in one list."""
    seen: set[int] = set()
    for layer in model.modules():
        held = layer._parameters.get("packed")
        if held is None or held.device.type != "cpu":
            continue
        fusion = getattr(layer, "fusion", None)
        if fusion is None:
            yield [held]
        elif id(fusion) not in seen:
            seen.add(id(fusion))
            yield list(fusion.packed)


def _dense(model: nn.Module) -> Iterator[Tensor]:
    """The weights of linear layers on a CPU."""
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        is_linear = type(layer) in (nn.Linear, dense_product.DenseLinear) or hasattr(layer, "layout")
        # Weights of a library that quantises may be tensors of a type of its own, with products of their own.
        if is_linear and weight is not None and weight.device.type == "cpu" and type(weight.data) is Tensor:
            yield weight
