"""The answer in one sentence: what a run did, how much worse the model is, and what to do next."""

import math
import shlex
from pathlib import Path

from llmprune.pages.labels import short_recipe, zeros_line
from llmprune.pages.recovered import recovered_line
from llmprune.pages.trained import trained_line
from llmprune.storage.report import Report
from llmprune.units import format_change

# Ratios of pruned to dense perplexity: below the first, the loss is small; above the second, it is large.
_SMALL, _LARGE = 1.1, 1.5

# A smaller change, in standard errors of the logarithm of the factor, may be chance.
_ERRORS = 2

# Methods that look at no input.
_SIMPLE_METHODS = ("random", "magnitude")


def headline(report: Report, folder: str = "DIR") -> str:
    """What was done, how much worse the model is, and what to do next.

    Args:
        report: of the run.
        folder: of its output, as commands name it.
    """
    if report.header.get("recovery"):
        return recovered_line(report.header)
    if report.header.get("training"):
        return trained_line(report)
    name = Path(str(report.header.get("model") or "The model")).name
    recipe = short_recipe(report.header.get("recipe") or {})
    removed = _removed(report)
    done = f"{name} was pruned ({recipe})" + (f": {removed}" if removed else "")
    return f"{done}; {_cost(report)}. Next: {_advice(report, folder)}."


def _removed(report: Report) -> str:
    parts = []
    if extent := report.header.get("extent"):
        share = extent["pruned"]["parameters"] / max(extent["dense"]["parameters"], 1)
        parts.append(f"{share:.1%} of the parameters are kept")
    if report.rows:
        parts.append(zeros_line(report))
    return " and ".join(parts)


def _cost(report: Report) -> str:
    dense, pruned = report.dense_perplexity, report.pruned_perplexity
    if dense is None or pruned is None:
        return "its perplexity was not measured"
    if not math.isfinite(pruned):
        return "its perplexity is infinite"
    verb = "rises" if pruned > dense else "falls" if pruned < dense else "stays"
    said = f"perplexity {verb}: {format_change(dense, pruned)}"
    error = (report.header.get("evaluation") or {}).get("change_stderr")
    if error and math.isfinite(dense) and abs(math.log(pruned / dense)) < _ERRORS * error:
        said += f", less than {_ERRORS} standard errors: this little text cannot tell it from no change"
    return said


def _advice(report: Report, folder: str) -> str:
    model = str(report.header.get("model") or "MODEL")
    compared = shlex.join([folder, "--against", model])
    dense, pruned = report.dense_perplexity, report.pruned_perplexity
    if dense is None or pruned is None:
        return f"measure it with `llmprune perplexity {compared} --text FILE`"
    ratio = pruned / dense if math.isfinite(pruned) and math.isfinite(dense) else math.inf
    if ratio > _LARGE:
        return _repair(report)
    if ratio > _SMALL:
        return f"check tasks with `llmprune eval {compared}`, and fine-tune to recover some of the loss"
    return f"check tasks with `llmprune eval {compared}`, then `llmprune pack` or quantise it"


def _repair(report: Report) -> str:
    """What makes a large loss smaller."""
    methods = {row.method for row in report.rows}
    if simple := sorted(methods.intersection(_SIMPLE_METHODS)):
        return f"use sparsegpt or wanda instead of {' and '.join(simple)}"
    measured = [row for row in report.rows if row.error is not None]
    worst = max(measured, key=lambda row: row.error or 0.0, default=None)
    exclude = f" (the largest relative output error is that of {worst.name})" if worst else ""
    return f"remove less, or exclude sensitive matrices{exclude}, or fine-tune to recover the loss"
