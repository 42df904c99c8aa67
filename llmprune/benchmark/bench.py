"""Measure a checkpoint on this machine: each of its products, then the whole model, beside the dense one."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.benchmark.decoding import collect, measure_decoding, resident_bytes
from llmprune.benchmark.machine import Rates, commit, device_name, measure_rates, versions
from llmprune.benchmark.products import (
    Comparison,
    Product,
    compare_product,
    packed_products,
    served_bytes,
    sparse_candidate,
)
from llmprune.benchmark.reasons import why_not_faster
from llmprune.benchmark.tuning import Tuned, tune_product
from llmprune.checkpoint import listed
from llmprune.devices import resolve_device
from llmprune.errors import ModelError, NumericsError, RecipeError
from llmprune.extent import measure_stored
from llmprune.memory import PeakWatch
from llmprune.precision import dtype_name
from llmprune.progress import Progress, Watcher, ignore
from llmprune.repeats import Effort
from llmprune.skeleton import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Large batches of tokens take a CPU minutes and say nothing new.
_TOKENS = {"cuda": (1, 4, 16, 64, 512, 2048), "cpu": (1, 4, 16, 64, 256)}

Load = Callable[..., "PreTrainedModel"]


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What is measured.

    Attributes:
        device: auto, cpu, cuda or cuda:N.
        tokens: numbers of tokens in a product; None: those of decode and a prefill or two.
        batches: sequences at once in the whole model.
        prompt_tokens: of each sequence.
        tune: search kernel configurations first.
        effort: spent on each time of a product.
        decode_seconds: spent on each batch of the whole model.

    Raises:
        RecipeError: a number of tokens or sequences is not positive.
    """

    device: str = "auto"
    tokens: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1, 4, 16)
    prompt_tokens: int = 128
    tune: bool = False
    effort: Effort = field(default_factory=Effort)
    decode_seconds: float = 4.0

    def __post_init__(self) -> None:
        numbered = ("tokens", self.tokens), ("batches", self.batches), ("prompt_tokens", (self.prompt_tokens,))
        for name, numbers in numbered:
            if numbers is not None and (not numbers or min(numbers) < 1):
                raise RecipeError(f"{name} {list(numbers)}", expected="one or more numbers from 1 on")


