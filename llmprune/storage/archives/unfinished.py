"""What is made beside its place and moved there when it is whole; an interruption leaves it, to be continued."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmprune.errors import FormatError, ResumeError
from llmprune.storage.folders import locked, writing_to


def require_absent(target: Path, *, outside: Path | None = None) -> None:
    """Refuse a target that exists, or lies in a folder.

    Args:
        target: what will be made.
        outside: the folder.

    Raises:
        ResumeError: it exists, or lies there.
    """
    if target.exists() or target.is_symlink():
        raise ResumeError(f"{target} exists", expected="a new name", fix="choose another --output, or remove it first")
    if outside is not None and target.resolve().is_relative_to(outside.resolve()):
        raise ResumeError(
            f"{target} is in the folder that is archived", expected="a place outside it", fix="choose another --output"
        )


@contextlib.contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """The place where a target is made: a hidden folder beside it, with what an interrupted run has left.

    After a `FormatError`, or if nothing was made, nothing of it is left.

    Raises:
        ResumeError: another run is making it.
        CheckpointError: it cannot be written.
    """
    folder = target.with_name(f".{target.name}.partial")
    try:
        with locked(folder), writing_to(target):
            yield folder / "content"
    except BaseException as error:
        if isinstance(error, FormatError) or not any(path.is_file() for path in folder.rglob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def finish(made: Path, target: Path) -> None:
    """Move what is whole to its place."""
    require_absent(target)
    made.rename(target)
