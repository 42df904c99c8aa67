"""`llmprune prune` and `llmprune recipes`."""

import shlex
from enum import Enum
from typing import Annotated

import typer

from llmprune import torchrun
from llmprune.cli import console, launching, uploading
from llmprune.cli.layout import OUTPUT, PRUNE, WHAT, Overwrite, Resume, add
from llmprune.cli.options import AsJson, Device, Model, Quiet, explained, quieten
from llmprune.cli.shortcuts import (
    Dataset,
    EvalDataset,
    Length,
    MethodFlag,
    PatternFlag,
    RecipeName,
    Samples,
    SparsityFlag,
    Wanted,
)
from llmprune.cli.uploading import PushToHub

_PRUNE_EXAMPLES = """
Examples:

llmprune prune testbed --recipe demo --output out/demo

llmprune prune org/model --output out

llmprune prune org/model --sparsity 0.5 --dataset text.jsonl --output out

llmprune prune org/model --recipe wanda-50 --set batch_size=4 --output out --dry-run
"""


class StoredFormat(str, Enum):
    """How pruned matrices are stored."""

    dense = "dense"
    auto = "auto"
    nm = "nm"
    block = "block"
    bitmask = "bitmask"


def add_commands(app: typer.Typer) -> None:
    """Add both commands."""
    add(app, prune, PRUNE, _PRUNE_EXAMPLES)
    add(app, recipes, PRUNE)


def prune(
    model: Model,
    recipe: RecipeName = None,
    pattern: PatternFlag = None,
    sparsity: SparsityFlag = None,
    method: MethodFlag = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", rich_help_panel=WHAT, help="Override any recipe key; may be repeated."
        ),
    ] = None,
    dataset: Dataset = None,
    num_samples: Samples = None,
    max_seq_length: Length = None,
    eval_dataset: EvalDataset = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            rich_help_panel=OUTPUT,
            help="Folder for the pruned checkpoint and its report. Required.",
        ),
    ] = None,
    stored_as: Annotated[
        StoredFormat | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            rich_help_panel=OUTPUT,
            help="How to store pruned matrices: dense (zeros included), or packed as nm, block or bitmask; auto picks "
            "what suits each pattern. Default: the recipe's.",
        ),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only show the plan, and the time, memory and disk space that it needs; DIR is optional."
        ),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            min=1,
            metavar="N",
            help="Share the calibration text out over N processes of this machine, each with a GPU of its own or with "
            "some of the CPU's cores; for several machines use torchrun.",
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prune a causal LM and report what it cost.

    The source is read one decoder layer at a time and never modified. Finished layers survive a crash.
    """
    if output is None and not dry_run:
        raise typer.BadParameter("missing; only --dry-run works without it", param_hint="--output")
    if resume and overwrite:
        raise typer.BadParameter("--resume continues the run in DIR, --overwrite replaces it: give only one of them")
    sharing = launching.number(processes)
    wanted = Wanted.read(
        recipe,
        overrides,
        pattern=pattern,
        sparsity=sparsity,
        method=method,
        dataset=dataset,
        num_samples=num_samples,
        max_seq_length=max_seq_length,
        eval_dataset=eval_dataset,
    )
    chosen = {"device": device, "format": stored_as.value if stored_as else None}
    further = [f"{key}={value}" for key, value in chosen.items() if value]
    if output is None or dry_run:
        _dry_run(
            model, wanted, further, output, push_to_hub,
            resume=resume, overwrite=overwrite, processes=sharing, as_json=as_json, quiet=quiet,
        )  # fmt: skip
        return
    if sharing > 1 and not torchrun.started():
        with explained(as_json), wanted.spelled():
            _require_startable(wanted, further, sharing)
        launching.launch(sharing, as_json=as_json)
    options = [part for key, value in chosen.items() if value for part in (f"--{key}", value)]
    options += ["--push-to-hub", push_to_hub] if push_to_hub else []
    options += ["--processes", str(torchrun.processes())] if torchrun.started() else []
    options += [*["--json"] * as_json, *["--quiet"] * quiet]
    command = ["llmprune", "prune", model, *wanted.words(output), *options]
    display = console.Display(quiet=quiet)
    advice = (
        lambda: _advice(display, command, resume=resume, overwrite=overwrite),
        lambda: _advice_on_memory(display, command),
    )
    with explained(as_json, *advice), wanted.spelled():
        uploading.check(push_to_hub)
        settings = wanted.described([*wanted.settings(), *further])
        with display:
            # Inside, because it takes seconds to import torch and transformers, on a busy machine many.
            from llmprune.cli.tables.pruning import report_table
            from llmprune.pruning import pipeline
            from llmprune.storage.folders import expanded

            quieten(quiet)
            report = pipeline.prune(
                model, wanted.name, output, overrides=settings, resume=resume, overwrite=overwrite, watch=display
            )
        if torchrun.follows():
            return
        if not as_json:
            console.show(report_table(report, expanded(output)))
        uploading.finish(expanded(output), push_to_hub, quiet=quiet or as_json)
        if as_json:
            console.show_json(report.to_dict())


def recipes(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A bundled recipe, or a YAML file for llmprune prune, to print with all of its keys."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the bundled recipes of prune and train, or print a recipe with every default filled in."""
    with explained(as_json):
        from llmprune.cli.tables.pruning import recipes_table
        from llmprune.recipe.bundled import bundled_recipes, recipe_texts

        listed = {"prune": bundled_recipes(), "train": bundled_recipes("train")}
        if recipe is not None:  # whose readers take seconds to import, for the list nothing
            from llmprune.recipe.recipe import load_recipe
            from llmprune.training.recipe import load_train_recipe

            resolved = load_train_recipe(recipe) if recipe in recipe_texts("train") else load_recipe(recipe)
            if as_json:
                console.show_json(resolved.to_dict())
            else:
                typer.echo(resolved.to_yaml(), nl=False)
        elif as_json:
            console.show_json([
                {"name": name, "description": line, "command": command}
                for command, recipes in listed.items()
                for name, line in recipes
            ])  # fmt: skip
        else:
            console.show(recipes_table(listed))


