"""The parts `linear` and `block` of the GPU bench: matmuls of the models' shapes against cuBLAS and other libraries."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from llmprune.eval.bench import peers
from llmprune.eval.bench.gpu_plan import Plan
from llmprune.measuring.bench.machine import Rates, measure_rates
from llmprune.measuring.bench.products import Product, compare_product, dense_operands, random_inputs
from llmprune.measuring.bench.tuning import tune_product
from llmprune.serving.sparse_linear import SparseLinear
from llmprune.storage.formats import BlockLayout, Layout, NMLayout

Row = dict[str, Any]

# The six ways to keep two of four, as i0 | i1 << 2.
_NIBBLES = [low | high << 2 for low in range(4) for high in range(low + 1, 4)]


def linear(plan: Plan) -> Iterator[Row]:
    """2:4 matmuls of every shape; a row for each."""
    rates = measure_rates(plan.device, torch.bfloat16, plan.effort)
    yield {"rates": rates.to_dict(), "cusparselt": peers.cusparselt_version()}
    for name, shape in plan.shapes.items():
        layout, stored = random_24(shape, plan.device)
        layer = build_layer(layout, stored, plan)
        rows: list[Row] = []
        if plan.tune:
            rows += [{"tuned": tuned.to_dict()} for tuned in tune_product(_product(name, layer), plan.effort)]
        yield {**_heading(name, layer), "comparisons": _compare(layer, plan.tokens, rates, plan), "tuning": rows}
        weight, _ = dense_operands([layer])
        del layer
        for tokens in plan.tokens:
            peer = peers.cusparselt(weight, random_inputs(tokens, weight), plan.effort)
            yield {"name": name, "peer": "cuSPARSELt", "tokens": tokens, **peer}


def block(plan: Plan) -> Iterator[Row]:
    """Block-sparse matmuls; a row for each shape, block size and sparsity, and one for each other library."""
    rates = measure_rates(plan.device, torch.bfloat16, plan.effort)
    yield {"rates": rates.to_dict()}
    for size in plan.blocks:
        for name in plan.block_shapes:
            for sparsity in plan.sparsities:
                for balanced in (True, False) if size == plan.uneven else (True,):
                    case = {"block": size, "sparsity": sparsity, "balanced": balanced}
                    yield from _block_rows(name, case, rates, plan)


def _block_rows(name: str, case: Row, rates: Rates, plan: Plan) -> Iterator[Row]:
    layout, stored = random_blocks(plan.shapes[name], case["block"], case["sparsity"], case["balanced"], plan.device)
    layer = build_layer(layout, stored, plan)
    tuning: list[Row] = []
    if plan.tune:
        tuning += [tuned.to_dict() for tuned in tune_product(_product(name, layer), plan.effort)]
    yield {
        **_heading(name, layer),
        **case,
        "comparisons": _compare(layer, plan.block_tokens, rates, plan),
        "tuning": tuning,
    }
    weight, _ = dense_operands([layer])
    bsr = _as_bsr(layout, stored)
    for tokens in plan.block_tokens:
        peer = peers.torch_blocks(bsr, weight, random_inputs(tokens, weight), plan.effort)
        yield {"name": name, **case, "peer": "torch.sparse._triton_ops", "tokens": tokens, **peer}


def build_layer(layout: Layout, stored: Mapping[str, Tensor], plan: Plan) -> SparseLinear:
    """A layer with packed tensors, in the form that a model on this device would use, self-tested."""
    layer = SparseLinear(layout, bias=False, dtype=torch.bfloat16, device=plan.device)
    layer.load_state_dict(dict(stored))
    # In a rehearsal a CPU would choose the dense form, and compare it with itself.
    layer.settle("packed" if plan.rehearsal else "auto")
    layer.test("random")
    return layer


def random_24(shape: tuple[int, int], device: torch.device) -> tuple[NMLayout, dict[str, Tensor]]:
    """Random bfloat16 weights of the layout `nm`, 2:4."""
    rows, columns = shape
    values = torch.randn(rows, columns // 2, device=device, dtype=torch.bfloat16) / columns**0.5
    table = torch.tensor(_NIBBLES, dtype=torch.uint8, device=device)
    low, high = table[torch.randint(len(_NIBBLES), (2, rows, columns // 8), device=device)]
    return NMLayout(shape, 2, 4), {"values": values, "meta": low | high << 4}


def random_blocks(
    shape: tuple[int, int], size: int, sparsity: float, balanced: bool, device: torch.device
) -> tuple[BlockLayout, dict[str, Tensor]]:
    """Random bfloat16 weights of the layout `block`: chosen row by row if balanced, otherwise anywhere."""
    rows, columns = shape[0] // size, shape[1] // size
    scores = torch.rand(rows, columns, device=device)
    per_row = max(1, round((1 - sparsity) * columns))
    ranks = scores.argsort(1).argsort(1) if balanced else scores.flatten().argsort().argsort().view(rows, columns)
    stored = ranks < (per_row if balanced else per_row * rows)
    crow = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    crow[1:] = stored.sum(1).cumsum(0)
    _, col = stored.nonzero(as_tuple=True)
    values = torch.randn(len(col), size, size, device=device, dtype=torch.bfloat16) / (per_row * size) ** 0.5
    return BlockLayout(shape, size, len(col), balanced), {"values": values, "crow": crow, "col": col.to(torch.int32)}


def _as_bsr(layout: BlockLayout, stored: Mapping[str, Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about BSR tensors being in beta
        return torch.sparse_bsr_tensor(
            stored["crow"], stored["col"], stored["values"], layout.shape, check_invariants=False
        )


def _compare(layer: SparseLinear, tokens: tuple[int, ...], rates: Rates, plan: Plan) -> list[Row]:
    return [row.to_dict() for row in compare_product([layer], tokens, rates, plan.effort)]


def _heading(name: str, layer: SparseLinear) -> Row:
    form = layer.form.name if layer.form else None
    return {"name": name, "shape": list(layer.layout.shape), "form": form, "layout": layer.layout.name}


def _product(name: str, layer: SparseLinear) -> Product:
    return Product(((name,),), (layer,), {name: layer.layout})


PARTS: dict[str, Callable[[Plan], Iterator[Row]]] = {"linear": linear, "block": block}
