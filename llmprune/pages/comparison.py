"""Compare any number of runs in figures that mean the same for all of them.

Perplexities and KL divergences are comparable only if measured on the same tokens, so runs are grouped by these.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from llmprune.errors import CheckpointError, MissingPackageError
from llmprune.measuring.perplexity import finite
from llmprune.pages import labels
from llmprune.pages.beside import Beside, Evaluation, count_parameters, has_weights, read_beside, stored_bytes
from llmprune.pages.page import Table
from llmprune.paths import user_path
from llmprune.storage.hub import checkpoint_digest, resolve_model
from llmprune.storage.report import Report, load_report
from llmprune.units import format_size

# The columns of a table of runs, in the order of `cells`.
COLUMNS = (
    "run", "recipe", "sparsity", "parameters", "nonzero", "checkpoint size", "perplexity", "KL", "top-1 agreement",
    "prefill speed-up", "decode speed-up", "tasks",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run, or the dense reference. None: not measured or unknown.

    Attributes:
        name: short and unique within the comparison.
        folder: the checkpoint's folder.
        model: the model that was pruned.
        recipe: in a few words; "dense" for the reference.
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

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON. JSON has no infinity: an infinite figure is null although `text` is not."""
        numbers = {name: finite(value) for name in ("perplexity", "kl_divergence") if (value := getattr(self, name))}
        return {**dataclasses.asdict(self), "scores": dict(self.scores), **numbers}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison of runs.

    Attributes:
        rows: ordered by group, with the dense reference first in each.
        texts: sha256 of evaluation tokens -> description of the text.
        notes: what cannot be compared, and why.
    """

    rows: tuple[RunRow, ...]
    texts: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def runs(self) -> tuple[RunRow, ...]:
        """The rows without the dense reference."""
        return tuple(row for row in self.rows if row.recipe != "dense")

    @property
    def groups(self) -> dict[str | None, tuple[RunRow, ...]]:
        """Rows by the text that they were evaluated on; None for those without an evaluation."""
        found: dict[str | None, list[RunRow]] = {}
        for row in self.rows:
            found.setdefault(row.text, []).append(row)
        return {text: tuple(rows) for text, rows in found.items()}

    def title(self, text: str | None) -> str:
        """Description of the text that a group was evaluated on."""
        return "without an evaluation" if text is None else f"{self.texts[text]} (sha256 {text[:12]})"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        rows = [row.to_dict() for row in self.rows]
        return {"rows": rows, "texts": dict(self.texts), "notes": list(self.notes)}

    def to_frame(self) -> Any:
        """As a pandas data frame, with a column for each lm-eval task.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        try:
            frames = import_module("pandas")
        except ImportError as error:
            raise MissingPackageError.of("pandas", "a data frame") from error
        rows = [dataclasses.asdict(row) for row in self.rows]
        return frames.DataFrame([{**row, **row.pop("scores")} for row in rows])

    def _repr_html_(self) -> str:
        tables = [self.table(text).html() for text in self.groups]
        return "\n".join(tables)

    def table(self, text: str | None) -> Table:
        """One group as a table, without columns that would be empty."""
        found = [cells(row) for row in self.groups[text]]
        places = [place for place in range(len(COLUMNS)) if any(row[place] for row in found)]
        rows = tuple(tuple(row[place] for place in places) for row in found)
        return Table(tuple(COLUMNS[place] for place in places), rows, text=(0, 1), caption=self.title(text))


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


def compare(folders: Iterable[str | Path], against: str | Path | None = None) -> Comparison:
    """Compare runs.

    Args:
        folders: output folders of finished runs, packed ones too. Plain files among them are ignored.
        against: the dense base, as a hub id, a folder or "testbed": adds a row with its size, its scores, and its
            perplexity if one of the runs has measured that. None: a row of what the runs have measured of theirs.

    Raises:
        CheckpointError: there are no folders, a report is missing, or a checkpoint is damaged.
        ModelError: the dense model cannot be found.

    Example:
        >>> compare(["out/a", "out/b"], against="testbed").to_frame()  # doctest: +SKIP
    """
    # A shell's DIR/* also matches files, such as the record of a sweep.
    paths = [path for path in (user_path(folder, CheckpointError) for folder in folders) if not path.is_file()]
    if not paths:
        raise CheckpointError("no folders to compare", expected="the output folder of at least one run")
    runs = [(path, load_report(path), read_beside(path)) for path in paths]
    names = _names(paths)
    rows = [_row(name, *run) for name, run in zip(names, runs, strict=True)]
    notes = [f"{name}: {note}" for name, (_, _, beside) in zip(names, runs, strict=True) for note in beside.notes]
    if against is not None:
        dense, said = _references(against, runs, rows)
        rows = [*dense, *rows]
        notes += said
    else:
        rows = [*_measured_references(report for _, report, _ in runs), *rows]
    rows, said = _with_mean_scores(rows)
    texts = {
        evaluation["dense"]["tokens_digest"]: labels.text_line(evaluation["dense"])
        for _, report, _ in runs
        if (evaluation := report.header.get("evaluation"))
    }
    order = list(dict.fromkeys(row.text for row in rows))
    rows.sort(key=lambda row: order.index(row.text))
    return Comparison(tuple(rows), texts, (*_text_notes(order), *said, *_speed_notes(rows), *notes))


