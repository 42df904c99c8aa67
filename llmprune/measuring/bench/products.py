"""The products of a packed model, each beside the dense product of the same matrix; correctness comes first.

A product is what one launch computes: a packed layer, or layers that are fused because they read the same input. The
dense product is always one product too, although an ordinary model makes three of q, k and v: the harder comparison.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmprune.measuring.bench.machine import Rates
from llmprune.serving.quantizer import sparse_layers
from llmprune.serving.sparse_linear import SparseLinear
from llmprune.storage.formats import BitmaskLayout, BlockLayout, Layout
from llmprune.timing import Effort, Timing, time_calls

# Beside twice the dense product's own error: what rounding a sum once more costs.
_ROUNDINGS = 1.0


@dataclass(frozen=True)
class Product:
    """Equal products of a model.

    Attributes:
        names: the layers of each of them; those of a fusion stand together.
        layers: those of the first.
        layouts: of all of them, by name.
    """

    names: tuple[tuple[str, ...], ...]
    layers: tuple[SparseLinear, ...]
    layouts: Mapping[str, Layout]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), of fused layers together."""
        return sum(layer.out_features for layer in self.layers), self.layers[0].in_features

    @property
    def form(self) -> str:
        """The form that serves it."""
        assert self.layers[0].choice is not None
        return self.layers[0].choice.form.name

    @property
    def dense_bytes(self) -> int:
        """Size of the dense matrix."""
        return self.shape[0] * self.shape[1] * self.layers[0].dtype.itemsize


