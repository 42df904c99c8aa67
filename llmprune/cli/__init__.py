"""The command line: the only place that sees argv.

torch and transformers take seconds to import, so every command imports what it needs itself, and `--help` none of it.
"""

import os
from typing import Annotated

import typer

from llmprune import __version__
from llmprune.cli import checkpoints, evaluating, measuring, pruning, reporting, rotating, serving, sweeping
from llmprune.cli.options import EXIT_CODES

app = typer.Typer(
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


for _part in (pruning, rotating, sweeping, measuring, evaluating, reporting, checkpoints, serving):
    _part.add_commands(app)
