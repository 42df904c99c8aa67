"""Output folders: locked, empty or ours, with enough free space."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from llmprune.errors import CheckpointError, HeldError, ResumeError
from llmprune.paths import user_path
from llmprune.storage.companions import CONFIG_NAME
from llmprune.storage.files import INDEX_NAME
from llmprune.units import format_size

MANIFEST_NAME = ".llmprune.json"
LOCK_NAME = ".llmprune.lock"
# Where a result is made, inside the output folder, until it takes the earlier one's place.
STAGING_NAME = ".llmprune-new"
RECIPE_NAME = "recipe.yaml"
SAMPLES_NAME = "calibration.jsonl"

# Allowance for everything but the weights: tokenizer, report and its page.
_BESIDE_BYTES = 20_000_000


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep every other run out of an output folder, which is created if it does not exist.

    The operating system holds the lock as long as this process lives; a lock file left by a killed run does not block.

    Raises:
        HeldError: another run is writing into the folder.
        CheckpointError: the folder cannot be written.
    """
    lock = FileLock(path / LOCK_NAME)
    with writing_to(path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise HeldError(
                f"another run of llmprune is writing into {path}",
                expected="one run at a time in an output folder",
                fix="wait for it to end, or choose another output folder",
            ) from None
    try:
        yield
    finally:
        # Removed while the lock is still held, so that another run finds either no file or a locked one.
        with contextlib.suppress(OSError):
            (path / LOCK_NAME).unlink()
        lock.release()


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into a `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}",
            expected="a writable folder with enough free space",
            fix="free some space, fix the permissions or choose another folder",
        ) from error


def expanded(path: str | Path) -> Path:
    """The path with ~ replaced by a home folder.

    Raises:
        ResumeError: it is not a path, it is empty, no folder can have it, or
            it is ~name of a user who does not exist on this machine.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise ResumeError(
            f"output folder {path!r}", expected="the path of a folder", fix="pass one, such as out/pruned"
        )
    return user_path(path, ResumeError, expected="the path of a folder", fix="choose another output folder")


def checkpoint_folder(folder: str | Path) -> Path:
    """The path of a folder that holds a checkpoint, with its own last part and not that of a link's target.

    Raises:
        CheckpointError: there is no such folder, or it has no config.json.
    """
    path = expanded(folder)
    if not (path / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{path} has no {CONFIG_NAME}" if path.is_dir() else f"no folder {path}",
            expected="a local folder with config.json and safetensors",
            fix="check the spelling; relative paths start at the current folder",
        )
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() follows links


def require_other(path: Path, source: str | Path) -> None:
    """Refuse to overwrite the model that is being pruned.

    Raises:
        ResumeError: both are the same folder.
    """
    if str(source) and path.resolve() == Path(source).resolve():
        raise ResumeError(f"{path} is the model itself", fix="choose another output folder")


def require_free(path: Path) -> None:
    """Refuse a folder that another run is writing into; creates nothing.

    Raises:
        ResumeError: another run is writing into it.
    """
    if (path / LOCK_NAME).exists():
        with locked(path):
            pass


def require_empty(path: Path, *, resume: bool | None, overwrite: bool) -> None:
    """Refuse a folder that is not empty, unless the user said what to do with its content.

    Args:
        path: the output folder.
        resume: it may hold an interrupted run of llmprune; None: this kind of run cannot be resumed.
        overwrite: it may hold a checkpoint, which will be replaced.

    Raises:
        ResumeError: the folder is not empty, or is a file; says what can be done.
    """
    if resume and overwrite:
        raise ResumeError("resume and overwrite contradict each other", fix="choose one of them")
    existing = _existing(path)
    if not existing.is_dir():
        raise ResumeError(f"{existing} is a file", expected="an output folder", fix="choose another output folder")
    begun = (path / STAGING_NAME / MANIFEST_NAME).exists()
    # All that a run leaves if it is killed before its manifest is written, and all that one has that has just begun.
    beginnings = {LOCK_NAME} if begun else {LOCK_NAME, STAGING_NAME}
    if existing != path or all(file.name in beginnings for file in path.iterdir()):
        return
    ours = begun or (path / MANIFEST_NAME).exists()
    replaceable = ours or (path / INDEX_NAME).exists() or any(path.glob("*.safetensors"))
    elsewhere = "choose another folder" + ", or replace the checkpoint in it with --overwrite" * replaceable
    if resume and not ours:
        raise ResumeError(
            f"{path} holds files but no llmprune run to resume",
            expected="the folder of an interrupted run",
            fix=elsewhere,
        )
    if overwrite and not replaceable:
        raise ResumeError(
            f"{path} holds files but no checkpoint",
            expected="an empty folder, or a checkpoint that --overwrite can replace",
            fix="choose an empty folder",
        )
    if not resume and not overwrite:
        if ours and resume is not None:
            elsewhere = "continue the run with --resume, or replace it with --overwrite"
        raise ResumeError(f"{path} is not empty", expected="a new or empty folder", fix=elsewhere)


def require_space(path: Path, nbytes: int, *, resume: bool = False, purpose: str = "the pruned checkpoint") -> None:
    """Refuse to start a run whose result will not fit on the disk, beside an earlier one in the folder.

    Args:
        path: the output folder.
        nbytes: size of the checkpoint, and of all else that is large and beside it while the run lasts.
        resume: what an interrupted run has written counts as free space; a finished one needs none.
        purpose: what takes the space.

    Raises:
        CheckpointError: the folder is not writable, or there is not enough space.
    """
    existing = _existing(path)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(f"{existing} is not writable", fix="fix the permissions or choose another output folder")
    begun = path / STAGING_NAME
    if resume and not begun.exists() and (path / MANIFEST_NAME).exists():
        return
    kept = begun.rglob("*") if begun.exists() else path.glob("*.safetensors")
    held = sum(file.stat().st_size for file in kept if file.is_file()) if resume else 0
    free = shutil.disk_usage(existing).free + held
    needed = nbytes + _BESIDE_BYTES
    if free < needed:
        raise CheckpointError(
            f"only {format_size(free)} are free under {existing}",
            expected=f"{format_size(needed)} for {purpose}, its tokenizer and its report",
            fix="choose another output folder or free some space",
        )


def _existing(path: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
