"""Results are made in a folder of their own inside the output folder, and take the earlier result's place when whole.

A run that fails or is killed leaves the earlier result as it was. The exchange itself begins with a journal: whoever
opens the folder next completes an exchange that was cut short. While it is under way, the folder does not load.

Only files that llmprune listed when it wrote them are removed. Of a checkpoint of another tool, these are its weights,
the index and config.json. Any other file in the place of a new one is kept under another name.
"""

import contextlib
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from llmprune.errors import CheckpointError
from llmprune.storage.companions import CONFIG_NAME
from llmprune.storage.files import INDEX_NAME, SINGLE_NAME, indexed_files, read_json, write_json
from llmprune.storage.folders import (
    MANIFEST_NAME,
    RECIPE_NAME,
    SAMPLES_NAME,
    STAGING_NAME,
    locked,
    writing_to,
)
from llmprune.storage.report import PAGE_NAME, REPORT_NAME

MANIFEST_FORMAT = 6

_JOURNAL_NAME = ".exchange.json"

# transformers looks for these first: they are the last to come and the first to go.
_GATES = (SINGLE_NAME, INDEX_NAME)
# Files of every run, which later commands may write as well.
_ALWAYS = (RECIPE_NAME, REPORT_NAME, PAGE_NAME, "README.md", SAMPLES_NAME, "generation_config.json", MANIFEST_NAME)


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Make a result in one go: yields an empty folder, whose files take the earlier result's place in the end.

    Raises:
        ResumeError: another run is writing into the output folder.
        CheckpointError: it cannot be written.
    """
    with locked(output):
        staging = begin(output)
        try:
            yield staging
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        exchange(output)


def begin(output: Path) -> Path:
    """An empty folder inside the output folder, for a new result.

    Raises:
        CheckpointError: it cannot be written.
    """
    complete_exchange(output)
    staging = output / STAGING_NAME
    with writing_to(output):
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
    return staging


def exchange(output: Path) -> None:
    """Put the new result in the place of the earlier one; the manifest lists its files from now on.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    staging = output / STAGING_NAME
    found = (file.relative_to(staging) for file in staging.rglob("*") if file.is_file())
    # Names with a dot are those of the manifest and of files that were never finished.
    files = sorted(name.as_posix() for name in found if not name.name.startswith("."))
    manifest = read_json(staging / MANIFEST_NAME) if (staging / MANIFEST_NAME).exists() else {}
    write_json(staging / MANIFEST_NAME, {"format": MANIFEST_FORMAT, "complete": True, **manifest, "files": files})
    write_json(staging / _JOURNAL_NAME, {"earlier": sorted(earlier_files(output)), "files": files})
    complete_exchange(output)


def complete_exchange(output: Path) -> None:
    """Complete an exchange that has begun; nothing happens if none has.

    Raises:
        CheckpointError: the journal is damaged, or the folder cannot be written.
    """
    staging = output / STAGING_NAME
    with writing_to(output):
        if staging.is_symlink():
            staging.unlink()  # none of ours is a link
        if not (staging / _JOURNAL_NAME).exists():
            return
        journal = read_json(staging / _JOURNAL_NAME)
        earlier, files = (set(_plain_names(journal.get(key))) for key in ("earlier", "files"))
        files.add(MANIFEST_NAME)
        waiting = {name for name in files if (staging / name).exists()}
        order = (*_GATES, *sorted(earlier.difference(_GATES)))
        _remove(output, [name for name in order if name not in files or name in waiting.intersection(_GATES)])
        last = (*_GATES, MANIFEST_NAME)
        for name in (*sorted(waiting.difference(last)), *(name for name in last if name in waiting)):
            _make_room(output, name, earlier)
            (output / name).parent.mkdir(exist_ok=True)
            (staging / name).replace(output / name)
        (staging / _JOURNAL_NAME).unlink()
        shutil.rmtree(staging)


def earlier_files(output: Path) -> set[str]:
    """The names of the files that the earlier result in a folder consists of."""
    names = {CONFIG_NAME, *_GATES}
    if (output / INDEX_NAME).is_file():
        with contextlib.suppress(CheckpointError):  # of a damaged index nobody knows what belongs to it
            names.update(indexed_files(output))
    if (output / MANIFEST_NAME).is_file():
        names.update(_ALWAYS, _listed(output))
    return names


def discard_unfinished(output: Path) -> None:
    """Remove what a run has begun in a folder; the result in it stays."""
    with writing_to(output):
        complete_exchange(output)
        if (output / STAGING_NAME).exists():
            shutil.rmtree(output / STAGING_NAME)


def remove_result(output: Path) -> None:
    """Remove the result in a folder, and what a run has begun there; nothing else."""
    with writing_to(output):
        complete_exchange(output)
        _remove(output, sorted(earlier_files(output)))
        if (output / STAGING_NAME).exists():
            shutil.rmtree(output / STAGING_NAME)


def _listed(output: Path) -> list[str]:
    """What the manifest lists; nothing if it is damaged."""
    with contextlib.suppress(CheckpointError):
        return _plain_names(read_json(output / MANIFEST_NAME).get("files"))
    return []


def _plain_names(names: Any) -> list[str]:
    """The names that lie inside the folder: a file from elsewhere could name others."""
    paths = [PurePosixPath(name) for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return [str(path) for path in paths if path.parts and not path.is_absolute() and ".." not in path.parts]


def _remove(output: Path, names: list[str]) -> None:
    for name in names:
        file = output / name
        if file.parent.is_symlink() and file.parent != output:
            continue
        if file.is_file() or file.is_symlink():
            file.unlink()
        file.with_name(f".{file.name}.partial").unlink(missing_ok=True)
        if file.parent != output:
            with contextlib.suppress(OSError):  # missing, or it holds files that are not ours
                file.parent.rmdir()


def _make_room(output: Path, name: str, earlier: set[str]) -> None:
    """Keep what is not ours, and lies in the place of a new file, under another name."""
    parts = PurePosixPath(name).parts
    outer = output / parts[0]
    # A folder in a file's place, or a link in a folder's.
    wrong = outer.is_dir() if len(parts) == 1 else outer.exists() and (outer.is_symlink() or not outer.is_dir())
    place = outer if wrong else output / name
    if wrong or (name not in earlier and (place.exists() or place.is_symlink())):
        numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        free = (place.with_name(f"{place.name}.kept{number}") for number in numbers)
        place.rename(next(path for path in free if not path.exists() and not path.is_symlink()))