def _row(name: str, folder: Path, report: Report, beside: Beside) -> RunRow:
    header = report.header
    evaluation = header.get("evaluation")
    measured: dict[str, Any] = {}
    if evaluation:
        measured = {
            "text": evaluation["dense"]["tokens_digest"],
            "perplexity": report.pruned_perplexity,
            "kl_divergence": math.inf if evaluation["kl_divergence"] is None else evaluation["kl_divergence"],
            "agreement": evaluation["agreement"],
        }
    return RunRow(
        name,
        str(folder),
        str(header.get("model", "")),
        labels.short_recipe(header.get("recipe") or {}),
        sparsity=report.sparsity if report.rows else None,
        scores=_scores(beside.evaluations),
        **_size(folder, report),
        **measured,
        **_speed(header, beside),
    )


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


def _references(
    against: str | Path, runs: Sequence[tuple[Path, Report, Beside]], rows: Sequence[RunRow]
) -> tuple[list[RunRow], list[str]]:
    """A row of the dense model for each text, and notes on what is unknown."""
    folder = resolve_model(against)
    digest = checkpoint_digest(folder)
    parameters = count_parameters(folder)
    own = [(report, beside) for _, report, beside in runs if report.header.get("source") == digest]
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
        scores=_scores(evaluations),
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
    notes = [] if own else [f"none of the runs pruned {against}, so its perplexity is unknown"]
    return found, notes


def _measured_references(reports: Iterable[Report]) -> list[RunRow]:
    """A row of the dense model of each run and text, from the runs' reports alone."""
    found: dict[tuple[str, str], RunRow] = {}
    for report in reports:
        header = report.header
        if not (evaluation := header.get("evaluation")):
            continue
        extent, size, model = header.get("extent"), header.get("size"), str(header.get("model", ""))
        parameters = extent["dense"]["parameters"] if extent else header.get("parameters")
        text = evaluation["dense"]["tokens_digest"]
        row = RunRow(
            Path(model).name,
            model,
            model,
            "dense",
            parameters=parameters,
            nonzeros=parameters,
            stored_bytes=extent["dense"]["nbytes"] if extent else size and size["dense_bytes"],
            text=text,
            perplexity=report.dense_perplexity,
            kl_divergence=0.0,
            agreement=1.0,
            prefill_speedup=1.0,
            decode_speedup=1.0,
        )
        found.setdefault((str(header.get("source") or model), text), row)
    return list(found.values())


def _scores(evaluations: Iterable[Evaluation]) -> dict[str, float]:
    return {task: one.headline(task) for one in evaluations for task in one.primary}


def _with_mean_scores(rows: Sequence[RunRow]) -> tuple[list[RunRow], list[str]]:
    """Add the mean over the tasks that all evaluated rows share, so that it is comparable."""
    evaluated = [row for row in rows if row.scores]
    if not evaluated:
        return list(rows), []
    every = list(dict.fromkeys(task for row in evaluated for task in row.scores))
    shared = [task for task in every if all(task in row.scores for row in evaluated)]
    notes = [f"tasks: mean of {', '.join(shared)}"] if shared else ["the runs have no lm-eval task in common"]
    if others := [task for task in every if task not in shared]:
        notes.append(f"not in the mean, because some runs lack them: {', '.join(others)}")
    if not shared:
        return list(rows), notes
    return [
        dataclasses.replace(row, score=sum(row.scores[task] for task in shared) / len(shared)) if row.scores else row
        for row in rows
    ], notes


def _text_notes(texts: Sequence[str | None]) -> list[str]:
    if len([text for text in texts if text is not None]) < 2:
        return []
    return ["perplexities of different groups were measured on different tokens and are not comparable"]


def _speed_notes(rows: Iterable[RunRow]) -> list[str]:
    ways = list(dict.fromkeys(row.speed_of for row in rows if row.speed_of))
    if not ways:
        return []
    warning = ["speed-ups were measured in different ways and are hardly comparable"] if len(ways) > 1 else []
    return [*warning, *(f"speed-up of {way}" for way in ways)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    length = 1
    while len({part[-length:] for part in parts}) < len(set(parts)):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def _count(value: int | None) -> str:
    """A number of parameters, abbreviated; the JSON has all digits."""
    if value is None:
        return ""
    return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.2f} M"


def _shown(value: float | None, form: str, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{form}}{unit}" if math.isfinite(value) else "infinite"
