"""Write a checkpoint folder as an archive; after an interruption, go on where it stopped."""

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from llmprune.errors import CheckpointError, LlmpruneError
from llmprune.progress import Progress, Watcher, ignore
from llmprune.storage.archives.coding import encode, zstd
from llmprune.storage.archives.contents import Member, Span, members
from llmprune.storage.archives.counter import Counter
from llmprune.storage.archives.records import (
    MAGIC,
    ArchiveReader,
    Block,
    BlockEntry,
    Contents,
    End,
    FileEntry,
    encoded,
)
from llmprune.storage.archives.report import ArchiveReport, ArchiveRow
from llmprune.storage.archives.unfinished import finish, require_absent, unfinished
from llmprune.storage.companions import CONFIG_NAME
from llmprune.storage.files import read_index, read_json, require_writable
from llmprune.storage.folders import checkpoint_folder, expanded
from llmprune.storage.packed_config import as_dense, packed_layouts

SUFFIX = ".llmprune"

# How many blocks a dry run codes: a second or a few.
_SAMPLED_BLOCKS = 24


def archive(
    folder: str | Path, output: str | Path | None = None, *, dry_run: bool = False, watch: Watcher = ignore
) -> ArchiveReport:
    """Store a checkpoint folder as one compressed file, for when it is not in use; lossless.

    Dense, packed and structurally pruned checkpoints, with everything else in the folder except what is hidden or leads
    out of it. What has been coded is decoded again and compared before it is written. Takes the memory of one block of
    16 MiB, a few times over. A run that is interrupted continues when it is started again, after it has compared what
    it has written with the files.

    Args:
        folder: a local folder with config.json and safetensors.
        output: the archive; default: the name of `folder` with ".llmprune" appended.
        dry_run: write nothing; sizes are estimated from some of the blocks if there are many.
        watch: told about every block.

    Raises:
        CheckpointError: `folder` is no checkpoint, is damaged or changes meanwhile, or the archive cannot be written.
        MissingPackageError: Python is older than 3.14 and backports.zstd is not installed.
        ResumeError: `output` exists, is inside `folder`, or another run is writing it.
    """
    zstd()
    source = checkpoint_folder(folder)
    target = source.with_name(source.name + SUFFIX) if output is None else expanded(output)
    require_absent(target, outside=source)
    require_writable(target)
    stored, layouts = read_index(source), packed_layouts(read_json(source / CONFIG_NAME))
    found, left_out = members(source)
    for sentence in left_out:
        watch(Progress(sentence))
    dense = sum(tensor.nbytes for tensor in as_dense(stored, layouts).values())
    contents = Contents(len(found), sum(member.bytes for member in found), dense)
    if dry_run:
        rows, estimated = _estimated(found, watch)
        return ArchiveReport(target, source, rows, dense, estimated)
    with unfinished(target) as begun:
        with contextlib.closing(_Writer(begun)) as writer:
            rows = tuple(writer.write(contents, found, watch))
        finish(begun, target)
    return ArchiveReport(target, source, rows, dense)


