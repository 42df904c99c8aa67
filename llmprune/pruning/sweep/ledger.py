"""The record of a sweep, `sweep.json`: its runs and their states."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from llmprune.errors import ResumeError
from llmprune.recipe.grid import Combination, written
from llmprune.storage.exchange import discard_unfinished, remove_result
from llmprune.storage.files import write_json
from llmprune.storage.folders import LOCK_NAME, require_free
from llmprune.storage.records import CLOSED, PlainName, read_as

RECORD_NAME = "sweep.json"

# Where scripts and output of a cluster's jobs go, in the sweep's folder.
JOBS_NAME = ".jobs"

_FORMAT = 1

State = Literal["waiting", "running", "interrupted", "failed", "finished", "replaced"]


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        settings: keys of the grid -> their values.
        recipe: as it is run, with every key.
        state: how far it got. "running" without a running process means that it was killed; "replaced" is a run of an
            earlier sweep that this one has no run for, which is removed once all runs of this one are finished.
        error: of a failed run: kind, what, expected and fix.
        outdated: its folder holds a result of an earlier sweep until its own is whole.
    """

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    name: PlainName  # the folder is removed when a sweep is replaced
    settings: dict[str, Any]
    recipe: dict[str, Any]
    state: State = "waiting"
    error: dict[str, str] | None = None
    outdated: bool = False


@dataclass(frozen=True, slots=True)
class _Ledger:
    """What `sweep.json` holds."""

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    format: int
    keys: dict[str, Any]
    runs: tuple[SweepRow, ...]


class Record:
    """`sweep.json`, rewritten at every change, so that it is always complete.

    Args:
        folder: of the sweep.
        keys: what must be equal for a sweep to be resumed, JSON-ready.
        rows: the runs; of several with the same name, the first counts.

    Attributes:
        rows: by name.
    """

    def __init__(self, folder: Path, keys: Mapping[str, Any], rows: Sequence[SweepRow]) -> None:
        self.folder, self._head = folder, {"format": _FORMAT, "keys": dict(keys)}
        self.rows: dict[str, SweepRow] = {}
        for row in rows:
            self.rows.setdefault(row.name, row)

    def note(self, row: SweepRow) -> None:
        """Replace the row with this name."""
        self.rows[row.name] = row
        self.write()

    def forget(self, names: Sequence[str]) -> None:
        """Leave out the rows with these names."""
        self.rows = {name: row for name, row in self.rows.items() if name not in names}
        self.write()

    def write(self) -> None:
        """Rewrite the file."""
        write_json(self.folder / RECORD_NAME, {**self._head, "runs": [asdict(row) for row in self.rows.values()]})


def plan_rows(combinations: Sequence[Combination], earlier: Sequence[SweepRow]) -> list[SweepRow]:
    """Find each combination's row among the earlier ones, or create a new one.

    Raises:
        ResumeError: an earlier run has the same name as a new one, but a different recipe.
    """
    known = {_identity(row.recipe): row for row in earlier}
    named = {row.name.casefold(): row for row in earlier}
    rows = []
    for combination in combinations:
        recipe = combination.recipe.to_dict()
        row = known.get(_identity(recipe))
        if row is None:
            row = SweepRow(combination.label, combination.settings, recipe)
            if (other := named.get(row.name.casefold())) is not None:
                raise ResumeError(
                    f"{other.name} cannot be resumed: {_difference(other.recipe, recipe)}",
                    expected="the grid that was interrupted, possibly with more or fewer values",
                    fix=f"undo the change, or give both values to make both runs, or remove the folder {other.name}",
                )
        rows.append(row)
    return rows


def _identity(recipe: Mapping[str, Any]) -> str:
    return json.dumps({**recipe, "description": ""}, sort_keys=True)


def _difference(before: Any, now: Any, key: str = "") -> str:
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return f"{key} was {written(before)} and is now {written(now)}"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    changed = [name for name in names if f"{key}{name}" != "description"]
    return "; ".join(_difference(before.get(name), now.get(name), f"{key}.{name}".lstrip(".")) for name in changed)


def require_sweep(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that is not empty, unless it is a sweep and the user said what to do with it.

    Raises:
        ResumeError: the folder is refused, or both `resume` and `overwrite` are set.
    """
    if resume and overwrite:
        raise ResumeError("resume and overwrite contradict each other", fix="use one of them")
    if (output / RECORD_NAME).exists():
        if not resume and not overwrite:
            raise ResumeError(
                f"{output} holds a sweep",
                expected="a new or empty folder",
                fix="continue it with --resume, or replace it with --overwrite",
            )
        return
    if output.exists() and not output.is_dir():
        raise ResumeError(f"{output} is a file", expected="an output folder", fix="choose another output folder")
    beginnings = {LOCK_NAME, JOBS_NAME, f".{RECORD_NAME}.partial"}
    if output.exists() and any(file.name not in beginnings for file in output.iterdir()):
        raise ResumeError(
            f"{output} holds files but no sweep",
            expected=f"a new or empty folder, or one with the {RECORD_NAME} of a sweep",
            fix="choose another output folder",
        )


def read_record(output: Path, keys: Mapping[str, Any] | None) -> list[SweepRow]:
    """Read the runs that an earlier sweep has begun, as `read_rows` does; runs that left no folder are omitted."""
    return [row for row in read_rows(output, keys) if (output / row.name).exists()]


def read_rows(output: Path, keys: Mapping[str, Any] | None) -> list[SweepRow]:
    """Read all runs of a sweep.

    Args:
        output: folder of the sweep, which may have no record yet.
        keys: what must be equal; None accepts any.

    Raises:
        ResumeError: the record is damaged, or its keys differ.
    """
    file = output / RECORD_NAME
    if not file.exists():
        return []
    damaged: dict[str, Any] = {
        "expected": "the record of a sweep",
        "fix": "choose another output folder, or remove this one",
        "raised": ResumeError,
    }
    found = read_as(file, dict[str, Any], **damaged).get("format")
    if found != _FORMAT:
        raise ResumeError(f"{file} cannot be read: format {found} instead of {_FORMAT}", fix=damaged["fix"])
    content = read_as(file, _Ledger, **damaged)
    rows, before = list(content.runs), content.keys
    if keys is not None and before != keys:
        raise ResumeError(
            f"{output} cannot be resumed: {_difference(before, keys)}",
            expected="the sweep that was interrupted, so that all runs can be compared",
            fix="undo the change, or start again with --overwrite",
        )
    return rows


def begin_replacing(output: Path) -> list[SweepRow]:
    """The runs of a sweep that is replaced: what they have finished stays for now, and what they have begun goes.

    Raises:
        ResumeError: the record is damaged, or another process is writing into a run's folder.
        CheckpointError: a folder cannot be written.
    """
    rows = read_record(output, None)
    for row in rows:
        require_free(output / row.name)
    for row in rows:
        discard_unfinished(output / row.name)
    return [replace(row, state="replaced") for row in rows]


def with_outdated(rows: Sequence[SweepRow], replaced: Sequence[SweepRow]) -> list[SweepRow]:
    """Mark the runs whose folders hold results of an earlier sweep."""
    names = {row.name for row in replaced}
    return [replace(row, outdated=True) if row.name in names else row for row in rows]


def remove_runs(output: Path, rows: Sequence[SweepRow]) -> None:
    """Remove the checkpoints of these runs, and the folders that are then empty."""
    for folder in (output / row.name for row in rows):
        remove_result(folder)
        with contextlib.suppress(OSError):  # missing, or it contains files that are not ours
            folder.rmdir()
