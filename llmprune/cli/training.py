"""`llmprune train`."""

from typing import Annotated, Any

import typer

from llmprune.cli import console, launching
from llmprune.cli.layout import OUTPUT, PRUNE, TEXT, WHAT, Overwrite, Resume, add
from llmprune.cli.options import AsJson, Device, Model, Quiet, explained, quieten
from llmprune.torchrun import follows

_EXAMPLES = """
Examples:

llmprune train org/model --recipe gradual-80 --text text.jsonl --output out/trained

llmprune train org/classifier --recipe movement-90 --text labelled.jsonl --output out/trained

llmprune train org/model --set method=sparsegpt --set schedule.kind=linear --text text.jsonl --dry-run
"""


def _option(name: str, metavar: str, help_text: str, panel: str, **bounds: Any) -> Any:
    return typer.Option(*name.split(), metavar=metavar, rich_help_panel=panel, help=help_text, **bounds)


def add_commands(app: typer.Typer) -> None:
    """Add the command."""
    add(app, train, PRUNE, _EXAMPLES)


def train(
    model: Model,
    recipe: Annotated[
        str | None,
        _option(
            "--recipe",
            "RECIPE",
            "A bundled recipe (see `llmprune recipes`), or a YAML file with a rule or a method, a schedule and the "
            "training. Default: magnitude, to half of the weights.",
            WHAT,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        _option("--set", "KEY=VALUE", "Change a key of the recipe, such as schedule.end=0.8; repeatable.", WHAT),
    ] = None,
    dataset: Annotated[
        str | None,
        _option(
            "--dataset --text",
            "TEXT",
            "Text to train on: a .txt, .jsonl or .parquet file, a folder or a dataset on the hub; for a classifier, "
            "a .jsonl or .csv file with text and label. Required.",
            TEXT,
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        _option("--num-samples", "N", "Sequences of it. Default: all, at most 8,192 of a text.", TEXT, min=1),
    ] = None,
    max_seq_length: Annotated[
        int | None, _option("--max-seq-length", "N", "Tokens in each sequence, also for evaluation.", TEXT, min=2)
    ] = None,
    eval_dataset: Annotated[
        str | None,
        _option("--eval-dataset", "TEXT", "Text, or labelled file, on which both models are measured.", TEXT),
    ] = None,
    output: Annotated[
        str | None, _option("--output -o", "DIR", "Folder for the pruned checkpoint. Required.", OUTPUT)
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only show the stages, time, memory and disk space; DIR is optional."),
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prune a causal LM or a classifier in stages, and train it in each.

    The report has the quality on held-back text after every stage. The state is saved there, and an interrupted run
    goes on from it; under torchrun, each process trains on its part of the text.
    """
    if dataset is None:
        raise typer.BadParameter("missing; it trains on text", param_hint="--text")
    if output is None and not dry_run:
        raise typer.BadParameter("missing; only --dry-run works without it", param_hint="--output")
    if resume and overwrite:
        raise typer.BadParameter("--resume continues the run in DIR, --overwrite replaces it: give only one of them")
    display = console.Display(quiet=quiet)
    written = None if dry_run else output
    with explained(
        as_json,
        lambda: launching.interrupted(display.where(), ["train", model], written, "from the last finished stage "),
    ):
        from llmprune.cli.tables.training import plan_table, training_table
        from llmprune.text.tokens import TextSpec
        from llmprune.training import train as room

        quieten(quiet)
        text = TextSpec(dataset, samples=num_samples, length=max_seq_length)
        measured = None if eval_dataset is None else TextSpec(eval_dataset, length=max_seq_length)
        changes = overrides or []
        result: Any
        if output is None or dry_run:
            with display.planning():
                result = room.plan_training(
                    model, text, recipe, overrides=changes, output=output, evaluation=measured, device=device or "auto",
                    resume=resume, overwrite=overwrite,
                )  # fmt: skip
            shown = plan_table(result)
        else:
            with display:
                result = room.train(
                    model, output, text, recipe, overrides=changes, evaluation=measured, device=device or "auto",
                    resume=resume, overwrite=overwrite, watch=display,
                )  # fmt: skip
            shown = training_table(result, output)
        if not follows():
            if as_json:
                console.show_json(result.to_dict())
            else:
                console.show(shown)
