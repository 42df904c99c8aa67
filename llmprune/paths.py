"""Paths as users write them, made into paths that the operating system can be asked about."""

from pathlib import Path

from llmprune.errors import LlmpruneError

# The most characters of a path, and of what the system says about it, that a message shows.
_SHOWN = 120


def user_path(
    path: str | Path,
    raised: type[LlmpruneError],
    *,
    expected: str = "the path of a file or folder",
    fix: str = "check the spelling; write it in full",
) -> Path:
    """A path with ~ replaced by a home folder; it may be that of a file that does not exist.

    Args:
        path: as the user wrote it.
        raised: the class of the error.
        expected: for the error.
        fix: for the error.

    Raises:
        LlmpruneError: of the class `raised`: no file can have this path. It is too long, has a null character, is a
            loop of links or lies in a folder that must not be read, or it begins with ~name of an unknown user.
    """
    try:
        found = Path(path).expanduser()
    except RuntimeError as error:
        raise raised(
            f"{str(path)[:_SHOWN]} starts with an unknown home folder: {error}",
            expected=expected,
            fix="write the path in full, or ./~ for a folder of that name",
        ) from error
    try:
        found.resolve().exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise raised(
            f"{str(path)[:_SHOWN]!r} is not a path that this machine can have: {str(error)[:_SHOWN]}",
            expected=expected,
            fix=fix,
        ) from error
    return found
