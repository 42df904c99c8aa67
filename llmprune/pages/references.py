"""What runs are compared with: their dense model, and the pruned one that a recovery began with."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmprune.pages import labels
from llmprune.pages.beside import Beside, count_parameters, read_beside, stored_bytes
from llmprune.pages.run_row import RunRow, distance, figure, scores_of
from llmprune.storage.hub import checkpoint_digest, resolve_model
from llmprune.storage.report import Report

# What a run's row says of its speed and of tasks.
_UNTIMED: dict[str, Any] = {
    "prefill_speedup": None, "decode_speedup": None, "tokens_per_second": None, "speed_of": "", "scores": {},
    "score": None, "is_reference": True,
}  # fmt: skip


class _Dense(NamedTuple):
    """The dense model that a run was measured beside, as far as its report knows it."""

    name: str
    digest: str | None
    parameters: int | None
    nbytes: int | None

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> "_Dense":
        if recovery := header.get("recovery"):
            dense = recovery.get("dense") or {}
            return cls(
                str(recovery.get("teacher") or ""), *(dense.get(key) for key in ("source", "parameters", "nbytes"))
            )
        extent, size = (header.get("extent") or {}).get("dense"), header.get("size")
        parameters = extent["parameters"] if extent else header.get("parameters")
        nbytes = extent["nbytes"] if extent else size and size["dense_bytes"]
        return cls(str(header.get("model", "")), header.get("source"), parameters, nbytes)


def unrecovered(runs: Sequence[tuple[Path, Report, Beside]], rows: Sequence[RunRow]) -> list[RunRow]:
    """A row of the pruned model that each recovery began with, unless that was measured on the text by its own run."""
    known = {(row.text, Path(row.folder).resolve()) for row in rows}
    found: dict[tuple[str, str | None], RunRow] = {}
    for row, (_, report, _) in zip(rows, runs, strict=True):
        header, recovery = report.header, report.header.get("recovery") or {}
        if not recovery.get("perplexity") or (row.text, Path(row.model).resolve()) in known:
            continue
        before = dataclasses.replace(
            row,
            name=f"{Path(row.model).name}, before {row.name}",
            folder=row.model,
            model=_Dense.of(header).name,
            recipe=labels.short_recipe(recovery["pruned_by"]) if recovery.get("pruned_by") else "pruned",
            stored_bytes=(header.get("size") or {}).get("stored_bytes"),
            perplexity=figure(recovery["perplexity"]["pruned"]),
            **(distance(recovery["before"]) if recovery.get("before") else {}),
            **_UNTIMED,
        )
        found.setdefault((str(header["source"]), row.text), before)
    return list(found.values())


def references(
    against: str | Path, runs: Sequence[tuple[Path, Report, Beside]], rows: Sequence[RunRow]
) -> tuple[list[RunRow], list[str]]:
    """A row of the dense model for each text, and notes on what is unknown."""
    folder = resolve_model(against)
    digest = checkpoint_digest(folder)
    parameters = count_parameters(folder)
    own = [(report, beside) for _, report, beside in runs if _Dense.of(report.header).digest == digest]
    evaluations = [one for _, beside in own for one in beside.dense] or read_beside(folder).evaluations
    dense = RunRow(
        Path(str(against)).name,
        str(folder),
        str(against),
        "dense",
        parameters=parameters,
        nonzeros=parameters,
        stored_bytes=stored_bytes(folder),
        prefill_speedup=1.0,
        decode_speedup=1.0,
        scores=scores_of(evaluations),
        is_reference=True,
    )
    measured = {
        report.header["evaluation"]["dense"]["tokens_digest"]: report.dense_perplexity
        for report, _ in own
        if report.header.get("evaluation")
    }
    found = [
        dataclasses.replace(dense, text=text, perplexity=measured[text], kl_divergence=0.0, agreement=1.0)
        if text in measured
        else dataclasses.replace(dense, text=text)
        for text in dict.fromkeys(row.text for row in rows)
    ]
    notes = [] if own else [f"no run has measured {against}, so its perplexity is unknown"]
    return found, notes


def measured_references(reports: Iterable[Report]) -> list[RunRow]:
    """A row of the dense model of each run and text, from the runs' reports alone."""
    found: dict[tuple[str, str], RunRow] = {}
    for report in reports:
        if not (evaluation := report.header.get("evaluation")):
            continue
        dense, text = _Dense.of(report.header), evaluation["dense"]["tokens_digest"]
        row = RunRow(
            Path(dense.name).name,
            dense.name,
            dense.name,
            "dense",
            parameters=dense.parameters,
            nonzeros=dense.parameters,
            stored_bytes=dense.nbytes,
            text=text,
            perplexity=report.dense_perplexity,
            kl_divergence=0.0,
            agreement=1.0,
            prefill_speedup=1.0,
            decode_speedup=1.0,
            is_reference=True,
        )
        found.setdefault((dense.digest or dense.name, text), row)
    return list(found.values())
