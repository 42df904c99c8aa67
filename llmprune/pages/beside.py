"""What a run's folder holds besides its report: the checkpoint's size, lm-eval scores and `llmprune bench` results."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.errors import CheckpointError
from llmprune.measuring.bench.record import read_results
from llmprune.storage.files import INDEX_NAME, SINGLE_NAME, read_index, read_json
from llmprune.storage.packed_config import as_dense, packed_layouts

# The headline metric of a task: the first of these that it has.
_PRIMARY = ("acc_norm,none", "acc,none", "exact_match,none", "exact_match,strict-match", "exact_match,flexible-extract")

# Taken from each row of a comparison by `llmprune.measuring.tasks`.
_COMPARED = (
    "task", "metric", "filter", "value", "stderr", "dense_value", "dense_stderr", "delta", "delta_stderr", "verdict",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task.

    Attributes:
        value: as reported by lm-eval.
        deviation: its standard error; None if lm-eval reports none.
        higher_is_better: as the task says; None if it does not say.
    """

    value: float
    deviation: float | None
    higher_is_better: bool | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """lm-eval's results for one model.

    Attributes:
        file: the file's name.
        model: the model's name in lm-eval.
        dense: whether this is the dense model; for a file in lm-eval's own schema, its name must say so, as in
            evaluation-dense.json.
        tasks: task (with shots and documents if known) -> metric (with its filter) -> score.
        primary: task -> its headline metric; only tasks with an accuracy, and none that is part of another.
    """

    file: str
    model: str
    dense: bool
    tasks: Mapping[str, Mapping[str, Score]]
    primary: Mapping[str, str]

    def headline(self, task: str) -> float:
        """The headline value of a task."""
        return self.tasks[task][self.primary[task]].value


@dataclass(frozen=True, slots=True)
class Beside:
    """What was found in the folder of a report.

    Attributes:
        evaluations: of the pruned model, in the order of the files' names.
        dense: of the dense model.
        compared: rows of comparisons with the dense model, as written by `llmprune eval`.
        benches: device -> result of `llmprune bench`.
        notes: files that could not be read, and why.
    """

    evaluations: tuple[Evaluation, ...]
    dense: tuple[Evaluation, ...]
    compared: tuple[dict[str, Any], ...]
    benches: Mapping[str, dict[str, Any]]
    notes: tuple[str, ...]


def read_beside(folder: Path) -> Beside:
    """Read a folder's evaluation*.json and bench*.json; files that cannot be read become notes."""
    evaluations: list[Evaluation] = []
    compared: list[dict[str, Any]] = []
    benches: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for path in sorted(folder.glob("evaluation*.json")):
        try:
            content = read_json(path)
            if "results" in content:
                evaluations.append(_read_evaluation(path, content))
            else:
                evaluations += _read_comparison(path, content)
                compared += [{key: row[key] for key in _COMPARED} for row in content["rows"]]
        except (CheckpointError, KeyError, TypeError, AttributeError, ValueError) as error:
            notes.append(f"{path.name} is ignored: {_first_line(error)}")
    for path in sorted(folder.glob("bench*.json")):
        try:
            benches |= read_results(path)
        except CheckpointError as error:
            notes.append(f"{path.name} is ignored: {_first_line(error)}")
    ours = tuple(one for one in evaluations if not one.dense)
    return Beside(ours, tuple(one for one in evaluations if one.dense), tuple(compared), benches, tuple(notes))


def _read_comparison(path: Path, content: Mapping[str, Any]) -> list[Evaluation]:
    """What `llmprune eval` writes: the model's scores, and the dense model's if there is one."""
    models = [(content["model"], False, "value", "stderr")]
    if content["against"] is not None:
        models.append((content["against"], True, "dense_value", "dense_stderr"))
    parts = _parts(content, {row["task"] for row in content["rows"]})
    return [_side(path.name, content, parts, *model) for model in models]


