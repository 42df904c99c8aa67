"""What of a folder goes into an archive: its files, cut into blocks by their tensors."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmprune.errors import CheckpointError
from llmprune.storage.archives.coding import Kind
from llmprune.storage.archives.records import BLOCK_BYTES, is_inside_folder
from llmprune.storage.companions import is_inside
from llmprune.storage.files import read_header
from llmprune.storage.folders import LOCK_NAME, STAGING_NAME

# Tensors of one kind that are smaller than this share blocks: biases and norms.
_SMALL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of a file that make a block.

    Attributes:
        start: offset of the first byte.
        end: offset after the last.
        kind: what they are.
    """

    start: int
    end: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Member:
    """A file of a folder.

    Attributes:
        name: its path in the folder, with /.
        path: where it is.
        spans: all of its bytes.
        look: its size and time of change when it was found.
    """

    name: str
    path: Path
    spans: tuple[Span, ...]
    look: tuple[int, int]

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.look[0]

    def require_unchanged(self) -> None:
        """Refuse to go on with a file that has changed since it was found.

        Raises:
            CheckpointError: it has.
        """
        if _look(self.path) != self.look:
            raise CheckpointError(
                f"{self.path} has changed while it was read",
                expected="a folder that stays as it is until the archive is written",
                fix="run the command again: what has not changed is kept",
            )


def members(folder: Path) -> tuple[list[Member], list[str]]:
    """The files to archive, in the order of their names, and a sentence about each that is left out.

    Everything in the folder belongs to the archive, except hidden folders (.git, .cache), what is no file, and links
    that lead out of the checkpoint.

    Raises:
        CheckpointError: a name is not UTF-8, or lies too deep, or a folder cannot be listed.
    """
    try:
        return _members(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be archived whole: {error}",
            expected="folders that you may list, and files that you may read",
            fix="fix the permissions, or move what must not be read out of the folder",
        ) from error


def _members(folder: Path) -> tuple[list[Member], list[str]]:
    found, left_out = [], []
    for path in sorted(_paths(folder)):
        name = path.relative_to(folder).as_posix()
        if _is_hidden(path.name) and path.is_dir():
            left_out.append(f"{name} was left out: it is a hidden folder")
        elif not path.is_file():
            left_out.append(f"{name} was left out: it is not a file")
        elif not is_inside_folder(name):
            raise CheckpointError(
                f"a file of {folder} is named {name!a}",
                expected="a name in UTF-8, at most 16 folders deep",
                fix="rename it, or move it out of the folder",
            )
        elif not is_inside(path.resolve(), folder.resolve()):
            left_out.append(f"{name} was left out: it is a link that leads out of {folder}")
        else:
            look = _look(path)
            found.append(Member(name, path, tuple(_spans(path, look[0])), look))
    return found, left_out


def _paths(folder: Path) -> Iterator[Path]:
    """Files, links, and hidden folders without what is in them."""
    for parent, folders, files in os.walk(folder, onerror=_raise):
        apart = [name for name in folders if _is_hidden(name) or (Path(parent) / name).is_symlink()]
        folders[:] = [name for name in folders if not _is_hidden(name)]
        passing = (LOCK_NAME, STAGING_NAME)
        yield from (Path(parent) / name for name in (*files, *apart) if name not in passing and not _unfinished(name))


def _raise(error: OSError) -> None:
    raise error


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _unfinished(name: str) -> bool:
    return _is_hidden(name) and name.endswith(".partial")


def _spans(file: Path, size: int) -> Iterator[Span]:
    start = 0
    for span in _merged(_tensors(file)) if file.suffix == ".safetensors" else ():
        if span.start > start:  # the header, at the beginning
            yield from _cut(Span(start, span.start, Kind()))
        yield from _cut(span)
        start = span.end
    yield from _cut(Span(start, size, Kind()))


def _tensors(file: Path) -> list[Span]:
    """The spans of a file's tensors; none if it only has the name of a safetensors file."""
    try:
        stored = sorted(read_header(file), key=lambda tensor: tensor.span)
    except CheckpointError:
        return []
    return [
        Span(*tensor.span, Kind(tensor.dtype.itemsize, tensor.dtype.is_floating_point, text=False))
        for tensor in stored
        if tensor.nbytes
    ]


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last and (last.end, last.kind) == (span.start, span.kind) and span.end - last.start <= _SMALL_BYTES:
            merged[-1] = Span(last.start, span.end, span.kind)
        else:
            merged.append(span)
    return merged


def _cut(span: Span) -> Iterator[Span]:
    # A multiple of every word.
    for start in range(span.start, span.end, BLOCK_BYTES):
        yield Span(start, min(start + BLOCK_BYTES, span.end), span.kind)


def _look(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
