"""What the command line prints: progress on stderr, and results as tables that fit 80 columns on stdout."""

import json
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from llmprune import torchrun
from llmprune.cli.pace import RunPace
from llmprune.errors import LlmpruneError
from llmprune.progress import Progress

# The longest time without a line, where lines are all that there is to see, and how often somebody looks.
_SILENT_SECONDS = 10.0
_TICK_SECONDS = 0.5

# Width of results that go to a file or another program, where nothing wraps long lines.
_PLAIN_WIDTH = 160


# What sets the direction of text, and so can make a name look like another.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class _SafeConsole(Console):
    """A console that shows control characters escaped: names of files and tensors may hold any, even a terminal's."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))


def new_console(*, stderr: bool = False) -> Console:
    """A console for plain text on stdout or stderr."""
    return _SafeConsole(stderr=stderr, highlight=False, markup=False)


def escaped(text: str) -> str:
    """The text with control characters as in a Python literal; line breaks and tabs stay."""
    return "".join(
        ascii(character)[1:-1]
        if character in _DIRECTIONS or (unicodedata.category(character) == "Cc" and character not in "\n\t")
        else character
        for character in text
    )


class Display:
    """The display of a run: live on a terminal, otherwise lines, of which none is more than ten seconds after the last.

    Of several processes, the first one alone shows it.

    Attributes:
        progress: the last step seen; None before the first.
    """

    def __init__(self, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = new_console(stderr=True)
        self._clock, self._pace = clock, RunPace()
        self._silent = quiet or torchrun.follows()
        self._printed = self._changed = clock()
        self.progress: Progress | None = None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._live = None
        if self._console.is_terminal and not self._silent:
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=8,
                transient=True,
                redirect_stdout=False,
            )

    def __enter__(self) -> "Display":
        if not self._live and not self._silent:
            # Some steps are one call of a library: whatever takes long, somebody says that it is still going on.
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        with self._lock:
            pass  # a line that is being printed is finished before anything else is
        if self._live:
            self._live.stop()

    def planning(self) -> "Display":
        """The display of a dry run, which has one step; on a terminal it is live at once."""
        self.progress = Progress("planning", unit="plan")
        if self._live:
            self._live.start()
        return self

    def __call__(self, progress: Progress) -> None:
        """Show one step."""
        with self._lock:
            self._note(progress)

    def tick(self) -> None:
        """Print a line if the last one was long ago, although there was no step since."""
        with self._lock:
            now = self._clock()
            if self._live or self._silent or self._closed.is_set() or now - self._printed < _SILENT_SECONDS - 1:
                return
            what = "starting" if self.progress is None else _whole(self.progress)
            waited = now - self._changed
            # Of a counter that moves, the seconds since its last step say nothing.
            self._print(f"{what}, {waited:.0f} s so far" if waited >= _SILENT_SECONDS / 2 else what, now)

    def _beat(self) -> None:
        while not self._closed.wait(_TICK_SECONDS):
            self.tick()

    def _note(self, progress: Progress) -> None:
        replayed, now = self._pace.stage.replaying, self._clock()
        seconds = self._pace.update(progress, now)
        before, self.progress = self.progress, progress
        self._changed = now
        if self._live:
            # Only from the first step on, because the progress bars of downloads come before it.
            self._live.start()
        elif self._silent:
            return
        elif progress.layers == 0:
            self._print(": ".join(filter(None, (progress.stage, progress.step))), now, eta=False)
        elif seconds is not None and self._is_due(progress, now):
            finished = f"{progress.stage}: {progress.unit} {progress.layer:,} of {progress.layers:,}"
            if progress.unit == "layer":
                finished += " kept from the earlier run" if replayed else f" in {seconds:.1f} s"
            self._print(finished, now, _mean_error(progress))
        elif before is not None and now - self._printed >= _SILENT_SECONDS:
            self._print(_whole(progress), now)

    def _print(self, line: str, now: float, *more: str, eta: bool = True) -> None:
        parts = (line, *more, _eta(self._pace.left(now)) if eta else "")
        self._console.print(", ".join(filter(None, parts)), soft_wrap=True)
        self._printed = now

    def _is_due(self, progress: Progress, now: float) -> bool:
        """Whether a step deserves a line: units smaller than layers pass too quickly for a line each."""
        every = progress.unit == "layer" or progress.layer == progress.layers
        return every or now - self._printed >= _SILENT_SECONDS

    def where(self) -> str:
        """The current stage and layer, in words; empty before the first step."""
        return "" if self.progress is None else ", ".join(filter(None, (self.progress.stage, _layer(self.progress))))

    def _render(self) -> RenderableType:
        progress = self.progress
        if progress is None:
            return Text()
        first = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None, None):
            first.add_column(no_wrap=True, ratio=ratio)
        bar = ProgressBar(total=progress.layers or None, completed=progress.layer, pulse=not progress.layers)
        first.add_row(Text(progress.stage, "bold"), bar, _layer(progress), _eta(self._pace.left(self._clock())))
        details = "  ".join(filter(None, (progress.step, _mean_error(progress))))
        return Group(first, Text(f"  {details}", "dim", no_wrap=True, overflow="ellipsis"))


def show(*renderables: RenderableType) -> None:
    """Print results to stdout."""
    console = new_console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PLAIN_WIDTH
    for renderable in renderables:
        console.print(renderable)


def show_json(content: Any) -> None:
    """Print plain data to stdout as JSON."""
    sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def tell(message: str) -> None:
    """Print one line to stderr."""
    new_console(stderr=True).print(message, soft_wrap=True)


def show_error(error: LlmpruneError) -> None:
    """Print what happened, what was expected and how to fix it to stderr."""
    console = new_console(stderr=True)
    console.print(Text(f"Error: {error.what}", "bold red"), soft_wrap=True)
    for label, text in (("expected", error.expected), ("fix", error.fix)):
        if text:
            console.print(Text.assemble((f"{label}: ", "bold"), text), soft_wrap=True)


def facts(*facts: tuple[str, str]) -> Table:
    """A grid of names and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    return table


def new_table(*columns: str, left: tuple[int, ...]) -> Table:
    """An empty table; the columns numbered in `left` hold text, the others hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in left else "right", overflow="fold", no_wrap=index == 1)
    return table


def _whole(progress: Progress) -> str:
    """A step in words: what is being done, where, and what to."""
    return ", ".join(filter(None, (progress.stage, _layer(progress), progress.step)))


def _layer(progress: Progress) -> str:
    """The current layer, counted from 1; empty for a step without layers."""
    here = f"{min(progress.layer + 1, progress.layers)} of {progress.layers}"
    return f"{progress.unit} {here}" if progress.layers else ""


def _mean_error(progress: Progress) -> str:
    return "" if progress.mean_error is None else f"mean relative output error {progress.mean_error:.4f}"


def _eta(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"ETA {hours}:{minutes:02d}:{rest:02d}" if hours else f"ETA {minutes}:{rest:02d}"
