"""The command line: the only place that sees argv.

torch and transformers take seconds to import, so every command imports what it needs itself, and `--help` none of it.
"""

import io
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from llmprune import __version__, torchrun
from llmprune.cli import (
    allocating,
    checkpoints,
    evaluating,
    measuring,
    pruning,
    recovering,
    reporting,
    rotating,
    serving,
    storing,
    sweeping,
    training,
)
from llmprune.cli.layout import Group
from llmprune.cli.options import EXIT_CODES

# The commands that torchrun may start in several processes; sweep says itself what to do instead.
_SHARED = ("prune", "recover", "train", "sweep")

app = typer.Typer(
    cls=Group,
    help="Prune large language models one decoder layer at a time.",
    epilog=EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    # A traceback means a bug of ours: leave it as Python prints it.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    # The progress bars of `datasets` would be drawn across our display.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Large tensors in pages of 2 MB: clearing small ones takes up to a third of a layer's forward pass. torch reads it
    # before its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that the terminal's encoding lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    if torchrun.follows():
        _follow()
    app(prog_name="llmprune")


def _follow() -> NoReturn:
    """Run the command in a process that shows nothing: what is wrong with its words, the first one says first."""
    usage_error: Any = typer.BadParameter.__base__  # typer does not export it
    try:
        sys.exit(app(prog_name="llmprune", standalone_mode=False))
    except usage_error as error:
        torchrun.let_first_speak()
        error.show()
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmprune {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    if torchrun.started() and context.invoked_subcommand not in _SHARED:
        raise typer.BadParameter(
            f"torchrun has started {torchrun.processes()} processes, which would all do the same: start "
            f"`llmprune {context.invoked_subcommand}` without it"
        )


for _part in (
    pruning, rotating, sweeping, training, recovering, allocating, measuring, evaluating, reporting, checkpoints,
    storing, serving,
):  # fmt: skip
    _part.add_commands(app)
