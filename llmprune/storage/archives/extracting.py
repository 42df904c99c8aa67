"""Write the files of an archive; after an interruption, go on where it stopped."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llmprune.errors import CheckpointError
from llmprune.paths import user_path
from llmprune.progress import Watcher, ignore
from llmprune.storage.archives.coding import zstd
from llmprune.storage.archives.counter import Counter
from llmprune.storage.archives.records import ArchiveReader, Block, Contents, FileEntry
from llmprune.storage.archives.report import ArchiveReport, ArchiveRow
from llmprune.storage.archives.unfinished import finish, require_absent, unfinished
from llmprune.storage.archives.writing import SUFFIX
from llmprune.storage.files import require_writable
from llmprune.storage.folders import expanded, require_space


def extract(
    archive: str | Path, output: str | Path | None = None, *, dry_run: bool = False, watch: Watcher = ignore
) -> ArchiveReport:
    """Write the folder that `archive` has stored, every file bit for bit.

    Every block is checked by its digest before it is written, and the folder appears when all of it is there. An
    interrupted run continues when it is started again, after it has compared what it has written with the digests.

    Args:
        archive: the file.
        output: a folder that does not exist; default: the name of `archive` without ".llmprune".
        dry_run: decode and check everything, and write nothing.
        watch: told about every block.

    Raises:
        FormatError: `archive` is damaged, or is none; nothing is left of what was written.
        CheckpointError: it cannot be read, or the folder cannot be written.
        MissingPackageError: Python is older than 3.14 and backports.zstd is not installed.
        ResumeError: `output` exists, or another run is writing it.
    """
    zstd()
    source = user_path(archive, CheckpointError)
    target = _default(source) if output is None else expanded(output)
    require_absent(target)
    with _opened(source) as handle:
        if dry_run:
            return _checked(source, target, handle, watch)
        require_writable(target)
        with unfinished(target) as begun:
            begun.mkdir(exist_ok=True)
            report = _written(source, target, handle, begun, watch)
            finish(begun, target)
    return report


def _default(source: Path) -> Path:
    if source.suffix != SUFFIX:
        raise CheckpointError(
            f"no folder to extract {source} to",
            expected=f"a name that ends in {SUFFIX}",
            fix="choose one with --output",
        )
    return source.with_suffix("")


def _opened(source: Path) -> BinaryIO:
    try:
        if source.exists() and not source.is_file():
            raise IsADirectoryError("it is not a file")
        return source.open("rb")
    except OSError as error:
        raise CheckpointError(
            f"{source} cannot be read: {error}", expected="what `llmprune archive` wrote", fix="check the path"
        ) from error


def _checked(source: Path, target: Path, handle: BinaryIO, watch: Watcher) -> ArchiveReport:
    rows = _Rows(source, target, "checking", watch)
    for item in _items(source, handle):
        if isinstance(item, Block):
            item.raw()
        rows.add(item)
    return rows.report()


def _written(source: Path, target: Path, handle: BinaryIO, begun: Path, watch: Watcher) -> ArchiveReport:
    rows = _Rows(source, target, "extracting", watch)
    file: BinaryIO | None = None
    try:
        for item in _items(source, handle):
            if isinstance(item, Contents):
                kept = sum(path.stat().st_size for path in begun.rglob("*") if path.is_file())
                require_space(target, item.bytes - kept)
            elif isinstance(item, FileEntry):
                _end(file)
                file = _begin(begun / item.name)
            else:
                assert file is not None  # a block without a file is refused when it is read
                _put(file, item)
            rows.add(item)
        _end(file)
    finally:
        if file is not None:
            file.close()
    _remove_others(begun, {row.file for row in rows.rows})
    return rows.report()


def _items(source: Path, handle: BinaryIO) -> Iterator[Contents | FileEntry | Block]:
    return ArchiveReader(source, handle).items()


class _Rows:
    """Counts what is read."""

    def __init__(self, source: Path, target: Path, stage: str, watch: Watcher) -> None:
        self._source, self._target, self._stage, self._watch = source, target, stage, watch
        self._counter: Counter | None = None
        self._dense = 0
        self.rows: list[ArchiveRow] = []

    def add(self, item: Contents | FileEntry | Block) -> None:
        if isinstance(item, Contents):
            self._counter, self._dense = Counter(self._stage, item.bytes, self._watch), item.dense_bytes
        elif isinstance(item, FileEntry):
            self.rows.append(ArchiveRow(item.name, item.bytes, 0))
        else:
            assert self._counter is not None
            last = self.rows[-1]
            self.rows[-1] = ArchiveRow(last.file, last.bytes, last.coded_bytes + item.coded_bytes)
            self._counter.add(item.entry.bytes, last.file)

    def report(self) -> ArchiveReport:
        return ArchiveReport(self._source, self._target, tuple(self.rows), self._dense)


def _begin(path: Path) -> BinaryIO:
    """Open a file to write it, with what an interrupted run has written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()  # none of ours is a link
    path.touch()
    return path.open("r+b")


def _put(file: BinaryIO, block: Block) -> None:
    """Write the next block, unless it is there."""
    position = file.tell()
    there = file.read(block.entry.bytes)
    if hashlib.sha256(there).hexdigest() != block.entry.sha256:
        file.seek(position)
        file.write(block.raw())


def _end(file: BinaryIO | None) -> None:
    """Truncate the file after the last block, and flush the rest to disk."""
    if file is not None:
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
        file.close()


def _remove_others(begun: Path, names: set[str]) -> None:
    """Remove what an interrupted run has left of another archive."""
    for path in sorted(begun.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(begun).as_posix() not in names:
            path.unlink()