def _side(
    file: str, content: Mapping[str, Any], parts: set[str], model: str, dense: bool, value: str, deviation: str
) -> Evaluation:
    tasks: dict[str, dict[str, Score]] = {}
    primary: dict[str, str] = {}
    shots = content["settings"]["num_fewshot"]
    for task in dict.fromkeys(row["task"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["task"] == task and row[value] is not None]
        scores = {
            f"{row['metric']},{row['filter']}": Score(row[value], row[deviation], row["higher_is_better"])
            for row in rows
        }
        if rows:
            name = task + _protocol(shots, rows[0]["documents"])
            _add(tasks, primary, name, scores, counts=task not in parts)
    return Evaluation(file, model, dense, tasks, primary)


def _add(
    tasks: dict[str, dict[str, Score]], primary: dict[str, str], name: str, scores: Mapping[str, Score], *, counts: bool
) -> None:
    """Add the scores of a task, which have lm-eval's keys, and its headline metric."""
    tasks[name] = {_readable(metric): score for metric, score in scores.items()}
    chosen = next((metric for metric in _PRIMARY if metric in scores), None)
    if chosen and counts:
        primary[name] = _readable(chosen)


def _parts(content: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """Tasks whose group is among the names too; counting both would count them twice."""
    groups = content.get("group_subtasks") or {}
    return {part for group, own in groups.items() if group in names for part in own}


def _read_evaluation(path: Path, content: Mapping[str, Any]) -> Evaluation:
    results = content["results"]
    parts = _parts(content, results)
    tasks: dict[str, dict[str, Score]] = {}
    primary: dict[str, str] = {}
    for task, values in results.items():
        scores = _scores(values, (content.get("higher_is_better") or {}).get(task) or {})
        shots = (content.get("n-shot") or {}).get(task)
        documents = ((content.get("n-samples") or {}).get(task) or {}).get("effective")
        _add(tasks, primary, task + _protocol(shots, documents), scores, counts=task not in parts)
    dense = path.stem.lower().endswith("dense")
    return Evaluation(path.name, _model(content), dense, tasks, primary)


def _scores(values: Mapping[str, Any], better: Mapping[str, Any]) -> dict[str, Score]:
    """Scores by lm-eval's "metric,filter" keys; standard errors have separate keys there."""
    found = {}
    for key, value in values.items():
        metric, comma, source = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        deviation = values.get(f"{metric}_stderr,{source}")
        known = float(deviation) if isinstance(deviation, int | float) else None  # lm-eval writes "N/A"
        found[key] = Score(float(value), known, better.get(metric))
    return found


def _protocol(shots: object, documents: object) -> str:
    """Shots and number of documents, if known: scores by different protocols must not be mixed."""
    words = [f"{shots}-shot"] if isinstance(shots, int) and shots else []
    words += [f"{documents:,} documents"] if isinstance(documents, int) else []
    return f" ({', '.join(words)})" if words else ""


def _model(content: Mapping[str, Any]) -> str:
    arguments = (content.get("config") or {}).get("model_args")
    if isinstance(arguments, dict):
        arguments = arguments.get("pretrained") or json.dumps(arguments)
    return str(content.get("model_name") or arguments or "unknown")


def _readable(metric: str) -> str:
    name, _, source = metric.partition(",")
    return name if source == "none" else f"{name} ({source})"


def _first_line(error: Exception) -> str:
    return error.what if isinstance(error, CheckpointError) else f"not in lm-eval's schema ({error!r})"


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, complete or not."""
    return any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))


def stored_bytes(folder: Path) -> int:
    """Bytes of the tensors as stored, which is what reports count: the files without their headers.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    return sum(tensor.nbytes for tensor in read_index(folder).values())


def count_parameters(folder: Path) -> int:
    """Number of elements of all tensors, counting packed matrices as the dense ones that they represent.

    Raises:
        CheckpointError: a file is missing or damaged.
        FormatError: a layout cannot be read.
    """
    tensors = as_dense(read_index(folder), packed_layouts(read_json(folder / "config.json")))
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
