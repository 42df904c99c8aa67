"""Benchmark a checkpoint on this machine against dense weights: each of its matmuls, then the whole model."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.devices import free_bytes
from llmprune.errors import ModelError, NumericsError, RecipeError
from llmprune.measuring.bench.decoding import Decoding, collect, measure_decoding, resident_bytes
from llmprune.measuring.bench.machine import Rates, commit, device_name, measure_rates, versions
from llmprune.measuring.bench.products import (
    Product,
    TimedProduct,
    compare_product,
    packed_products,
    served_bytes,
    sparse_candidate,
)
from llmprune.measuring.bench.tuning import Tuned, tune_product
from llmprune.measuring.explain import why_not_faster
from llmprune.measuring.extent import measure_stored
from llmprune.models.skeleton import quiet_transformers
from llmprune.precision import dtype_name
from llmprune.progress import Progress, Watcher, ignore
from llmprune.serving.halves import computed_dtype
from llmprune.serving.placement import require_placement
from llmprune.storage.files import listed
from llmprune.timing import Effort

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Larger batches of tokens take minutes on a CPU without telling more.
_TOKENS = {"cuda": (1, 4, 16, 64, 512, 2048), "cpu": (1, 4, 16, 64, 256)}

# The fraction of the free memory that the dense model may take in addition to the other one.
_ROOM = 0.6

Load = Callable[..., "PreTrainedModel"]


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What is measured.

    Attributes:
        device: auto, cpu, cuda or cuda:N.
        tokens: numbers of tokens in a matmul; None: those of decode and of one or two prefills.
        batches: batch sizes for the whole model, in sequences.
        prompt_tokens: length of each sequence's prompt.
        dtype: of the weights, as for `llmprune.load`.
        tune: search kernel configurations first.
        effort: spent on each timing of a matmul.
        decode_seconds: spent on each batch size of the whole model.
        device_map: where the layers go, as for `llmprune.load`; None: all of them to `device`. With several GPUs, the
            memory measured while generating is that of the first.

    Raises:
        RecipeError: a number of tokens or sequences is not positive.
    """

    device: str = "auto"
    tokens: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1, 4, 16)
    prompt_tokens: int = 128
    dtype: str = "auto"
    tune: bool = False
    effort: Effort = field(default_factory=Effort)
    decode_seconds: float = 4.0
    device_map: str | None = None

    def __post_init__(self) -> None:
        numbered = ("tokens", self.tokens), ("batches", self.batches), ("prompt_tokens", (self.prompt_tokens,))
        for name, numbers in numbered:
            if numbers is not None and (not numbers or min(numbers) < 1):
                raise RecipeError(f"{name} {list(numbers)}", expected="one or more numbers of at least 1")


