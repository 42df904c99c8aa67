"""What `llmprune eval` shows: a line for each score, and what may be said about each difference."""

from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from llmprune.cli.console import facts, new_table

if TYPE_CHECKING:
    from llmprune.measuring.tasks import EvaluationResult, ScoreRow

_TEST = (
    "error: standard error of delta, paired by document, as both models answer the same questions; a difference counts "
    "if it exceeds two of them, of perplexities by their logarithms"
)
_UNPAIRED = "*: of two errors as if independent, as lm-eval gives this score no value for each document"
_UNKNOWN = "-: lm-eval gives no error of this score"


def evaluation_tables(result: "EvaluationResult") -> list[RenderableType]:
    """The scores; beside the dense model's, the differences with their standard errors."""
    parts: list[RenderableType] = [facts(*_run(result))]
    beside = result.against is not None
    columns = ("dense", "score", "delta", "error", "") if beside else ("score", "error")
    table = new_table("task", "n", *columns, left=(0, 6))
    for task, rows in groupby(result.rows, lambda row: row.task):
        table.add_row(Text(task, "bold"))
        for row in rows:
            numbers = _beside(row) if beside else (_number(row.value), _number(row.stderr))
            table.add_row(f"  {_metric(row)}", f"{row.documents:,}", *numbers)
    if not beside:
        return [*parts, table]
    tests = {row.test for row in result.rows}
    notes = [_TEST] + [_UNPAIRED] * ("unpaired" in tests) + [_UNKNOWN] * (None in tests)
    return [*parts, table, *(Text(note) for note in notes)]


def _beside(row: "ScoreRow") -> tuple[str, ...]:
    error = _number(row.delta_stderr) + "*" * (row.test == "unpaired")
    return _number(row.dense_value), _number(row.value), _number(row.delta, sign="+"), error, row.verdict


def _run(result: "EvaluationResult") -> list[tuple[str, str]]:
    settings, config = result.settings, result.results["config"]
    limit = "" if settings.limit is None else f", the first {settings.limit:g} of each task"
    rows = [
        ("model", result.model),
        ("dense", result.against or ""),
        ("harness", f"lm-eval {result.results['lm_eval_version']}{limit}"),
        ("computed", f"in {str(config['model_dtype']).removeprefix('torch.')}, {settings.batch_size} in a batch"),
    ]
    return [row for row in rows if row[1]]


def _metric(row: "ScoreRow") -> str:
    return row.metric if row.filter == "none" else f"{row.metric} ({row.filter})"


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign},.1f}"
