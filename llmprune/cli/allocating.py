"""`llmprune sensitivity`."""

from typing import Annotated

import typer

from llmprune.cli import console
from llmprune.cli.layout import MEASURE, OUTPUT, add
from llmprune.cli.options import AsJson, Device, Model, Quiet, explained, quieten

_EXAMPLES = """
Examples:

llmprune sensitivity testbed --output out/sensitivity

llmprune sensitivity org/model --output out --set calibration.source=text.jsonl --levels 0.5,0.7 --dry-run

llmprune prune org/model --output pruned --set "allocation={sensitivity: {file: out/sensitivity.json}}"
"""

# The group of its own options in the help.
_WHAT = "What to measure"


def add_commands(app: typer.Typer) -> None:
    """Add the command."""
    add(app, sensitivity, MEASURE, _EXAMPLES)


def sensitivity(
    model: Model,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            rich_help_panel=OUTPUT,
            help="Folder for sensitivity.json and its page. Required.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="RECIPE",
            rich_help_panel=_WHAT,
            help="Which matrices, which kind of pattern and which text; default: all, 0.5.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", rich_help_panel=_WHAT, help="Override a recipe key; may be repeated."
        ),
    ] = None,
    levels: Annotated[
        str, typer.Option(metavar="S,S,...", rich_help_panel=_WHAT, help="Sparsities to measure.")
    ] = "0.3,0.5,0.7,0.9",
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what it would cost; DIR is optional.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what pruning each kind of matrix in each layer alone does: error and KL divergence against sparsity.

    Writes the curves as JSON, which `allocation: {sensitivity: {file: ...}}` in a recipe reads, and as a page. The
    model is streamed one layer at a time and never modified; an interrupted scan leaves nothing behind.
    """
    if output is None and not dry_run:
        raise typer.BadParameter("missing; only --dry-run works without it", param_hint="--output")
    try:
        sparsities = [float(part) for part in levels.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{levels!r}: give numbers such as 0.3,0.5", param_hint="--levels") from None
    settings = [*(overrides or ()), *([f"device={device}"] if device else [])]
    with explained(as_json, lambda: "interrupted; nothing was written"):
        from llmprune.cli.tables.allocating import sensitivity_table
        from llmprune.pruning import sensitivity as scanning
        from llmprune.storage.folders import expanded

        quieten(quiet)
        chosen = scanning.DEFAULT_RECIPE if recipe is None else recipe
        display = console.Display(quiet=quiet)
        if output is None or dry_run:
            with display.planning():
                cost, sentence = scanning.forecast_sensitivity(model, chosen, levels=sparsities, overrides=settings)
            if as_json:
                console.show_json(scanning.to_plain(cost))
            else:
                console.show(sentence)
            return
        folder = expanded(output)
        with display:
            result = scanning.sensitivity(model, folder, chosen, levels=sparsities, overrides=settings, watch=display)
        if as_json:
            console.show_json(result)
        else:
            console.show(sensitivity_table(result), f"written to {folder / scanning.PAGE_NAME}")