def bench(
    folder: Path, settings: BenchSettings, against: str | Path | None = None, watch: Watcher = ignore
) -> dict[str, Any]:
    """Benchmark a checkpoint.

    Args:
        folder: a packed checkpoint; for any other only the whole model is measured.
        settings: what is measured, and where.
        against: the dense model to compare the whole model with; None: the same checkpoint with its weights unpacked.
        watch: called for each step.

    Returns:
        Plain data, ready for JSON, as `llmprune bench --json` prints it.

    Raises:
        LlmpruneError: a checkpoint cannot be loaded, or the device does not exist.
    """
    device = require_placement(settings.device, settings.device_map)
    load: Load = partial(_load, device, settings)
    tuned = _tune(lambda: load(folder), settings, watch) if settings.tune and device.type == "cuda" else []
    models = [_loaded(lambda: load(folder), watch, "model")]
    products, dtype = packed_products(models[0]), computed_dtype(models[0])
    result: dict[str, Any] = {
        "device": device_name(device),
        "finished": "",
        "versions": versions(),
        "commit": commit(),
        "model": str(folder),
        "dtype": dtype_name(dtype),
        "tuned": tuned,
        **measure_products(products, device, dtype, settings, watch),
    }
    del products
    if against is not None or result["products"]:
        source = folder if against is None else against
        served = {"served": "dense"} if against is None else {}
        size = measure_stored(source, unpacked=against is None)
        ours, dense = _measure_both(models, lambda: load(source, **served), size["nbytes"], device, settings, watch)
        ours |= {"dense": {"model": str(source), **dense, "extent": size}}
    else:
        (ours,) = measure_models(models, settings, watch)
    result["whole_model"] = {**ours, "extent": measure_stored(folder)}
    result["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return result


def measure_products(
    products: Sequence[Product], device: torch.device, dtype: torch.dtype, settings: BenchSettings, watch: Watcher
) -> dict[str, Any]:
    """Compare every matmul with its dense counterpart: the keys "rates" and "products" of a result."""
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
    """Raise `NumericsError` if a sparse matmul of a result was wrong, naming the layers."""
    wrong = [
        f"{product['names'][0][0]} with {row['tokens']} tokens (relative error {float(row['error']):.3g})"
        for product in result["products"]
        for row in product["comparisons"]
        if not row["correct"]
    ]
    if wrong:
        raise NumericsError(
            f"{len(wrong)} sparse matmuls are wrong and were not timed: {listed(wrong)}",
            expected="an error of at most twice the dense matmul's",
            fix='serve the model with served="dense", and report the versions of torch, triton and the driver',
        )


def _load(device: torch.device, settings: BenchSettings, model: str | Path, **served: Any) -> "PreTrainedModel":
    """Load with CUDA graphs if there are any and the model's cache can be captured, otherwise without."""
    from llmprune.serving import loader

    if settings.device_map is not None:
        return loader.load(model, dtype=settings.dtype, device_map=settings.device_map, **served)
    if device.type == "cuda":
        with contextlib.suppress(ModelError):
            return loader.load(model, device=str(device), dtype=settings.dtype, graphs=True, **served)
    return loader.load(model, device=str(device), dtype=settings.dtype, **served)


def _measure_product(product: Product, tokens: Sequence[int], rates: Rates, effort: Effort) -> dict[str, Any]:
    layers = sparse_candidate(product)
    comparisons: list[TimedProduct] = [] if layers is None else list(compare_product(layers, tokens, rates, effort))
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


def measure_models(
    models: Sequence["PreTrainedModel"], settings: BenchSettings, watch: Watcher = ignore
) -> list[dict[str, Any]]:
    """Time whole models alternately; a model's peak memory is its resident memory plus the most that a run added."""
    batches: list[list[Decoding]] = []
    for batch in settings.batches:
        watch(Progress(f"whole model, batch of {batch}"))
        batches.append(measure_decoding(models, batch, settings.decode_seconds, settings.prompt_tokens))
    found = []
    for model, rows in zip(models, zip(*batches, strict=True), strict=True):
        resident = resident_bytes(model)
        found.append(
            {
                "graphs": hasattr(model, "decode_graphs"),
                "resident_bytes": resident,
                "peak_bytes": resident + max(row.working_bytes for row in rows),
                "batches": [row.to_dict() for row in rows],
            }
        )
    return found


def _measure_both(
    models: list["PreTrainedModel"], load: Load, nbytes: int, device: torch.device, settings: BenchSettings,
    watch: Watcher,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time the model in the list and the dense one: alternately if both fit into memory, else one after the other."""
    in_turn = nbytes < _ROOM * free_bytes(device)
    measured = []
    if not in_turn:
        measured = measure_models(models, settings, watch)
        models.clear()
        collect(device)
    models.append(_loaded(load, watch, "dense model"))
    measured += measure_models(models, settings, watch)
    ours, dense = measured
    return [{**ours, "in_turn": in_turn}, dense]


def _loaded(load: Load, watch: Watcher, name: str) -> "PreTrainedModel":
    watch(Progress(f"loading the {name}"))
    with quiet_transformers():
        return load()


def _tune(load: Load, settings: BenchSettings, watch: Watcher) -> list[dict[str, Any]]:
    with quiet_transformers():
        products = packed_products(load())
    outcomes: list[Tuned] = []
    for number, product in enumerate(products, 1):
        watch(Progress(f"tuning {number} of {len(products)}: {product.names[0][0]}"))
        outcomes += tune_product(product, settings.effort)
    return [outcome.to_dict() for outcome in outcomes]