@dataclass(frozen=True, slots=True)
class Comparison:
    """One product with so many tokens.

    Attributes:
        tokens: rows of x.
        error: of the sparse product, ||y - exact|| / ||exact||, where exact is the dense product in float32.
        dense_error: of the dense product in the weights' dtype.
        dense: its time; None where the sparse product is wrong.
        sparse: its time; None where it is wrong.
        floor: the least seconds of the sparse product for its bytes and operations at the measured rates.
        bound: which of them decides, "bytes" or "arithmetic".
        dense_floor: the same of the dense product.
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
        """How many times as fast as the dense product; None where the sparse one is wrong."""
        return self.dense.median / self.sparse.median if self.dense and self.sparse else None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        row: dict[str, Any] = {"tokens": self.tokens, "correct": self.ratio is not None, "bound": self.bound}
        # NaN and infinity are no JSON.
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
    """The distinct products of a loaded model, in its order."""
    kinds: dict[object, Product] = {}
    for names, layers in _units(model):
        key = tuple((kind(layer.layout), layer.dtype, layer.bias is not None, layer.form) for layer in layers)
        layouts = {name: layer.layout for name, layer in zip(names, layers, strict=True)}
        known = kinds.get(key, Product((), layers, {}))
        kinds[key] = Product((*known.names, names), known.layers, {**known.layouts, **layouts})
    return list(kinds.values())


def kind(layout: Layout) -> tuple[object, ...]:
    """What makes matrices equal for a bench: layout and shape, and the share of stored weights to one percent."""
    row = layout.to_dict()
    stored = None
    if isinstance(layout, BlockLayout):
        rows, columns = layout.grid
        stored = round(row.pop("blocks") / max(1, rows * columns), 2)
    elif isinstance(layout, BitmaskLayout):
        stored = round(row.pop("nonzeros") / max(1, layout.shape[0] * layout.shape[1]), 2)
    return (*(str(value) for value in row.values()), stored)


def sparse_candidate(product: Product) -> tuple[SparseLinear, ...] | None:
    """The layers as something sparse would serve them.

    Returns:
        The layers themselves, or copies in the first sparse form there is where the dense one serves them; None if no
        kernel multiplies the layout here.
    """
    if product.form != "dense":
        return product.layers
    twins = tuple(_packed_twin(layer) for layer in product.layers)
    return None if any(twin.form is None or twin.form.name == "unpacked" for twin in twins) else twins


@torch.inference_mode()
def compare_product(
    layers: Sequence[SparseLinear], tokens: Sequence[int], rates: Rates, effort: Effort
) -> Iterator[Comparison]:
    """Compare layers that multiply the same x with the dense product of their matrices.

    Args:
        layers: settled in a sparse form; fused if there are several.
        tokens: numbers of rows of x.
        rates: of the device, for the shares.
        effort: for each of the times.

    Yields:
        One comparison for each number of tokens. It has no times if the sparse product is wrong: further from the exact
        one than twice the dense product's error and a rounding.
    """
    weight, bias = dense_operands(layers)
    device, dtype = weight.device, weight.dtype
    served = served_bytes(layers)
    sparse = _copies(lambda: copy.deepcopy(list(layers)), list(layers), effort.copies(served, device))
    dense = _copies(lambda: weight.clone(), weight, effort.copies(weight.nbytes, device))
    for count in tokens:
        x = random_inputs(count, weight)
        exact = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        error = relative_error(torch.cat([layer(x) for layer in layers], dim=-1), exact)
        dense_error = relative_error(F.linear(x, weight, bias), exact)
        del exact
        times: tuple[Timing | None, Timing | None] = (None, None)
        if is_right(error, dense_error, dtype):
            times = (
                time_calls([_dense_call(w, bias, x) for w in dense], device, effort.seconds),
                time_calls([_sparse_call(some, x) for some in sparse], device, effort.seconds),
            )
        moved = (x.nbytes + count * weight.shape[0] * dtype.itemsize, 2.0 * count * weight.numel())
        floor, bound = rates.floor(moved[0] + served, moved[1] * _stored_share(layers))
        dense_floor, _ = rates.floor(moved[0] + weight.nbytes, moved[1])
        yield Comparison(count, error, dense_error, *times, floor, bound, dense_floor)


def dense_operands(layers: Sequence[SparseLinear]) -> tuple[Tensor, Tensor | None]:
    """The dense matrix of several layers one above the other, [out, in], and their bias [out]."""
    weight = torch.cat([layer.unpack() for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weight, None
    return weight, torch.cat([
        weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers
    ])  # fmt: skip


def served_bytes(layers: Sequence[SparseLinear]) -> int:
    """What the layers hold of their matrices in memory."""
    return sum(tensor.nbytes for layer in layers for tensor in layer.held.values())


def random_inputs(tokens: int, weight: Tensor) -> Tensor:
    """X [tokens, in] of the weights' dtype and device, the same at every call."""
    generator = torch.Generator(weight.device).manual_seed(tokens)
    return torch.randn(tokens, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """||ours - exact|| / ||exact||; NaN stays NaN."""
    tiny = torch.finfo(torch.float32).tiny
    return float((ours.float() - exact.float()).norm() / exact.float().norm().clamp_min(tiny))


def is_right(error: float, dense_error: float, dtype: torch.dtype) -> bool:
    """Whether a result is as near to the exact one as its dtype allows; NaN is wrong."""
    return error <= 2 * dense_error + _ROUNDINGS * torch.finfo(dtype).eps


def _units(model: nn.Module) -> Iterator[tuple[tuple[str, ...], tuple[SparseLinear, ...]]]:
    """The layers that one launch computes, by name."""
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


def _dense_call(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], object]:
    return lambda: F.linear(x, weight, bias)


def _sparse_call(layers: Sequence[SparseLinear], x: Tensor) -> Callable[[], object]:
    return lambda: [layer(x) for layer in layers]


def _stored_share(layers: Sequence[SparseLinear]) -> float:
    """The share of the dense operations that must be done: blocks that are not stored are left out."""
    layouts = [layer.layout for layer in layers]
    dense = sum(layout.shape[0] * layout.shape[1] for layout in layouts)
    stored = sum(
        layout.blocks * layout.block**2 if isinstance(layout, BlockLayout) else layout.shape[0] * layout.shape[1]
        for layout in layouts
    )
    return stored / max(dense, 1)
