"""The model card of a checkpoint that was pruned while it trained: README.md with the Hub's metadata."""

from pathlib import Path

from llmprune.pages.cards import fenced, loading, plain, quality_table, repeated, save_card
from llmprune.pages.trained import trained_line
from llmprune.storage.report import Report
from llmprune.training.recipe import TrainRecipe


def write_card(folder: Path, recipe: TrainRecipe, report: Report) -> None:
    """Write README.md: what was pruned, how, and the effect on its quality.

    Args:
        folder: the pruned checkpoint.
        recipe: as it was run.
        report: of the training.
    """
    header = report.header
    model = str(header["model"])
    methods = sorted({name for row in report.rows for name in row.method.split(" + ")})
    body = [
        f"# {plain(Path(model).name)}, pruned while it trained",
        "",
        f"{plain(trained_line(report))} By llmprune {header['version']['llmprune']}.",
        loading(folder),
        "",
        *[line for note in report.notes for line in (plain(f"Note: {note}."), "")],
        *quality_table(report),
        "## How it was made",
        "",
        *fenced("yaml", recipe.to_yaml().rstrip()),
        "",
        "`report.json` has the quality after each stage, and a row for every matrix.",
        *repeated(header),
        "",
    ]
    save_card(folder, model, ["sparse", *methods], body)
