"""The model card of a pruned checkpoint: README.md with the Hub's metadata."""

from pathlib import Path

from llmprune.pages.cards import fenced, loading, plain, quality_table, repeated, save_card
from llmprune.recipe.recipe import Recipe
from llmprune.storage.report import Report
from llmprune.units import quantity


def write_card(folder: Path, model: str, recipe: Recipe, report: Report) -> None:
    """Write README.md: what was pruned, how, and the effect on perplexity.

    Args:
        folder: the pruned checkpoint.
        model: the model that was pruned; a hub id becomes `base_model`, of a local folder only the name is used.
        recipe: as it was run.
        report: of the run.
    """
    methods = {row.method for row in report.rows} | {row.method for row in report.structures}
    tags = [*(["sparse"] if report.rows else []), *sorted(methods)]
    save_card(folder, model, tags, _body(folder, model, recipe, report))


def _body(folder: Path, model: str, recipe: Recipe, report: Report) -> list[str]:
    name = plain(Path(model).name)
    return [
        f"# {name}, pruned",
        "",
        f"{name}, {_what(report)}, one decoder layer at a time, by llmprune {report.header['version']['llmprune']}.",
        loading(folder),
        "",
        *([plain(dropped), ""] if (dropped := report.header.get("draft_head")) else []),
        *quality_table(report),
        "## How it was made",
        "",
        *fenced("yaml", recipe.to_yaml().rstrip()),
        "",
        "`report.json` has a row for every matrix.",
        *repeated(report.header | {"model": model}),
        "",
    ]


def _what(report: Report) -> str:
    """What was removed, in words."""
    parts = []
    extent = report.header.get("extent")
    if extent:
        parts += [f"with {left}" for left in report.left]
        share = extent["pruned"]["parameters"] / extent["dense"]["parameters"]
        parts.append(f"{share:.1%} of its parameters in total")
    if report.rows:
        matrices = quantity(len(report.rows), "matrix", "matrices")
        patterns = ", ".join(sorted({f"{row.pattern} by {row.method}" for row in report.rows}))
        parts.append(f"with {report.sparsity:.1%} of the weights of {matrices} set to zero ({patterns})")
    return ", ".join(parts)
