"""One run in figures that mean the same for all runs, from its report, its checkpoint and what lies beside them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmprune.measuring.perplexity import finite
from llmprune.pages import labels
from llmprune.pages.beside import Beside, Evaluation, count_parameters, has_weights, stored_bytes
from llmprune.storage.report import Report
from llmprune.units import format_size

# The columns of a table of runs, in the order of `cells`.
COLUMNS = (
    "run", "recipe", "sparsity", "parameters", "nonzero", "checkpoint size", "perplexity", "KL", "top-1 agreement",
    "prefill speed-up", "decode speed-up", "tasks",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run, or a reference that runs were measured beside. None: not measured or unknown.

    Attributes:
        name: short and unique within the comparison.
        folder: the checkpoint's folder.
        model: the model that was pruned.
        recipe: in a few words; "dense" for the dense reference.
        sparsity: fraction of zeros in the pruned matrices, in [0, 1].
        parameters: of the checkpoint, including zeros.
        nonzeros: parameters without the zeros made by pruning.
        stored_bytes: size of the tensors as stored.
        text: sha256 of the tokens that the next three figures were measured on.
        perplexity: may be infinite.
        kl_divergence: from the run's own dense model, in nats/token; may be infinite.
        agreement: top-1 agreement, the fraction of tokens for which both models predict the same next token.
        prefill_speedup: speed-up over the dense model in prefill.
        decode_speedup: speed-up over the dense model in decode.
        tokens_per_second: of the whole model, at the smallest batch size that was measured.
        speed_of: what was timed, and on which device.
        scores: lm-eval task -> its headline score, a fraction.
        score: mean of the scores over the tasks that all evaluated rows share.
        is_reference: whether it is no run, but the dense model, or a pruned one before a run that recovered it.
    """

    name: str
    folder: str
    model: str
    recipe: str
    sparsity: float | None = None
    parameters: int | None = None
    nonzeros: int | None = None
    stored_bytes: int | None = None
    text: str | None = None
    perplexity: float | None = None
    kl_divergence: float | None = None
    agreement: float | None = None
    prefill_speedup: float | None = None
    decode_speedup: float | None = None
    tokens_per_second: float | None = None
    speed_of: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None
    is_reference: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON. JSON has no infinity: an infinite figure is null although `text` is not."""
        numbers = {name: finite(value) for name in ("perplexity", "kl_divergence") if (value := getattr(self, name))}
        return {**dataclasses.asdict(self), "scores": dict(self.scores), **numbers}


def cells(row: RunRow) -> tuple[str, ...]:
    """The formatted cells of a row, empty where a figure is unknown."""
    return (
        row.name,
        row.recipe,
        _shown(row.sparsity, ".1%"),
        _count(row.parameters),
        _count(row.nonzeros),
        "" if row.stored_bytes is None else format_size(row.stored_bytes),
        "" if row.perplexity is None else labels.perplexity(row.perplexity),
        _shown(row.kl_divergence, ".4f"),
        _shown(row.agreement, ".1%"),
        _shown(row.prefill_speedup, ".2f", "x"),
        _shown(row.decode_speedup, ".2f", "x"),
        _shown(row.score, ".1%"),
    )


def run_row(name: str, folder: Path, report: Report, beside: Beside) -> RunRow:
    """The row of a run.

    Args:
        name: of it in the comparison.
        folder: its output.
        report: of it.
        beside: later measurements.
    """
    header = report.header
    measured: dict[str, Any] = {}
    if evaluation := header.get("evaluation"):
        measured = {"perplexity": report.pruned_perplexity, **distance(evaluation)}
    elif text := labels.measured_text(header):
        measured = {"perplexity": figure(text["perplexity"])}
    return RunRow(
        name,
        str(folder),
        str(header.get("model", "")),
        labels.short_run(header),
        text=text_of(header),
        sparsity=report.sparsity if report.rows else None,
        scores=scores_of(beside.evaluations),
        **_size(folder, report),
        **measured,
        **_speed(header, beside),
    )


def text_of(header: Mapping[str, Any]) -> str | None:
    """What identifies the text that a run's models were measured on."""
    measured = labels.measured_text(header)
    return None if measured is None else str(measured["tokens_digest"])


def figure(value: float | None) -> float:
    """A figure that was measured, as it is in a report: JSON has no infinity."""
    return math.inf if value is None else value


def distance(compared: Mapping[str, Any]) -> dict[str, Any]:
    """How far a model is from the dense one, of a report's entry that says so."""
    return {"kl_divergence": figure(compared["kl_divergence"]), "agreement": compared["agreement"]}


def _size(folder: Path, report: Report) -> dict[str, Any]:
    """From the checkpoint, or from the report if the weights are gone."""
    parameters: int | None
    stored: int | None
    if has_weights(folder):
        parameters, stored = count_parameters(folder), stored_bytes(folder)
    else:
        extent, size = report.header.get("extent"), report.header.get("size")
        parameters = extent and extent["pruned"]["parameters"]
        stored = size and size["stored_bytes"]
    zeros = sum(row.zeros for row in report.rows)
    nonzeros = None if parameters is None else parameters - zeros
    return {"parameters": parameters, "nonzeros": nonzeros, "stored_bytes": stored}


def _speed(header: Mapping[str, Any], beside: Beside) -> dict[str, Any]:
    """Of the whole model, from the latest bench against a dense one; else of the decoder layers, from the run."""
    benches = sorted(beside.benches.values(), key=lambda result: str(result["finished"]), reverse=True)
    for result in benches:
        model = result["whole_model"]
        row = min(model["batches"], key=lambda row: row["batch"])
        rate = {"tokens_per_second": row["tokens_per_second"]}
        if dense := model.get("dense"):
            other = next(other for other in dense["batches"] if other["batch"] == row["batch"])
            return {
                **rate,
                "prefill_speedup": other["first_token"]["median_us"] / row["first_token"]["median_us"],
                "decode_speedup": row["tokens_per_second"] / other["tokens_per_second"],
                "speed_of": f"whole model, batch {row['batch']}, {result['device']}",
            }
    if speed := header.get("speed"):
        ratios = {
            name: speed["dense"][key] / max(speed["pruned"][key], 1e-12)
            for name, key in (("prefill_speedup", "prefill_seconds"), ("decode_speedup", "token_seconds"))
        }
        return {**ratios, "speed_of": f"decoder layers, {header.get('device', '')}"}
    return {}


def scores_of(evaluations: Iterable[Evaluation]) -> dict[str, float]:
    """The headline scores of lm-eval by task."""
    return {task: one.headline(task) for one in evaluations for task in one.primary}


def _count(value: int | None) -> str:
    """A number of parameters, abbreviated; the JSON has all digits."""
    if value is None:
        return ""
    return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.2f} M"


def _shown(value: float | None, form: str, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{form}}{unit}" if math.isfinite(value) else "infinite"
