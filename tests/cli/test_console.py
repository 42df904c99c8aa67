"""What is shown while a run goes on: live on a terminal, one line a layer elsewhere."""

import io
import itertools
import os
import pty
import re
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from command_line import SMALL, make_plain, run, spawn
from rich.text import Text

from llmprune import prune
from llmprune.cli import console
from llmprune.cli.console import Display
from llmprune.errors import LlmpruneError
from llmprune.progress import Progress
from llmprune.pruning import solving
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream
from llmprune.units import format_change, spans


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, hidden size 32, with a tokenizer of the words w0 to w127."""
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))


def test_of_several_processes_the_first_one_alone_shows_its_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    shown = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        Display()(Progress("training"))
        shown.append(capsys.readouterr().err)
    assert shown == ["training\n", ""]


HOSTILE = "a\x1b]0;owned\x07b\x9bc\u202ed\re\x7f"
SHOWN = r"a\x1b]0;owned\x07b\x9bc\u202ed\re\x7f"


def test_control_characters_in_names_are_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """In results, tables, progress and errors; rich itself drops some of them unseen."""
    table = console.new_table("matrix", "value", left=(0, 1))
    table.add_row(HOSTILE, "ä\t1")
    console.show(HOSTILE, Text(HOSTILE), console.facts((HOSTILE, HOSTILE)), table)
    console.tell(HOSTILE)
    console.show_error(LlmpruneError(HOSTILE, expected=HOSTILE, fix=HOSTILE))
    Display()(Progress(HOSTILE))
    shown = capsys.readouterr()
    for stream, times in ((shown.out, 5), (shown.err, 5)):
        assert not {c for c in stream if unicodedata.category(c) == "Cc"} - {"\n", "\t"}
        assert "\u202e" not in stream
        assert stream.count(r"a\x1b]0;owned") == times
    assert SHOWN.replace(r"\x07", "").replace(r"\r", "") in shown.out.replace(r"\x07", "").replace(r"\r", "")
    assert "ä" in shown.out


def test_the_styles_of_a_terminal_stay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console.show_error(LlmpruneError("a\x1b[0mb"))
    assert capsys.readouterr().err == "\x1b[1;31mError: a\\x1b[0mb\x1b[0m\n"


@pytest.mark.slow
def test_live_display_on_a_terminal(model: Path, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    process = spawn("prune", model, "-r", "demo", "-o", tmp_path / "out", *SMALL, stderr=terminal)
    os.close(terminal)
    shown = b"".join(_pieces(controller)).decode()
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    # The display is drawn a few times a second, and such a layer may be over before that.
    assert re.search(r"layer [12] of 2", shown)
    assert ": layer" not in shown
    # What was live is gone at the end, and the results are plain.
    assert "\x1b[2K" in shown
    assert "sparsity" in stdout
    assert "\x1b" not in stdout


def _pieces(controller: int) -> Iterator[bytes]:
    try:
        while piece := os.read(controller, 65536):
            yield piece
    except OSError:  # how Linux says that the other end was closed
        pass
    finally:
        os.close(controller)


def test_display_shows_step_error_and_eta_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", shown)
    clock = iter([0.0, 0.0, 60.0, *[60.0] * 100])
    with Display(clock=lambda: next(clock)) as display:
        display(Progress("pruning", 0, 3, "statistics"))
        display(Progress("pruning", 1, 3, "solving mlp.up_proj", 0.125))
    assert "layer 2 of 3" in shown.getvalue()
    assert "ETA 2:00" in shown.getvalue()
    assert "solving mlp.up_proj" in shown.getvalue()
    assert "mean relative output error 0.1250" in shown.getvalue()


class Clock:
    """Time that passes only where something says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_step_that_takes_long_is_said_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    display = Display(clock=clock)
    display.tick()
    display(Progress("pruning", 1, 3, "statistics"))
    for now in range(31):
        clock.now = float(now)
        display.tick()
    display.__exit__(None, None, None)
    clock.now = 99.0
    display.tick()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"pruning, layer 2 of 3, statistics, {seconds} s so far" for seconds in (9, 18, 27)]


def test_a_dry_run_that_takes_long_is_said_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    display = Display(clock=clock).planning()
    for now in range(20):
        clock.now = float(now)
        display.tick()
    assert capsys.readouterr().err.splitlines() == ["planning, 9 s so far", "planning, 18 s so far"]


def test_whoever_waits_in_a_library_hears_of_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps, from a thread of the display."""
    monkeypatch.setattr(console, "_TICK_SECONDS", 0.001)
    clock = Clock()
    with Display(clock=clock):
        clock.now = 9.5
        shown, waited = "", time.monotonic()
        while not shown and time.monotonic() - waited < 30:
            time.sleep(0.001)
            shown += capsys.readouterr().err
    assert shown == "starting, 10 s so far\n"


def test_no_long_part_of_a_run_is_silent(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every forward pass of a layer, every head and every solved matrix takes 6 s here: a line at every second one."""
    clock, printed = Clock(), [0.0]

    def slowed(owner: Any, name: str) -> None:
        work = getattr(owner, name)

        def slow(*arguments: Any, **options: Any) -> Any:
            clock.now += 6.0
            return work(*arguments, **options)

        monkeypatch.setattr(owner, name, slow)

    slowed(ResidentLayer, "forward")
    slowed(Stream, "head")
    slowed(solving, "_solve_matrix")
    display = Display(clock=clock)
    show = display._print

    def note(line: str, now: float, *more: str, eta: bool = True) -> None:
        printed.append(now)
        show(line, now, *more, eta=eta)

    monkeypatch.setattr(display, "_print", note)
    prune(model, tiny_models.recipe(evaluation={"samples": 4}, batch_size=1), tmp_path / "out", watch=display)
    gaps = [after - before for before, after in itertools.pairwise([*printed, clock.now])]
    assert len(gaps) > 30
    # A step at the latest after one part; a line at the latest at the first step after ten seconds.
    assert max(gaps) <= 12.0
    assert "ETA" in capsys.readouterr().err


def test_spans() -> None:
    assert spans([]) == ""
    assert spans([3]) == "3"
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_markup_in_a_message_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise LlmpruneError("[red]x[/red] [/] in [1, 2]", fix="a " * 100)

    monkeypatch.setattr("llmprune.pruning.pipeline.prune", refuse)
    result = run("prune", "m", "--recipe", "demo", "--output", tmp_path / "out")
    assert result.stderr == f"Error: [red]x[/red] [/] in [1, 2]\nfix: {'a ' * 100}\n"


@pytest.mark.parametrize(
    ("dense", "pruned", "shown"),
    [
        (47.8368, 92.3854, "47.84 -> 92.39 (x1.93)"),
        (20.0, float("inf"), "20.00 -> inf"),
        (float("inf"), float("inf"), "inf -> inf"),
    ],
)
def test_a_change_has_a_factor_where_it_is_finite(dense: float, pruned: float, shown: str) -> None:
    assert format_change(dense, pruned) == shown
