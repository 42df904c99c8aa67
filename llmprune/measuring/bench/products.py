"""The matmuls of a packed model, each compared with the dense matmul of the same matrix, once it is proved correct.

A product is what one launch computes: a packed layer, or layers that are fused because they read the same input. It is
always compared with a single dense matmul, although an ordinary model needs three for q, k and v: this favours dense.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmprune.kernels import cpu
from llmprune.measuring.bench.machine import Rates
from llmprune.serving import dense_product
from llmprune.serving.cpu_forms import MEASURED_WEIGHTS, CpuForm, CpuInt8
from llmprune.serving.quantizer import sparse_layers
from llmprune.serving.sparse_linear import SparseLinear
from llmprune.storage.formats import BitmaskLayout, BlockLayout, Int8BitmaskLayout, Layout
from llmprune.timing import Effort, Timing, time_calls

# Allowed in addition to twice the dense matmul's own error: the cost of rounding a sum once more, in eps.
_ROUNDINGS = 1.0


@dataclass(frozen=True)
class Product:
    """The products of a model that are equal for a benchmark.

    Attributes:
        names: the layers of each product; several if they are fused.
        layers: those of the first product.
        layouts: of all layers, by name.
    """

    names: tuple[tuple[str, ...], ...]
    layers: tuple[SparseLinear, ...]
    layouts: Mapping[str, Layout]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in); of fused layers together."""
        return sum(layer.out_features for layer in self.layers), self.layers[0].in_features

    @property
    def form(self) -> str:
        """The form in which it is served."""
        assert self.layers[0].choice is not None
        return self.layers[0].choice.form.name

    @property
    def dense_bytes(self) -> int:
        """Size of the dense matrix."""
        return self.shape[0] * self.shape[1] * self.layers[0].dtype.itemsize


@dataclass(frozen=True, slots=True)
class TimedProduct:
    """A sparse and a dense matmul with the same number of tokens.

    Attributes:
        tokens: rows of x.
        error: of the sparse matmul, ||y - exact|| / ||exact||, where exact is the dense matmul in float32.
        dense_error: of the dense matmul in the weights' dtype.
        dense: time of the dense matmul; None if the sparse one is wrong.
        sparse: time of the sparse matmul; None if it is wrong.
        floor: the minimum seconds of the sparse matmul for its bytes and operations at the measured rates.
        bound: which of the two limits it, "bytes" or "arithmetic".
        dense_floor: the minimum seconds of the dense matmul.
    """

    tokens: int
    error: float
    dense_error: float
    dense: Timing | None
    sparse: Timing | None
    floor: float
    bound: str
    dense_floor: float

    @property
    def ratio(self) -> float | None:
        """The speed-up over the dense matmul; None if the sparse one is wrong."""
        return self.dense.median / self.sparse.median if self.dense and self.sparse else None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        row: dict[str, Any] = {"tokens": self.tokens, "correct": self.ratio is not None, "bound": self.bound}
        # JSON has no NaN and no infinity.
        errors = {"error": self.error, "dense_error": self.dense_error}
        row |= {name: value if abs(value) < float("inf") else str(value) for name, value in errors.items()}
        if self.dense and self.sparse:
            row |= {"ratio": round(self.dense.median / self.sparse.median, 4)}
            for name, timing, floor in (
                ("dense", self.dense, self.dense_floor),
                ("sparse", self.sparse, self.floor),
            ):
                row[name] = {**timing.to_dict(), "share": round(floor / timing.median, 4)}
        return row


def packed_products(model: nn.Module) -> list[Product]:
    """The distinct products of a loaded model, in the model's order."""
    kinds: dict[object, Product] = {}
    for names, layers in _units(model):
        key = tuple((kind(layer.layout), layer.dtype, layer.bias is not None, layer.form) for layer in layers)
        layouts = {name: layer.layout for name, layer in zip(names, layers, strict=True)}
        known = kinds.get(key, Product((), layers, {}))
        kinds[key] = Product((*known.names, names), known.layers, {**known.layouts, **layouts})
    return list(kinds.values())


def kind(layout: Layout) -> tuple[object, ...]:
    """What makes matrices equal for a benchmark: layout, shape, and the fraction of stored weights to one percent."""
    row = layout.to_dict()
    stored = None
    if isinstance(layout, BlockLayout):
        rows, columns = layout.grid
        stored = round(row.pop("blocks") / max(1, rows * columns), 2)
    elif isinstance(layout, BitmaskLayout | Int8BitmaskLayout):
        stored = round(row.pop("nonzeros") / max(1, layout.shape[0] * layout.shape[1]), 2)
    return (*(str(value) for value in row.values()), stored)


def sparse_candidate(product: Product) -> tuple[SparseLinear, ...] | None:
    """The layers in a sparse form, even if the dense form serves them.

    Returns:
        The layers themselves, or copies in the first available sparse form if they are served dense; None if no kernel
        multiplies the layout on this device.
    """
    if product.form != "dense":
        return product.layers
    twins = tuple(_packed_twin(layer) for layer in product.layers)
    return None if any(twin.form is None or twin.form.name == "unpacked" for twin in twins) else twins


