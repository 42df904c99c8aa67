"""The command line: the only place that sees argv.

torch and transformers take seconds to import, so every command imports what it needs itself, and `--help` none of it.
"""

import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from llmprune import console
from llmprune.errors import LlmpruneError
from llmprune.version import __version__

_EXIT_CODES = (
    "Exit codes: 0 done; 1 something that you can mend, and the message says how (or the reader of the output left); "
    "2 wrong usage; 130 interrupted by Ctrl-C."
)

_PRUNE_EXAMPLES = """
Examples:

llmprune prune testbed --recipe demo --output out/demo

llmprune prune org/model --recipe sparsegpt-2of4 --output out --set calibration.source=text.jsonl --set batch_size=4

llmprune prune org/model --recipe wanda-50 --output out --dry-run
"""

_PERPLEXITY_EXAMPLES = """
Examples:

llmprune perplexity out/demo --text test.txt --length 1024

llmprune perplexity org/model --text Salesforce/wikitext --config wikitext-2-raw-v1 --split test --length 2048
"""

_INTERRUPTED = 130

# The evaluation seed of recipes, so that `--text self` measures what a report calls the dense perplexity.
_SEED = 12345

app = typer.Typer(
    help="Prune large language models one decoder layer at a time.",
    epilog=_EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    # A traceback is for us: it stays as Python prints it.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class ComputeDtype(str, Enum):
    """The dtype of the forward."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Argument(help='A hub id, a local checkpoint folder, or "testbed", a small bundled model.')]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]


def main() -> None:
    """Run the command line."""
    # Bars of the data set library would be drawn across our display.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    app(prog_name="llmprune")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmprune {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog=_PRUNE_EXAMPLES + "\n" + _EXIT_CODES)
def prune(
    model: Model,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A bundled recipe (see `llmprune recipes`) or a YAML file.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for the pruned checkpoint and its report. Required."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; may be given several times."),
    ] = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in DIR.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in DIR.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only say what would be done, how long it takes and what it needs; DIR is optional."
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prune a causal LM and report what it cost.

    The model is read one decoder layer at a time and never changed. A layer that is finished survives any crash.
    """
    if output is None and not dry_run:
        raise typer.BadParameter("missing; only --dry-run goes without it", param_hint="--output")
    if resume and overwrite:
        raise typer.BadParameter("--resume continues what is in DIR, --overwrite replaces it: give one of them")
    settings = [*(overrides or ()), *([f"device={device}"] if device else ())]
    if output is None or dry_run:
        _dry_run(model, recipe, settings, output, resume=resume, overwrite=overwrite, as_json=as_json)
        return
    options = [part for setting in overrides or () for part in ("--set", setting)]
    options += [*(("--device", device) if device else ()), *["--json"] * as_json, *["--quiet"] * quiet]
    command = ["llmprune", "prune", model, "--recipe", recipe, "--output", str(output), *options]
    display = console.Display(quiet=quiet)
    with _explained(as_json, lambda: _way_on(display, command, resume=resume, overwrite=overwrite)):
        from llmprune import pipeline

        _quieten(quiet)
        with display:
            report = pipeline.prune(
                model, recipe, output, overrides=settings, resume=resume, overwrite=overwrite, watch=display
            )
        if as_json:
            console.show_json(report.to_dict())
        else:
            console.show(console.report_table(report, output))


@app.command(epilog=_PERPLEXITY_EXAMPLES + "\n" + _EXIT_CODES)
def perplexity(
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="TEXT",
            help='A .txt, .jsonl or .parquet file, a dataset of the hub, or "self": sampled from MODEL itself, which '
            "says nothing about another model.",
        ),
    ],
    length: Annotated[int, typer.Option(min=2, help="Tokens in a chunk, which is also the stride.")],
    samples: Annotated[int, typer.Option(min=1, help="Chunks, from the beginning of the text.")] = 128,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    column: Annotated[str, typer.Option(help="Column, or key, that holds the text.")] = "text",
    config: Annotated[str | None, typer.Option(help="Configuration of the dataset, where it has several.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Chunks in a forward.")] = 8,
    device: Device = None,
    compute_dtype: Annotated[
        ComputeDtype, typer.Option(help="Dtype of the forward; auto is the checkpoint's.")
    ] = ComputeDtype.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model's perplexity, one decoder layer at a time.

    Documents are packed behind their beginning-of-sequence tokens and cut into chunks; no token is scored twice.
    """
    started = time.perf_counter()
    display = console.Display(quiet=quiet)
    with _explained(as_json):
        import torch

        from llmprune.calibration import TextSpec
        from llmprune.devices import describe_device, resolve_device
        from llmprune.perplexity import evaluate
        from llmprune.stream import StreamSettings

        _quieten(quiet)
        order: Any = {} if text == "self" else {"order": "text"}
        spec = TextSpec(text, config, split, column, samples, length, seed=_SEED, **order)
        dtype = None if compute_dtype is ComputeDtype.auto else getattr(torch, compute_dtype.value)
        where = resolve_device(device or "auto")
        with display:
            result = evaluate(model, spec, StreamSettings(where, batch_size), dtype, display)
        run = {
            "model": model,
            "device": describe_device(where),
            "compute_dtype": compute_dtype.value,
            "seconds": time.perf_counter() - started,
        }
        if as_json:
            console.show_json({**run, "version": _versions(), **result.to_dict()})
        else:
            console.show(console.perplexity_table(result, run))


@app.command(epilog=_EXIT_CODES)
def inspect(
    model: Model,
    every: Annotated[bool, typer.Option("--all", help="List every matrix, however many there are.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count the zeros of a checkpoint and name their patterns.

    Read from the files, whoever pruned them. A long list is shown layer by layer unless --all is given.
    """
    with _explained(as_json):
        from llmprune.hub import resolve_model
        from llmprune.inspection import inspect_checkpoint

        # Any folder with safetensors will do, even one that cannot be pruned.
        folder = Path(model).expanduser()
        inspection = inspect_checkpoint(folder if folder.is_dir() else resolve_model(model))
        if as_json:
            console.show_json(inspection.to_dict())
        else:
            console.show(*console.inspection_tables(inspection, every=every))


