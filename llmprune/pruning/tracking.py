"""Experiment trackers: a run's figures in wandb, TensorBoard or MLflow, through accelerate's trackers."""

import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from llmprune.errors import MissingPackageError
from llmprune.models.boundary import one_line
from llmprune.pages.layers import cells
from llmprune.storage.report import Report

_PROJECT = "llmprune"


def require_tracker(name: str | None) -> None:
    """Refuse a run whose tracker is not installed, before it begins.

    Raises:
        MissingPackageError: it is not installed.
    """
    if name is not None and find_spec(name) is None:
        raise MissingPackageError.of(name, f"report_to: {name}")


def track(name: str | None, report: Report, folder: Path | None) -> str:
    """Log a finished run, if it can be logged: the result is complete, and a service that fails must not hide that.

    Args:
        name: of the tracker; None: nothing is logged.
        report: of the run.
        folder: the output, where TensorBoard's files go; None: the current folder.

    Returns:
        A sentence about what failed; empty if nothing did.
    """
    if name is None:
        return ""
    try:
        _log(name, report, folder)
    except Exception as error:  # noqa: BLE001 - whatever a service and its client raise must not end a finished run
        return f"the result is complete, but report_to: {name} failed: {one_line(error)}"
    return ""


def _log(name: str, report: Report, folder: Path | None) -> None:
    """Log a run: its recipe, what was measured of each layer, with the layer's number as step, and the totals.

    Args:
        name: of the tracker.
        report: of the run.
        folder: as for `track`.
    """
    PartialState()  # accelerate's trackers ask it for the main process
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    located = {"logging_dir": folder or Path()} if kind.requires_logging_directory and name == "tensorboard" else {}
    tracker: GeneralTracker = kind(_PROJECT, **located)
    tracker.start()
    tracker.store_init_configuration(dict(_settings(report)))
    steps: dict[int, dict[str, float]] = {}
    for cell in cells(report.rows):
        steps.setdefault(cell.layer, {}).update(
            {f"sparsity/{cell.kind}": cell.sparsity}
            | ({} if cell.error is None else {f"relative_output_error/{cell.kind}": cell.error})
        )
    for layer, values in sorted(steps.items()):
        tracker.log(values, step=layer)
    tracker.log(final_figures(report), step=max(steps, default=0))
    tracker.finish()


def final_figures(report: Report) -> dict[str, float]:
    """The totals of a run, as far as they were measured and are finite."""
    evaluation, size = report.header.get("evaluation") or {}, report.header.get("size") or {}
    figures: dict[str, Any] = {
        "final/sparsity": report.sparsity,
        "final/overall_sparsity": report.overall_sparsity,
        "final/mean_relative_output_error": report.mean_error,
        "final/dense_perplexity": report.dense_perplexity,
        "final/perplexity": report.pruned_perplexity,
        "final/kl_divergence": evaluation.get("kl_divergence"),
        "final/top1_agreement": evaluation.get("agreement"),
        "final/checkpoint_bytes": size.get("stored_bytes"),
        "final/seconds": (report.header.get("seconds") or {}).get("total"),
    }
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def _settings(report: Report) -> Iterator[tuple[str, str | float | int | bool]]:
    """The model and the recipe as flat names, which is what all trackers take."""
    yield "model", str(report.header.get("model", ""))
    yield from _flat(report.header.get("recipe") or {}, "")


def _flat(section: Mapping[str, Any], before: str) -> Iterator[tuple[str, str | float | int | bool]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif value is not None:
            yield f"{before}{key}", value if isinstance(value, str | float | int | bool) else str(value)
