"""`llmprune report` and `llmprune compare`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from llmprune.cli import console
from llmprune.cli.layout import MEASURE, add
from llmprune.cli.options import AsJson, explained

_COMPARE_EXAMPLES = """
Examples:

llmprune compare out/*

llmprune compare out/sparsegpt out/ffn --against org/model --html compare.html
"""


def add_commands(app: typer.Typer) -> None:
    """Add the commands."""
    add(app, report, MEASURE)
    add(app, compare, MEASURE, _COMPARE_EXAMPLES)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The output folder of a finished run.")],
    open_it: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Open it in a browser; default: only on a terminal.")
    ] = None,
) -> None:
    """Build report.html in an output folder: one self-contained page that works offline.

    It shows report.json and any results of lm-eval (evaluation*.json) and `llmprune bench` (bench*.json) in the same
    folder.
    """
    with explained(as_json=False):
        from llmprune.errors import CheckpointError
        from llmprune.pages import write_report
        from llmprune.paths import user_path

        page = write_report(user_path(folder, CheckpointError))
        console.show(f"written to {page}")
    if sys.stdout.isatty() if open_it is None else open_it:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            console.tell("no browser found; open the file yourself")


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Output folders of finished runs.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense base, shown for reference: a hub id or a folder.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page that plots quality against size and speed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: quality, size and speed.

    Runs that were evaluated on different texts are shown in separate tables.
    """
    with explained(as_json):
        from llmprune.cli.tables.comparing import comparison_tables
        from llmprune.errors import CheckpointError
        from llmprune.pages import compare as compare_runs
        from llmprune.pages import write_comparison
        from llmprune.paths import user_path
        from llmprune.storage.files import require_writable

        if html is not None:
            html = user_path(html, CheckpointError)
            require_writable(html)
        comparison = compare_runs(folders, against)
        if html is not None:
            page = write_comparison(comparison, html)
            console.tell(f"written to {page}")
        if as_json:
            console.show_json(comparison.to_dict())
        else:
            console.show(*comparison_tables(comparison))
