"""Several processes, on one machine or on many, that make the runs of one sweep in one folder."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llmprune.errors import RecipeError, ResumeError
from llmprune.pruning.sweep.ledger import Record, SweepRow, plan_rows, read_rows, require_sweep
from llmprune.recipe.grid import Combination
from llmprune.storage.folders import LOCK_NAME, writing_to

# How long a process waits while others rewrite the record, each for milliseconds.
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Shard:
    """Every `count`-th run of a sweep.

    Attributes:
        number: of this shard, from 1 to `count`.
        count: how many there are.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "2/8".

        Raises:
            RecipeError: it is something else.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        shard = cls(*map(int, found.groups())) if found else None
        if shard is None or not 1 <= shard.number <= shard.count:
            raise RecipeError(f"shard {text!r}", expected="i/n with i from 1 to n, such as 2/8")
        return shard

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def has(self, place: int) -> bool:
        """Whether the run at this place of the grid, from 0, is one of its own."""
        return place % self.count == self.number - 1


class SharedRecord(Record):
    """A record that other processes rewrite as well: each row is written into what the file holds by then.

    Args:
        folder: of the sweep.
        keys: as for `Record`.
        rows: the runs of the whole grid, as this process found or planned them.
    """

    def note(self, row: SweepRow) -> None:
        """Replace the row with this name."""
        with waiting(self.folder):
            self._refresh()
            super().note(row)

    def refresh(self) -> None:
        """Read what the other processes have noted."""
        with waiting(self.folder):
            self._refresh()

    def _refresh(self) -> None:
        self.rows |= {row.name: row for row in read_rows(self.folder, None)}


def join_sweep(
    output: Path, keys: Mapping[str, Any], combinations: Sequence[Combination]
) -> tuple[SharedRecord, list[SweepRow]]:
    """Begin a sweep, or take part in one that another process has begun.

    Args:
        output: folder of the sweep.
        keys: as for `Record`.
        combinations: the whole grid.

    Returns:
        The record, and the rows of the grid in its order.

    Raises:
        ResumeError: the folder holds something else, a sweep of another model, or one that a process works on alone.
    """
    with waiting(output):
        require_sweep(output, resume=True, overwrite=False)
        # Runs of other shards are in the record before they have a folder.
        earlier = [row for row in read_rows(output, keys) if row.state != "replaced"]
        rows = plan_rows(combinations, earlier)
        record = SharedRecord(output, keys, [*rows, *earlier])
        record.write()
        return record, rows


@contextlib.contextmanager
def waiting(folder: Path) -> Iterator[None]:
    """Keep the others out of a sweep's record for a moment; the folder is created if it does not exist.

    Raises:
        ResumeError: a process works on the whole sweep, and keeps all others out.
        CheckpointError: the folder cannot be written.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_NAME)
        try:
            lock.acquire(timeout=_PATIENCE_SECONDS)
        except Timeout:
            raise ResumeError(
                f"another run of llmprune is writing into {folder}",
                expected="only processes that each make a shard of the sweep",
                fix="wait for it to end, or stop it and start every process with its shard",
            ) from None
    try:
        yield
    finally:
        lock.release()
