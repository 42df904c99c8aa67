"""`llmprune sweep`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from llmprune import torchrun
from llmprune.cli import console
from llmprune.cli.layout import OUTPUT, PRUNE, WHAT, add
from llmprune.cli.options import AsJson, Model, Quiet, explained, quieten
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

_EXAMPLES = """
Examples:

llmprune sweep testbed --recipe demo --sparsity 0.5,0.6,0.7 --method wanda,sparsegpt --output out/grid

llmprune sweep org/model --recipe wanda-50 --set "exclude=['*.o_proj', '*.down_proj'],[]" --output out --dry-run
"""


def add_commands(app: typer.Typer) -> None:
    """Add the command."""
    add(app, sweep, PRUNE, _EXAMPLES)


def sweep(
    model: Model,
    recipe: RecipeName = None,
    pattern: PatternFlag = None,
    sparsity: SparsityFlag = None,
    method: MethodFlag = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE,...",
            rich_help_panel=WHAT,
            help="Values to try for a recipe key; repeat for more keys, and every combination is run. Each value is "
            "YAML. Values are split at commas outside [], {} and quotes: exclude=['*.q_proj','*.k_proj'],[] has two "
            "values. A single value applies to all runs. The short flags take several values too.",
        ),
    ] = None,
    dataset: Dataset = None,
    num_samples: Samples = None,
    max_seq_length: Length = None,
    eval_dataset: EvalDataset = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            rich_help_panel=OUTPUT,
            help="Folder for the runs, one subfolder each. Required.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            rich_help_panel=OUTPUT,
            help="Continue the sweep in DIR, including runs that the grid has gained.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace the sweep in DIR.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Make only every N-th run, from the I-th on; other processes, on any machine that shares DIR, make "
            "the others at the same time. An interrupted shard continues.",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, metavar="N", help="With --slurm: how many jobs share the runs.")
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            "--slurm",
            metavar="KEY=VALUE",
            help="Submit the runs to SLURM in --jobs jobs, which continue when their time is over: partition=NAME, "
            "time=MINUTES, gpus=N, cpus=N, mem_gb=N or any option of sbatch; may be repeated. Needs the extra cluster.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only list the runs and the time, memory and disk they need; DIR is optional."),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Grid search: prune with every combination of settings, and compare the results.

    Shared work is done once: reading the text and measuring the dense model. A failed run does not stop the others,
    but makes the exit code 1.
    """
    if output is None and not dry_run:
        raise typer.BadParameter("missing; only --dry-run works without it", param_hint="--output")
    if resume and overwrite:
        raise typer.BadParameter("--resume continues the sweep in DIR, --overwrite replaces it: give only one of them")
    if slurm and (shard or jobs is None):
        raise typer.BadParameter("needs --jobs, and no --shard", param_hint="--slurm")
    if jobs is not None and not slurm:
        raise typer.BadParameter(
            "jobs are SLURM's: give --slurm as well, or a --shard to each process", param_hint="--jobs"
        )
    if torchrun.started():
        raise typer.BadParameter(
            f"torchrun has started {torchrun.processes()} processes, which would all make the same runs: start as many "
            "without it, each with a --shard of its own"
        )
    if overwrite and (shard or slurm):
        raise typer.BadParameter("shards continue what is in DIR: leave --overwrite out", param_hint="--overwrite")
    wanted = Wanted.read(
        recipe,
        settings,
        pattern=pattern,
        sparsity=sparsity,
        method=method,
        dataset=dataset,
        num_samples=num_samples,
        max_seq_length=max_seq_length,
        eval_dataset=eval_dataset,
    )
    if output is None or dry_run:
        _dry_run(model, wanted, output, shard, resume=resume, overwrite=overwrite, as_json=as_json, quiet=quiet)
        return
    if slurm:
        _submit(model, wanted, output, jobs or 1, slurm, as_json=as_json)
        return
    command = ["llmprune", "sweep", model, *wanted.words(str(output)), *(["--shard", shard] if shard else [])]
    command += [*["--json"] * as_json, *["--quiet"] * quiet]
    display = console.Display(quiet=quiet)
    with explained(as_json, lambda: _advice(display, command, resume=resume, overwrite=overwrite)), wanted.spelled():
        from llmprune.cli.tables.sweeping import sweep_tables
        from llmprune.pruning.sweep import sweep as sweeping
        from llmprune.pruning.sweep.shards import Shard
        from llmprune.recipe.grid import read_grid

        quieten(quiet)
        grid = read_grid(wanted.settings())
        part = None if shard is None else Shard.parse(shard)
        with display:
            result = sweeping.sweep(
                model, wanted.name, grid, output, resume=resume, overwrite=overwrite, shard=part, watch=display
            )
        if as_json:
            console.show_json(result.to_dict())
        else:
            console.show(*sweep_tables(result))
        if result.failed:
            again = shlex.join([*command, "--resume"])
            console.tell(f"{len(result.failed)} of {len(result.rows)} runs failed; retry them with: {again}")
            raise typer.Exit(1)


def _submit(model: str, wanted: Wanted, output: Path, jobs: int, options: list[str], *, as_json: bool) -> None:
    """Submit the shards, and say how to see what has become of them."""
    with explained(as_json, lambda: "interrupted; jobs that were submitted go on: see squeue"), wanted.spelled():
        from llmprune.pruning.sweep.cluster import require_submitit, submit
        from llmprune.pruning.sweep.sweep import forecast
        from llmprune.recipe.grid import read_grid

        pairs = [option.partition("=") for option in options]
        if wrong := [key for key, equals, value in pairs if not (key and equals and value)]:
            raise typer.BadParameter(f"{wrong[0]!r}: expected KEY=VALUE", param_hint="--slurm")
        grid = read_grid(wanted.settings())
        require_submitit()
        # What any run would refuse is said now, not by a job in the night.
        forecast(model, wanted.name, grid, output, resume=True)
        found = submit(model, wanted.name, grid, output, jobs, {key: value for key, _, value in pairs})
        names = [job.job_id for job in found]
        if as_json:
            console.show_json({"jobs": names, "folder": str(output)})
        console.tell(
            f"submitted {len(names)} jobs: {', '.join(names)}; when they are done: llmprune compare {output}/*"
        )


def _dry_run(
    model: str,
    wanted: Wanted,
    output: Path | None,
    shard: str | None,
    *,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    with explained(as_json, lambda: "interrupted; nothing was written"), wanted.spelled():
        with console.Display(quiet=quiet) as display:
            from llmprune.cli.tables.sweeping import forecast_table
            from llmprune.pruning.sweep.shards import Shard
            from llmprune.pruning.sweep.sweep import forecast
            from llmprune.recipe.grid import read_grid

            grid, part = read_grid(wanted.settings()), None if shard is None else Shard.parse(shard)
            plan = forecast(
                model, wanted.name, grid, output, resume=resume, overwrite=overwrite, shard=part, watch=display
            )
        if as_json:
            console.show_json(plan.to_dict())
        else:
            console.show(forecast_table(plan))


def _advice(display: console.Display, command: list[str], *, resume: bool, overwrite: bool) -> str:
    """One line for an interrupted sweep: where it stopped, and the command that continues it."""
    # The first step is reported once the sweep is on record; until then an old one has yet to be replaced.
    begun = display.progress is not None
    option = ["--resume"] if begun or resume else ["--overwrite"] * overwrite
    where = f" ({display.where()})" if display.where() else ""
    verb = "continue" if begun or resume else "nothing was written yet; start again"
    return f"interrupted{where}; {verb} with: {shlex.join([*command, *option])}"