def _require_startable(wanted: Wanted, further: list[str], processes: int) -> None:
    """Refuse to share what is wanted out over so many processes, before any of them is started."""
    from llmprune.pruning.sharing import require_startable
    from llmprune.recipe.recipe import load_recipe

    here = torchrun.neighbours() if torchrun.started() else processes
    require_startable(load_recipe(wanted.name, [*wanted.settings(), *further]), processes, here)


def _dry_run(
    model: str,
    wanted: Wanted,
    further: list[str],
    output: str | None,
    push_to_hub: str | None,
    *,
    resume: bool,
    overwrite: bool,
    processes: int,
    as_json: bool,
    quiet: bool,
) -> None:
    if torchrun.follows():
        return
    with explained(as_json, lambda: "interrupted; nothing was written"), wanted.spelled():
        with console.Display(quiet=quiet) as display:
            from llmprune.cli.tables.pruning import dry_run_tables
            from llmprune.pruning.forecast.forecast import dry_run
            from llmprune.storage.folders import expanded, require_empty, require_free, require_space

            uploading.check(push_to_hub)
            folder = None if output is None else expanded(output)
            if folder is not None:
                require_free(folder)
                require_empty(folder, resume=resume, overwrite=overwrite)
            if processes > 1:
                _require_startable(wanted, further, processes)
            plan = dry_run(model, wanted.name, [*wanted.settings(), *further], display)
            if folder is not None:
                require_space(folder, plan.disk_bytes, resume=resume)
        if as_json:
            console.show_json(plan.to_dict())
        else:
            console.show(*dry_run_tables(plan))
        if processes > 1:
            console.tell(
                f"These figures are those of one process. With {processes}, each has 1/{processes} of the hidden "
                "states and of the forward passes; layers and solvers take the same memory in each."
            )


def _begun(display: console.Display) -> bool:
    """Whether the run has come to its layers, and so to its output folder; sampling text counts tokens."""
    progress = display.progress
    return progress is not None and progress.layers > 0 and progress.unit != "token"


def _advice(display: console.Display, command: list[str], *, resume: bool, overwrite: bool) -> str:
    """One line for an interrupted run: where it stopped, and the command that continues it."""
    # The output folder is opened once the text is ready; until then an old checkpoint in it has yet to be replaced.
    begun = _begun(display)
    option = ["--resume"] if begun or resume else ["--overwrite"] * overwrite
    where = f" ({display.where()})" if display.where() else ""
    verb = "continue" if begun or resume else "nothing was written yet; start again"
    return f"interrupted{where}; {verb} with: {shlex.join([*command, *option])}"


def _advice_on_memory(display: console.Display, command: list[str]) -> str:
    """One line for a run that ran out of memory; empty if it had not begun."""
    begun = _begun(display)
    return f"with more memory, continue with: {shlex.join([*command, '--resume'])}" if begun else ""
