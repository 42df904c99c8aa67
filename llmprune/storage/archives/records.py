"""The records of an archive: written, and read at one gate, behind which every field has its type and its range."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, RootModel

from llmprune.errors import CheckpointError, FormatError, LlmpruneError
from llmprune.storage.archives.coding import Coding, decode
from llmprune.storage.records import CLOSED, is_plain_name, parsed

MAGIC = b"llmprune archive 1\n"
_ANY_VERSION = b"llmprune archive "

# The longest block, which bounds the memory of reading and writing.
BLOCK_BYTES = 1 << 24
# A part is at most a plane of a block; what cannot be compressed becomes a little longer.
_PART_BYTES = BLOCK_BYTES + (1 << 17)
_RECORD_BYTES = 1 << 16
_NAME_PARTS = 16

_FIX = "copy the archive again, or make it anew"


def is_inside_folder(name: str) -> bool:
    """Whether a path with / is that of a file in a folder, in UTF-8."""
    parts = PurePosixPath(name).parts
    plain = str(PurePosixPath(name)) == name and 0 < len(parts) <= _NAME_PARTS and all(map(is_plain_name, parts))
    return plain and name == name.encode(errors="ignore").decode()


def _require_inside(name: str) -> str:
    if not is_inside_folder(name):
        raise ValueError("not a valid path of a file inside a folder")
    return name


Size = Annotated[int, Field(ge=0, le=1 << 60)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, AfterValidator(_require_inside)]


@dataclass(frozen=True, slots=True)
class Contents:
    """What an archive holds, its first record.

    Attributes:
        files: their number.
        bytes: of all files.
        dense_bytes: of the checkpoint's tensors if none were packed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    files: Annotated[int, Field(ge=1, le=1_000_000)]
    bytes: Size
    dense_bytes: Size
    kind: Literal["contents"] = "contents"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """The beginning of a file.

    Attributes:
        name: its path in the folder, with /.
        bytes: its size.
    """

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    name: Name
    bytes: Size
    kind: Literal["file"] = "file"


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """The next bytes of a file; see `llmprune.storage.archives` for the fields."""

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    bytes: Annotated[int, Field(ge=1, le=BLOCK_BYTES)]
    word: Literal[1, 2, 4, 8]
    floating: bool
    mask: bool
    signs: bool
    parts: Annotated[tuple[Annotated[int, Field(ge=1, le=_PART_BYTES)], ...], Field(min_length=1, max_length=10)]
    sha256: Digest
    kind: Literal["block"] = "block"

    @property
    def coding(self) -> Coding:
        """How its bytes are coded."""
        return Coding(self.word, self.floating, self.mask, self.signs)


@dataclass(frozen=True, slots=True)
class End:
    """The last record: sha256 of everything before it."""

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    sha256: Digest
    kind: Literal["end"] = "end"


Entry = Contents | FileEntry | BlockEntry | End


class _Record(RootModel[Annotated[Entry, Field(discriminator="kind")]]):
    """Any record."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block as it lies in an archive: its record, the parts behind it, and its place for errors."""

    entry: BlockEntry
    parts: Sequence[bytes]
    place: str

    @property
    def coded_bytes(self) -> int:
        """Size of its parts."""
        return sum(self.entry.parts)

    def raw(self) -> bytes:
        """Its bytes, checked by their digest.

        Raises:
            FormatError: the parts are damaged.
        """
        try:
            raw = decode(self.entry.coding, self.entry.bytes, self.parts)
        except FormatError as error:
            raise error.at(self.place) from error
        if hashlib.sha256(raw).hexdigest() != self.entry.sha256:
            raise FormatError(
                f"{self.place}: a block with another digest", expected="the bytes that were archived", fix=_FIX
            )
        return raw


Item = Contents | FileEntry | Block
_Item = TypeVar("_Item", bound=Item)


def encoded(entry: Entry) -> bytes:
    """A record as it lies in an archive."""
    text = json.dumps(asdict(entry), separators=(",", ":")).encode()
    return len(text).to_bytes(4, "little") + text