@torch.inference_mode()
def compare_product(
    layers: Sequence[SparseLinear], tokens: Sequence[int], rates: Rates, effort: Effort
) -> Iterator[TimedProduct]:
    """Compare layers that multiply the same x with the dense matmul of their matrices.

    Args:
        layers: settled in a sparse form; fused if there are several.
        tokens: numbers of rows of x.
        rates: of the device, for the floors.
        effort: for each timing.

    Yields:
        One comparison for each number of tokens. It has no times if the sparse matmul is wrong: its error exceeds twice
        the dense matmul's error plus one rounding.
    """
    weight, bias = dense_operands(layers)
    device, dtype = weight.device, weight.dtype
    served = served_bytes(layers)
    sparse = _copies(lambda: copy.deepcopy(list(layers)), list(layers), effort.copies(served, device))
    held = _as_served(layers, weight)
    dense = _copies(lambda: held.clone(), held, effort.copies(held.nbytes, device))
    if held is weight:
        dense_product.choose(dense)  # on a CPU: the fastest one, as a dense model is loaded
    for count in tokens:
        x = random_inputs(count, weight)
        exact = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        error = relative_error(torch.cat([layer(x) for layer in layers], dim=-1), exact)
        dense_error = relative_error(F.linear(x, weight, bias), exact)
        if any(isinstance(layer.form, CpuInt8) for layer in layers):
            dense_error = max(dense_error, CpuInt8.rounding)
        del exact
        times: tuple[Timing | None, Timing | None] = (None, None)
        if is_right(error, dense_error, dtype):
            times = (
                time_calls([_dense_call(w, bias, x) for w in dense], device, effort.seconds),
                time_calls([_sparse_call(some, x) for some in sparse], device, effort.seconds),
            )
        moved = (x.nbytes + count * weight.shape[0] * dtype.itemsize, 2.0 * count * weight.numel())
        floor, bound = rates.floor(moved[0] + served, moved[1] * _stored_share(layers))
        dense_floor, _ = rates.floor(moved[0] + held.nbytes, moved[1])
        yield TimedProduct(count, error, dense_error, *times, floor, bound, dense_floor)


def dense_operands(layers: Sequence[SparseLinear]) -> tuple[Tensor, Tensor | None]:
    """The dense matrices of several layers, stacked to [out, in], and their bias [out]."""
    weight = torch.cat([layer.unpack() for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weight, None
    return weight, torch.cat([
        weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers
    ])  # fmt: skip


def served_bytes(layers: Sequence[SparseLinear]) -> int:
    """The bytes of the layers' matrices in memory."""
    return sum(tensor.nbytes for layer in layers for tensor in layer.held.values())


def random_inputs(tokens: int, weight: Tensor) -> Tensor:
    """X [tokens, in] in the weights' dtype and on their device, the same in every call."""
    generator = torch.Generator(weight.device).manual_seed(tokens)
    return torch.randn(tokens, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """||ours - exact|| / ||exact||; NaN stays NaN."""
    tiny = torch.finfo(torch.float32).tiny
    return float((ours.float() - exact.float()).norm() / exact.float().norm().clamp_min(tiny))


def is_right(error: float, dense_error: float, dtype: torch.dtype) -> bool:
    """Whether a result is as close to the exact one as its dtype allows; NaN is wrong."""
    return error <= 2 * dense_error + _ROUNDINGS * torch.finfo(dtype).eps


def _units(model: nn.Module) -> Iterator[tuple[tuple[str, ...], tuple[SparseLinear, ...]]]:
    """The layers that one launch computes, with their names."""
    together: dict[int, list[tuple[str, SparseLinear]]] = {}
    for name, layer in sparse_layers(model):
        together.setdefault(id(layer.fusion or layer), []).append((name, layer))
    for unit in together.values():
        yield tuple(name for name, _ in unit), tuple(layer for _, layer in unit)


def _packed_twin(layer: SparseLinear) -> SparseLinear:
    twin = SparseLinear(layer.layout, bias=layer.bias is not None, dtype=layer.dtype, device=layer.device)
    twin.load_state_dict(layer.state_dict())
    twin.settle("packed")
    return twin


def _copies(another: Callable[[], Any], first: Any, count: int) -> list[Any]:
    return [first, *(another() for _ in range(count - 1))]


def _as_served(layers: Sequence[SparseLinear], weight: Tensor) -> Tensor:
    """The dense weight [out, in] as `load` would hold it: see `serving.halves`."""
    packed = [layer.held["packed"] for layer in layers if isinstance(layer.form, CpuForm)]
    if not packed or weight.dtype is not torch.float32 or weight.numel() < MEASURED_WEIGHTS:
        return weight
    stored = cpu.library().describe(packed[0]).stored
    # The dense model of matrices in 8 bits has 16.
    return weight.to(torch.bfloat16 if stored is torch.int8 else stored)


def _dense_call(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], object]:
    return lambda: dense_product.linear(x, weight, bias)


def _sparse_call(layers: Sequence[SparseLinear], x: Tensor) -> Callable[[], object]:
    return lambda: [layer(x) for layer in layers]


def _stored_share(layers: Sequence[SparseLinear]) -> float:
    """The fraction of the dense operations that is required: blocks that are not stored are skipped."""
    layouts = [layer.layout for layer in layers]
    dense = sum(layout.shape[0] * layout.shape[1] for layout in layouts)
    stored = sum(
        layout.blocks * layout.block**2 if isinstance(layout, BlockLayout) else layout.shape[0] * layout.shape[1]
        for layout in layouts
    )
    return stored / max(dense, 1)
