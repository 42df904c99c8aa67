"""Notices when the files of a checkpoint change while a run reads them."""

from pathlib import Path

from llmprune.errors import CheckpointError
from llmprune.storage.companions import CONFIG_NAME
from llmprune.storage.files import file_digest, weight_files
from llmprune.storage.hub import shard_digest


class SourceWatch:
    """Remembers the files of a checkpoint as they are now.

    A look at sizes and times costs microseconds, and is taken often. Times can be set back, or change although the
    content does not, so where they differ, and once at the end, the content decides: by the samples of
    `checkpoint_digest`, a few milliseconds per file.

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated or not a safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        files = [folder / CONFIG_NAME, *weight_files(folder)]
        # Looked at before they are read: a change in between is noticed.
        self._looks = {file: _look(file) for file in files}
        self._digests = {file: _digest(file) for file in files}

    def require_unchanged(self, *, thorough: bool = False) -> None:
        """Refuse to go on from files that are not what they were.

        Args:
            thorough: digest every file, even those whose size and times are unchanged.

        Raises:
            CheckpointError: a file has changed, or is gone; names it.
        """
        for file, before in self._looks.items():
            look = _look(file)
            if (look != before or thorough) and _digest(file) != self._digests[file]:
                raise CheckpointError(
                    f"{file} has changed while it was read",
                    expected="a checkpoint that stays as it is until the run has ended",
                    fix="restore the file and continue with --resume, or prune what is there now with --overwrite",
                )
            self._looks[file] = look


def _look(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest(file: Path) -> str | None:
    """None if it cannot be read; a file that cannot be read at the beginning is refused when it is opened."""
    try:
        return file_digest(file) if file.name == CONFIG_NAME else shard_digest(file)
    except (CheckpointError, OSError):
        return None
