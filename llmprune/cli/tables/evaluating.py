"""What `llmprune eval` shows: a line for each score, and whether its difference is significant."""

from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from llmprune.cli.console import facts, new_table

if TYPE_CHECKING:
    from llmprune.measuring.tasks import EvaluationResult, ScoreRow

_TEST = (
    "stderr: standard error of delta, paired by document; significant if |delta| > 2 stderr (for perplexities: of "
    "log-perplexity)"
)
_UNPAIRED = "*: unpaired, because lm-eval reports no value per document for this score"
_UNKNOWN = "-: lm-eval reports no standard error for this score"


def evaluation_tables(result: "EvaluationResult") -> list[RenderableType]:
    """The scores; against a dense model also the differences and their standard errors."""
    parts: list[RenderableType] = [facts(*_run(result))]
    paired = result.against is not None
    columns = ("dense", "pruned", "delta", "stderr", "") if paired else ("score", "stderr")
    table = new_table("task", "n", *columns, left=(0, 6))
    for task, rows in groupby(result.rows, lambda row: row.task):
        table.add_row(Text(task, "bold"))
        for row in rows:
            numbers = _differences(row) if paired else (_number(row.value), _number(row.stderr))
            table.add_row(f"  {_metric(row)}", f"{row.documents:,}", *numbers)
    if not paired:
        return [*parts, table]
    tests = {row.test for row in result.rows}
    notes = [_TEST] + [_UNPAIRED] * ("unpaired" in tests) + [_UNKNOWN] * (None in tests)
    return [*parts, table, *(Text(note) for note in notes)]


def _differences(row: "ScoreRow") -> tuple[str, ...]:
    error = _number(row.delta_stderr) + "*" * (row.test == "unpaired")
    return _number(row.dense_value), _number(row.value), _number(row.delta, sign="+"), error, row.verdict


def _run(result: "EvaluationResult") -> list[tuple[str, str]]:
    settings, config = result.settings, result.results["config"]
    limit = "" if settings.limit is None else f", the first {settings.limit:g} of each task"
    rows = [
        ("model", result.model),
        ("dense", result.against or ""),
        ("harness", f"lm-eval {result.results['lm_eval_version']}{limit}"),
        ("computed", f"in {str(config['model_dtype']).removeprefix('torch.')}, batch size {settings.batch_size}"),
    ]
    return [row for row in rows if row[1]]


def _metric(row: "ScoreRow") -> str:
    return row.metric if row.filter == "none" else f"{row.metric} ({row.filter})"


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign},.1f}"