class ArchiveReader:
    """Reads an archive from its beginning.

    Attributes:
        position: where the last whole item that was read ends, in bytes.
        digest: of everything before it.
    """

    def __init__(self, file: Path, handle: BinaryIO) -> None:
        self._file, self._handle = file, handle
        self.position, self.digest = 0, hashlib.sha256()
        self._pending: list[bytes] = []

    def items(self) -> Iterator[Item]:
        """The items in their order; complete, and the whole archive checked, when they end without an error.

        Raises:
            FormatError: the archive is damaged, ends early, or is none.
            CheckpointError: it cannot be read.
        """
        try:
            yield from self._items()
        except LlmpruneError as error:
            raise error.at(self._place()) from error

    def _place(self) -> str:
        return f"{self._file}, at byte {self.position:,}"

    def _items(self) -> Iterator[Item]:
        self._require_magic()
        contents = self._entry()
        if not isinstance(contents, Contents):
            raise _unexpected(contents, "the record of its contents")
        yield self._whole(contents)
        names = _Names()
        total = 0
        for _ in range(contents.files):
            entry = self._entry()
            if not isinstance(entry, FileEntry):
                raise _unexpected(entry, "a file")
            names.add(entry.name)
            total += entry.bytes
            if total > contents.bytes:
                raise FormatError("files that are longer than all of them", expected=f"{contents.bytes:,} B", fix=_FIX)
            yield self._whole(entry)
            yield from self._blocks(entry)
        if total != contents.bytes:
            raise FormatError(f"files of {total:,} B", expected=f"{contents.bytes:,} B", fix=_FIX)
        self._require_end()

    def _blocks(self, file: FileEntry) -> Iterator[Block]:
        left = file.bytes
        while left:
            entry = self._entry()
            if not isinstance(entry, BlockEntry) or entry.bytes > left:
                raise _unexpected(entry, f"a block of at most {left:,} B of {file.name}")
            yield self._whole(Block(entry, [self._read(size) for size in entry.parts], self._place()))
            left -= entry.bytes

    def _require_magic(self) -> None:
        line = self._read(len(MAGIC), least=0)
        if line != MAGIC:
            newer = line.startswith(_ANY_VERSION)
            raise FormatError(
                "an archive of another version" if newer else "not an archive",
                expected=f"a file that begins with {MAGIC.decode()!r}, which `llmprune archive` wrote",
                fix="upgrade llmprune" if newer else "check the path",
            )

    def _require_end(self) -> None:
        expected = self.digest.hexdigest()
        entry = self._entry()
        if not isinstance(entry, End):
            raise _unexpected(entry, "the end")
        if entry.sha256 != expected or self._handle.read(1):
            what = "bytes after the end" if entry.sha256 == expected else "another digest than it had"
            raise FormatError(what, expected="the archive as it was written", fix=_FIX)

    def _whole(self, item: _Item) -> _Item:
        """Count what was read since the last whole item."""
        for data in self._pending:
            self.digest.update(data)
            self.position += len(data)
        self._pending.clear()
        return item

    def _entry(self) -> Entry:
        length = int.from_bytes(self._read(4), "little")
        if not 0 < length <= _RECORD_BYTES:
            raise FormatError(f"a record of {length:,} B", expected=f"at most {_RECORD_BYTES:,} B", fix=_FIX)
        text = self._read(length)
        return parsed(text, _Record, "a record", expected="one of an archive", fix=_FIX, raised=FormatError).root

    def _read(self, size: int, least: int | None = None) -> bytes:
        try:
            data = self._handle.read(size)
        except OSError as error:
            raise CheckpointError(f"it cannot be read: {error}", expected="a complete archive", fix=_FIX) from error
        if len(data) < (size if least is None else least):
            raise FormatError("it ends too early", expected="a complete archive", fix=_FIX)
        self._pending.append(data)
        return data


class _Names:
    """The names of an archive's files, of which none may be a folder of another."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def add(self, name: str) -> None:
        folders = {str(parent) for parent in PurePosixPath(name).parents}
        if name in self._files or name in self._folders or folders & self._files:
            raise FormatError(f"the file {name!r} twice", expected="files with names of their own", fix=_FIX)
        self._files.add(name)
        self._folders |= folders


def _unexpected(entry: Entry, expected: str) -> FormatError:
    return FormatError(f"a record {entry.kind!r}", expected=expected, fix=_FIX)