def bench(
    folder: Path, settings: BenchSettings, against: str | Path | None = None, watch: Watcher = ignore
) -> dict[str, Any]:
    """Measure a checkpoint.

    Args:
        folder: a packed checkpoint; of any other the whole model is measured.
        settings: what is measured, and where.
        against: the dense model to compare the whole model with; None: the same checkpoint with its weights unpacked.
        watch: told about each step.

    Returns:
        Plain data, ready for JSON, as `llmprune bench --json` prints it.

    Raises:
        LlmpruneError: a checkpoint cannot be loaded, or the device is not there.
    """
    device = resolve_device(settings.device)
    load: Load = partial(_load, device)
    tuned = _tune(lambda: load(folder), settings, watch) if settings.tune and device.type == "cuda" else []
    model, ours = _measure_model(lambda: load(folder), device, settings, watch, "model")
    products = packed_products(model)
    result: dict[str, Any] = {
        "device": device_name(device),
        "finished": "",
        "versions": versions(),
        "commit": commit(),
        "model": str(folder),
        "dtype": dtype_name(model.dtype),
        "tuned": tuned,
        **measure_products(products, device, model.dtype, settings, watch),
    }
    del model, products
    collect(device)
    if against is not None or result["products"]:
        source = folder if against is None else against
        served = {"served": "dense"} if against is None else {}
        _, dense = _measure_model(lambda: load(source, **served), device, settings, watch, "dense model")
        ours = {
            **ours,
            "dense": {"model": str(source), **dense, "extent": measure_stored(source, unpacked=against is None)},
        }
    result["whole_model"] = {**ours, "extent": measure_stored(folder)}
    result["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return result


def measure_products(
    products: Sequence[Product], device: torch.device, dtype: torch.dtype, settings: BenchSettings, watch: Watcher
) -> dict[str, Any]:
    """Compare every product with its dense one: the keys "rates" and "products" of a result."""
    if not products:
        return {"rates": None, "products": []}
    watch(Progress("rates"))
    rates = measure_rates(device, dtype, settings.effort)
    tokens = settings.tokens or _TOKENS.get(device.type, _TOKENS["cpu"])
    rows = []
    for number, product in enumerate(products, 1):
        watch(Progress(f"product {number} of {len(products)}: {product.names[0][0]}"))
        rows.append(_measure_product(product, tokens, rates, settings.effort))
    return {"rates": rates.to_dict(), "products": rows}


def require_right(result: dict[str, Any]) -> None:
    """Raise `NumericsError` if a sparse product of a result was wrong, naming the layers."""
    wrong = [
        f"{product['names'][0][0]} with {row['tokens']} tokens (relative error {float(row['error']):.3g})"
        for product in result["products"]
        for row in product["comparisons"]
        if not row["correct"]
    ]
    if wrong:
        raise NumericsError(
            f"{len(wrong)} sparse products are wrong and were not timed: {listed(wrong)}",
            expected="an error of at most twice the dense product's",
            fix='serve the model with served="dense", and report the versions of torch, triton and the driver',
        )


def _load(device: torch.device, model: str | Path, **served: Any) -> "PreTrainedModel":
    """Load with CUDA graphs, or without where there are none or the model's cache cannot be recorded."""
    from llmprune import serving

    if device.type == "cuda":
        with contextlib.suppress(ModelError):
            return serving.load(model, device=str(device), graphs=True, **served)
    return serving.load(model, device=str(device), **served)


def _measure_product(product: Product, tokens: Sequence[int], rates: Rates, effort: Effort) -> dict[str, Any]:
    layers = sparse_candidate(product)
    comparisons: list[Comparison] = [] if layers is None else list(compare_product(layers, tokens, rates, effort))
    choice = product.layers[0].choice
    assert choice is not None
    measured = None if layers is None or layers[0].form is None else layers[0].form.name
    return {
        "names": [list(names) for names in product.names],
        "shape": list(product.shape),
        "layouts": {name: layout.to_dict() for name, layout in product.layouts.items()},
        "served": product.form,
        "measured": measured,
        "reason": why_not_faster(choice, product.layers[0].layout),
        "dense_bytes": product.dense_bytes,
        "measured_bytes": None if layers is None else served_bytes(layers),
        "comparisons": [row.to_dict() for row in comparisons],
    }


def _measure_model(
    load: Load, device: torch.device, settings: BenchSettings, watch: Watcher, stage: str
) -> tuple["PreTrainedModel", dict[str, Any]]:
    """Load a model and time it.

    The peak is what the device, or this process, holds more than before; on a CPU what libraries load first counts too.
    """
    collect(device)
    batches = []
    with PeakWatch(device) as memory:
        watch(Progress(f"loading the {stage}"))
        with quiet_transformers():
            model = load()
        for batch in settings.batches:
            watch(Progress(f"{stage}, batch of {batch}"))
            decoding = measure_decoding(model, batch, settings.decode_seconds, settings.prompt_tokens)
            batches.append(decoding.to_dict())
    return model, {
        "graphs": hasattr(model, "decode_graphs"),
        "resident_bytes": resident_bytes(model),
        "peak_bytes": memory.peak - memory.baseline,
        "batches": batches,
    }


def _tune(load: Load, settings: BenchSettings, watch: Watcher) -> list[dict[str, Any]]:
    with quiet_transformers():
        products = packed_products(load())
    outcomes: list[Tuned] = []
    for number, product in enumerate(products, 1):
        watch(Progress(f"tuning {number} of {len(products)}: {product.names[0][0]}"))
        outcomes += tune_product(product, settings.effort)
    return [outcome.to_dict() for outcome in outcomes]
