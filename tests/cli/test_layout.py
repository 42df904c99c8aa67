"""Help: in groups, in words of the field, within 80 columns."""

import re

import pytest
import typer
from command_line import make_plain, run

from llmprune.cli import app
from llmprune.cli.layout import PANELS

COMMANDS = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined] # of a group


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_no_python_types_and_80_columns(command: str) -> None:
    shown = run(*filter(None, [command]), "--help").stdout
    assert not re.search(r"<[a-z]|\b(TEXT|INTEGER|FLOAT|PATH|BOOLEAN)\b", shown.replace(" TEXT ", " "))
    assert max(map(len, shown.splitlines())) <= 80
    # A line of prose that breaks early would be one that the source has broken.
    assert "stop the others,\n" not in shown


def test_commands_stand_in_their_groups() -> None:
    shown = run("--help").stdout
    places = [shown.index(f"─ {panel} ─") for panel in PANELS]
    assert places == sorted(places)
    bounds = [*places, len(shown)]
    for number, names in enumerate(
        (["prune", "sweep"], ["perplexity", "eval", "bench"], ["pack", "generate", "serve"])
    ):
        for name in names:
            assert bounds[number] < shown.index(f"│ {name} ") < bounds[number + 1]


def test_options_of_prune_stand_in_groups_and_the_rest_comes_last() -> None:
    shown = run("prune", "--help").stdout
    order = ["What to prune", "--sparsity", "─ Text ", "--dataset", "─ Output ", "--format", "Other options", "--help"]
    places = [shown.index(words) for words in order]
    assert places == sorted(places)


def test_brackets_are_shown() -> None:
    assert '"[wanda, swaps, refit]"' in run("prune", "--help").stdout