@app.command(epilog=_EXIT_CODES)
def recipes(
    recipe: Annotated[
        str | None, typer.Argument(help="A bundled recipe or a YAML file: print all of its keys.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the bundled recipes, or print one with every default filled in."""
    with _explained(as_json):
        from llmprune.recipe import bundled_recipes, load_recipe

        if recipe is not None:
            resolved = load_recipe(recipe)
            if as_json:
                console.show_json(resolved.to_dict())
            else:
                typer.echo(resolved.to_yaml(), nl=False)
        elif as_json:
            console.show_json([{"name": name, "description": line} for name, line in bundled_recipes()])
        else:
            console.show(console.recipes_table(bundled_recipes()))


def _dry_run(
    model: str, recipe: str, settings: list[str], output: Path | None, *, resume: bool, overwrite: bool, as_json: bool
) -> None:
    with _explained(as_json, lambda: "interrupted; nothing was written"):
        from llmprune.dry_run import dry_run
        from llmprune.output import require_empty, require_space

        if output is not None:
            require_empty(output, resume=resume, overwrite=overwrite)
        plan = dry_run(model, recipe, settings)
        if output is not None:
            require_space(output, plan.disk_bytes)
        if as_json:
            console.show_json(plan.to_dict())
        else:
            console.show(*console.dry_run_tables(plan))


@contextmanager
def _explained(as_json: bool, interrupted: Callable[[], str] = lambda: "interrupted") -> Iterator[None]:
    """Turn errors that a user can mend, and Ctrl-C, into words and an exit code; all others keep their traceback."""
    try:
        yield
    except LlmpruneError as error:
        console.show_error(error)
        if as_json:
            kind = type(error).__name__
            console.show_json(
                {"error": {"kind": kind, "what": error.what, "expected": error.expected, "fix": error.fix}}
            )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.tell(interrupted())
        raise typer.Exit(_INTERRUPTED) from None


def _way_on(display: console.Display, command: list[str], *, resume: bool, overwrite: bool) -> str:
    """One line for an interrupted run: where it was, and the command that goes on."""
    # The output folder is opened when the text is there; before, an old checkpoint in it is still to be replaced.
    begun = display.progress is not None and display.progress.layers > 0
    option = ["--resume"] if begun or resume else ["--overwrite"] * overwrite
    where = f" ({display.where()})" if display.where() else ""
    verb = "continue" if begun or resume else "nothing was written yet; start again"
    return f"interrupted{where}; {verb} with: {shlex.join([*command, *option])}"


def _quieten(quiet: bool) -> None:
    """Leave out the bars of a download, too."""
    if quiet:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined] # public, but not in __all__

        disable_progress_bars()


def _versions() -> dict[str, str]:
    from llmprune.pipeline import versions

    return versions()