class _Writer:
    """Writes the records of an archive, those that are there already as long as they are the same."""

    def __init__(self, file: Path) -> None:
        file.touch()
        self._handle: BinaryIO = file.open("r+b")
        self._reader = ArchiveReader(file, self._handle)
        self._kept: Iterator[Contents | FileEntry | Block] | None = self._reader.items()
        self._before = 0, hashlib.sha256()
        self._digest = hashlib.sha256()

    def close(self) -> None:
        self._handle.close()

    def write(self, contents: Contents, found: list[Member], watch: Watcher) -> Iterator[ArchiveRow]:
        """Write everything; yields a row for each file."""
        self._put(contents)
        counter = Counter("archiving", contents.bytes, watch)
        for member in found:
            self._put(FileEntry(member.name, member.bytes))
            coded = 0
            for span, raw in _blocks(member, member.spans):
                coded += self._put_block(raw, span)
                counter.add(len(raw), member.name)
            member.require_unchanged()
            yield ArchiveRow(member.name, member.bytes, coded)
        self._next_kept()
        self._begin_writing()
        self._append(encoded(End(self._digest.hexdigest())))
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def _put(self, entry: Contents | FileEntry) -> None:
        if self._next_kept() != entry:
            self._begin_writing()
            self._append(encoded(entry))

    def _put_block(self, raw: bytes, span: Span) -> int:
        """Write a block; returns the size of its parts."""
        digest = hashlib.sha256(raw).hexdigest()
        kept = self._next_kept()
        if isinstance(kept, Block) and (kept.entry.bytes, kept.entry.sha256) == (len(raw), digest) and _is_sound(kept):
            return kept.coded_bytes
        self._begin_writing()
        block = _coded(raw, span)
        self._append(encoded(block.entry), *block.parts)
        return block.coded_bytes

    def _next_kept(self) -> Contents | FileEntry | Block | None:
        """The next item of the interrupted run; None where it stopped."""
        if self._kept is None:
            return None
        self._before = self._reader.position, self._reader.digest.copy()
        try:
            return next(self._kept, None)
        except LlmpruneError:
            return None

    def _begin_writing(self) -> None:
        """From here on, nothing of the interrupted run is kept."""
        if self._kept is None:
            return
        position, self._digest = self._before
        self._kept = None
        self._handle.seek(position)
        self._handle.truncate()
        if not position:
            self._append(MAGIC)

    def _append(self, *data: bytes) -> None:
        for part in data:
            self._handle.write(part)
            self._digest.update(part)


def _blocks(member: Member, spans: Sequence[Span]) -> Iterator[tuple[Span, bytes]]:
    """Read some of a file's blocks.

    Raises:
        CheckpointError: it cannot be read, or has become shorter.
    """
    try:
        with member.path.open("rb") as handle:
            for span in spans:
                handle.seek(span.start)
                raw = handle.read(span.end - span.start)
                if len(raw) < span.end - span.start:
                    member.require_unchanged()
                    raise OSError("it ends too early")
                yield span, raw
    except OSError as error:
        raise CheckpointError(
            f"{member.path} cannot be read: {error}", expected="files that you may read", fix="fix its permissions"
        ) from error


def _coded(raw: bytes, span: Span) -> Block:
    """A block of an archive, which has been decoded once to see that nothing is lost.

    Raises:
        FormatError: it cannot be decoded.
    """
    coding, parts = encode(raw, span.kind)
    sizes = tuple(len(part) for part in parts)
    entry = BlockEntry(len(raw), **asdict(coding), parts=sizes, sha256=hashlib.sha256(raw).hexdigest())
    block = Block(entry, parts, "a block")
    block.raw()
    return block


def _is_sound(block: Block) -> bool:
    try:
        block.raw()
    except LlmpruneError:
        return False
    return True


def _estimated(found: Sequence[Member], watch: Watcher) -> tuple[tuple[ArchiveRow, ...], bool]:
    """The rows of a dry run, and whether they are estimates."""
    places = [(member, span) for member in found for span in member.spans]
    # Drawn, because every n-th would be the same matrix of every layer.
    chosen = random.Random(0).sample(places, min(_SAMPLED_BLOCKS, len(places)))
    counter = Counter("estimating", sum(span.end - span.start for _, span in chosen), watch)
    sums: dict[str, tuple[int, int]] = {}
    for member, span in chosen:
        ((_, raw),) = _blocks(member, [span])
        before = sums.get(member.name, (0, 0))
        sums[member.name] = before[0] + len(raw), before[1] + _coded(raw, span).coded_bytes
        counter.add(len(raw), member.name)
    plain, coded = (sum(pair[place] for pair in sums.values()) for place in (0, 1))
    rows = []
    for member in found:
        of, size = sums.get(member.name, (plain, coded))
        rows.append(ArchiveRow(member.name, member.bytes, round(member.bytes * size / max(1, of))))
    return tuple(rows), len(chosen) < len(places)
