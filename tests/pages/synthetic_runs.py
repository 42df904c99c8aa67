"""Runs that nobody made: reports of any size, and what lies beside them."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmprune.storage.report import MatrixRow, Report, StructureRow

KINDS = (
    *(f"self_attn.{letter}_proj" for letter in "qkvo"),
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
# Closes an element, opens another, and is a tag for plotly.
NASTY = "</script><script>alert(1)</script><b>&"


def row(layer: int, name: str, **changes: Any) -> MatrixRow:
    values: dict[str, Any] = {
        "layer": f"model.layers.{layer}", "name": f"model.layers.{layer}.{name}", "shape": (4, 10), "pattern": "0.5",
        "method": "sparsegpt", "zeros": 20, "error": 0.01 * (layer + 1), "damping": 0.01, "damping_tried": (0.01,),
        "tokens": 96, "prior_tokens": 0, "dead_inputs": 0, "seconds": 0.5, "peak_bytes": (layer + 3) * 1_000_000,
    }  # fmt: skip
    return MatrixRow(**{**values, **changes})


def structure(layer: int, kept: int, **changes: Any) -> StructureRow:
    values: dict[str, Any] = {
        "layer": f"model.layers.{layer}", "kind": "ffn", "consumer": f"model.layers.{layer}.mlp.down_proj",
        "groups": 64, "kept": kept, "method": "obs", "refit": True, "compensated": False, "error": 0.02,
        "damping": 0.01, "swaps": 3, "tokens": 96, "removed": tuple(range(64 - kept)), "seconds": 0.25,
    }  # fmt: skip
    return StructureRow(**{**values, **changes})


def perplexity(value: float | None, digest: str) -> dict[str, Any]:
    return {
        "perplexity": value, "nats": 3.0, "predicted_tokens": 8160, "samples": 32, "length": 256,
        "tokens_digest": digest, "text": {"source": "self"}, "calibration_error": 0.0125, "stride": 256,
    }  # fmt: skip


def header(**changes: Any) -> dict[str, Any]:
    digest = changes.pop("digest", "a" * 64)
    values: dict[str, Any] = {
        "model": "org/model",
        "finished": "2026-01-02T03:04:05+00:00",
        "recipe": {"description": "half of it", "pattern": "0.5", "method": {"sparsegpt": {"damping": 0.01}}},
        "tokens": {"calibration": "c" * 64, "evaluation": digest},
        "source": "d" * 64,
        "version": {"llmprune": "0.1.0", "torch": "2.13.0"},
        "device": "a CPU",
        "seconds": {"total": 10.0, "load": 1.0, "solve": 6.5, "write": 0.5},
        "memory": {"predicted_bytes": 9_000_000, "measured_bytes": 8_000_000, "baseline_bytes": 1_000_000},
        "size": {"stored_bytes": 4_000_000, "dense_bytes": 6_000_000},
        "evaluation": {
            "dense": perplexity(20.0, digest),
            "pruned": perplexity(25.0, digest),
            "kl_divergence": 0.125,
            "agreement": 0.8125,
        },
    }
    return {**values, **changes}


def recovered(model: str = "out/pruned", dense: str = "d" * 64, **changes: Any) -> dict[str, Any]:
    """A header of a run that recovered a pruned model, measured beside its dense one."""
    options = {"loss": "kl", "learning_rate": 1e-4, "epochs": 1.0, "adapter": "none", "rank": 16}
    recovery = {
        "teacher": "org/model", "dense": {"source": dense, "parameters": 9_000_000, "nbytes": 18_000_000},
        "options": options | changes.pop("options", {}), "sequences": 1, "length": 16, "steps": 1, "planned_steps": 1,
        "best_step": 1, "losses": [], "scores": [], "zeros": {"before": 140, "after": 140},
        "pruned_by": {"pattern": "2:4", "method": {"wanda": {}}},
        "perplexity": {"dense": 20.0, "pruned": 40.0, "recovered": 25.0},
        "before": {"kl_divergence": 0.5, "agreement": 0.5},
    } | changes.pop("recovery", {})  # fmt: skip
    text = {"source": "text.txt", "samples": 1, "length": 16, "seed": 0}
    found = header(model=model, source="e" * 64, recovery=recovery, texts={"training": text}, **changes)
    del found["recipe"]
    return found


def smaller(**changes: Any) -> dict[str, Any]:
    """A header of a run that removed structures."""
    shares = [
        {
            "layer": layer, "consumer": "mlp.down_proj.weight", "kind": "ffn", "groups": 64, "removed": 8 * layer,
            "uniform": 16, "levels": [0, 32], "sizes": [1.0, 0.5], "curve": [0.0, 0.1], "reference": 16,
            "divergence": 0.01 / (layer + 1), "error": 0.01,
        }
        for layer in range(4)
    ]  # fmt: skip
    budget = {"shares": shares, "error": 0.11, "bound": 0.1, "uniform_error": 0.15, "is_uniform": False}
    depth = {
        "method": "block-influence",
        "removed": [[2, "layer"]],
        "scores": [[0, "layer", 0.5], [1, "layer", None], [2, "layer", 0.1]],
        "steps": [],
    }
    width = {"score": "energy", "energy": {"model.layers.0.input_layernorm": 0.9, "model.norm": 0.95}}
    evidence = {"budget": budget, "depth": depth, "width": width, "oracle": {}}
    extent = {
        "layers": 4,
        "hidden_size": 256,
        "parameters": 8_000_000,
        "flops_per_token": 16_000_000,
        "nbytes": 16_000_000,
    }
    part = {
        "layers": 3,
        "hidden_size": 192,
        "parameters": 6_000_000,
        "flops_per_token": 12_000_000,
        "nbytes": 12_000_000,
    }
    speed = {"prefill_seconds": 0.02, "token_seconds": 0.006, "prefill_tokens": 256, "layers": 4}
    faster = {"prefill_seconds": 0.01, "token_seconds": 0.004, "prefill_tokens": 256, "layers": 3}
    return header(
        **{
            "decisions": {"evidence": evidence},
            "extent": {"dense": extent, "pruned": part},
            "speed": {"dense": speed, "pruned": faster},
            "recipe": {"structures": {"ffn": {"remove": None}, "budget": {"remove": 0.25}, "depth": {"remove": 1}}},
            **changes,
        }
    )


def report(layers: int = 3, **changes: Any) -> Report:
    return Report(tuple(row(layer, kind) for layer in range(layers) for kind in KINDS), header(**changes))


def large_report() -> Report:
    """80 layers with 7 matrices each; every fourth with 64 experts in the place of the MLP."""
    rows = []
    for layer in range(80):
        for kind in KINDS:
            experts = layer % 4 == 3 and kind.startswith("mlp.")
            names = [f"mlp.experts.{n}.{kind[4:]}" for n in range(64)] if experts else [kind]
            rows += [row(layer, name, error=0.001 * (number + 1) * (layer + 1)) for number, name in enumerate(names)]
    structures = tuple(structure(layer, 64 - layer % 32) for layer in range(80))
    return Report(tuple(rows), smaller(), structures)


def write_run(folder: Path, found: Report | None = None, weights: bool = True) -> Path:
    """An output folder: a report, and a checkpoint of 140 elements."""
    folder.mkdir(parents=True, exist_ok=True)
    (found or report()).save(folder)
    if weights:
        (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
        tensors = {"a.weight": torch.ones(10, 12), "b.weight": torch.ones(20)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def score(task: str, metric: str, value: float, dense: float | None, **changes: Any) -> dict[str, Any]:
    """A row as `llmprune eval` writes it."""
    paired = dense is not None
    return {
        "task": task, "metric": metric, "filter": "none", "documents": 100, "higher_is_better": True, "value": value,
        "stderr": 0.02, "dense_value": dense, "dense_stderr": 0.03 if paired else None,
        "delta": value - dense if dense is not None else None, "delta_stderr": 0.01 if paired else None,
        "test": "paired" if paired else None, "significant": paired or None, "verdict": "worse" if paired else "",
    } | changes  # fmt: skip


def write_evaluation(folder: Path, *rows: dict[str, Any], against: str | None = "dense", **more: Any) -> None:
    content = {"model": "pruned", "against": against, "settings": {"num_fewshot": None}, "rows": list(rows), **more}
    (folder / "evaluation.json").write_text(json.dumps(content))


def timing(median_us: float) -> dict[str, float]:
    return {"median_us": median_us, "low_us": median_us, "high_us": median_us, "repeats": 3, "share": 0.5}


def bench(device: str = "a GPU", **changes: Any) -> dict[str, Any]:
    """A result of `llmprune bench`: one product faster at one size and slower at another, one wrong, one unmeasured."""

    def batch(rate: float, first: float) -> dict[str, Any]:
        return {"batch": 1, "first_token": timing(first), "later_token": timing(1e6 / rate), "tokens_per_second": rate}

    def model(rate: float, first: float) -> dict[str, Any]:
        return {"resident_bytes": 10**7, "peak_bytes": 2 * 10**7, "batches": [batch(rate, first)]}

    comparisons = [
        {"tokens": 1, "correct": True, "error": 1e-3, "ratio": 1.5, "dense": timing(30), "sparse": timing(20)},
        {"tokens": 64, "correct": True, "error": 1e-3, "ratio": 0.8, "dense": timing(80), "sparse": timing(100)},
        {"tokens": 512, "correct": False, "error": "inf"},
    ]
    product = {
        "names": [["model.layers.0.mlp.up_proj"]], "shape": [64, 32], "served": "nm", "reason": "it is slower",
        "comparisons": comparisons,
    }  # fmt: skip
    other = {**product, "names": [["model.layers.0.mlp.down_proj"]], "comparisons": []}
    result = {
        "device": device,
        "finished": "2026-01-02T03:04:05Z",
        "products": [product, other],
        "whole_model": {**model(120.0, 500.0), "dense": {"model": "dense", **model(100.0, 1000.0)}},
    }
    return {**result, **changes}


def write_bench(folder: Path, *results: dict[str, Any]) -> None:
    devices = {result["device"]: result for result in results}
    (folder / "bench.json").write_text(json.dumps({"format": 2, "devices": devices}))


class Page(HTMLParser):
    """A page taken apart, strictly: every element has to be closed, in order."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            name = str(self.tags[-1][1].get("id"))
            self.scripts[name] = self.scripts.get(name, "") + data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """What a reader sees, in one line."""
        return " ".join(" ".join(self.words).split())

    @property
    def names(self) -> list[str]:
        """All ids."""
        return [str(attributes["id"]) for _, attributes in self.tags if "id" in attributes]

    @property
    def figures(self) -> dict[str, Any]:
        """What is drawn, by the ids of the places."""
        return dict(json.loads(self.scripts["figures"]))
