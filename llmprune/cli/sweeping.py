"""`llmprune sweep`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from llmprune.cli import console
from llmprune.cli.options import EXIT_CODES, AsJson, Model, Quiet, explained, quieten

_EXAMPLES = """
Examples:

llmprune sweep testbed --recipe demo --set pattern=0.5,0.6,0.7 --set method=wanda,sparsegpt --output out/grid

llmprune sweep org/model --recipe wanda-50 --set "exclude=['*.o_proj', '*.down_proj'],[]" --output out --dry-run
"""


def add_commands(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=_EXAMPLES + "\n" + EXIT_CODES)(sweep)


def sweep(
    model: Model,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A bundled recipe (see `llmprune recipes`) or a YAML file.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE,VALUE,...",
            help="Values of a key of the recipe; may be given for several keys, and every combination is run. Each "
            "value is YAML. They are split at every comma that is not inside [], {} or quotes: "
            "exclude=['*.q_proj','*.k_proj'],[] has two values. A single value holds for all runs.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for the runs, each in a folder of its own. Required."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep in DIR; runs that the grid gained are added.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the sweep in DIR.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only list the runs, how long they take and what they need; DIR is optional."),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model by every combination of some settings, and compare the results.

    What the runs have in common is done once: the text, and the dense model's perplexity. A run that fails does not
    stop the others; the exit code is 1 then.
    """
    if output is None and not dry_run:
        raise typer.BadParameter("missing; only --dry-run goes without it", param_hint="--output")
    if resume and overwrite:
        raise typer.BadParameter("--resume continues what is in DIR, --overwrite replaces it: give one of them")
    if output is None or dry_run:
        _dry_run(model, recipe, settings or [], output, resume=resume, overwrite=overwrite, as_json=as_json)
        return
    command = ["llmprune", "sweep", model, "--recipe", recipe, "--output", str(output)]
    command += [part for setting in settings or () for part in ("--set", setting)]
    command += [*["--json"] * as_json, *["--quiet"] * quiet]
    display = console.Display(quiet=quiet)
    with explained(as_json, lambda: _way_on(display, command, resume=resume, overwrite=overwrite)):
        from llmprune.cli.tables.sweeping import sweep_tables
        from llmprune.pruning.sweep import sweep as sweeping
        from llmprune.recipe.grid import read_grid

        quieten(quiet)
        grid = read_grid(settings or ())
        with display:
            result = sweeping.sweep(model, recipe, grid, output, resume=resume, overwrite=overwrite, watch=display)
        if as_json:
            console.show_json(result.to_dict())
        else:
            console.show(*sweep_tables(result))
        if result.failed:
            again = shlex.join([*command, "--resume"])
            console.tell(f"{len(result.failed)} of {len(result.rows)} runs failed; try them again with: {again}")
            raise typer.Exit(1)


def _dry_run(
    model: str, recipe: str, settings: list[str], output: Path | None, *, resume: bool, overwrite: bool, as_json: bool
) -> None:
    with explained(as_json, lambda: "interrupted; nothing was written"):
        from llmprune.cli.tables.sweeping import forecast_table
        from llmprune.pruning.sweep.sweep import forecast
        from llmprune.recipe.grid import read_grid

        plan = forecast(model, recipe, read_grid(settings), output, resume=resume, overwrite=overwrite)
        if as_json:
            console.show_json(plan.to_dict())
        else:
            console.show(forecast_table(plan))


def _way_on(display: console.Display, command: list[str], *, resume: bool, overwrite: bool) -> str:
    """One line for an interrupted sweep: where it was, and the command that goes on."""
    # The first step is told when the sweep is on record; before, an old one is still to be replaced.
    begun = display.progress is not None
    option = ["--resume"] if begun or resume else ["--overwrite"] * overwrite
    where = f" ({display.where()})" if display.where() else ""
    verb = "continue" if begun or resume else "nothing was written yet; start again"
    return f"interrupted{where}; {verb} with: {shlex.join([*command, *option])}"
