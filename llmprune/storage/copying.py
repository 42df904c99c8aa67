"""Copy tensors from the files of a checkpoint into new ones without holding any of them in memory."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmprune.errors import CheckpointError
from llmprune.storage.files import Stored, publish, reading, removed_on_failure

# The size up to which tensors share a file; a larger tensor has one of its own.
_SHARD_BYTES = 5_000_000_000
_CHUNK_BYTES = 1 << 22
# A header is padded to this, so that the values behind it are aligned.
_ALIGNMENT = 8


def in_shards(tensors: Sequence[Stored]) -> list[list[Stored]]:
    """Divide tensors into groups of at most 5 GB, in their order."""
    shards: list[list[Stored]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def copy_tensors(file: Path, tensors: Sequence[Stored]) -> str:
    """Write a safetensors file with the bytes of these tensors, so that it is either complete or absent.

    Takes 4 MB of memory, whatever the sizes of the tensors.

    Returns:
        The sha256 of the file.

    Raises:
        CheckpointError: a source is truncated, the disk is full, or the folder is not writable.
    """
    # As safetensors orders them: wide dtypes first, so that every tensor is aligned.
    ordered = sorted(tensors, key=lambda stored: (-stored.dtype.itemsize, stored.key))
    temporary = file.with_name(f".{file.name}.partial")
    digest = hashlib.sha256()
    try:
        with removed_on_failure(temporary):
            with temporary.open("wb") as handle:
                for data in itertools.chain([_header(ordered)], *map(_chunks, ordered)):
                    handle.write(data)
                    digest.update(data)
            publish(temporary, file)
    except CheckpointError:
        temporary.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _header(ordered: Sequence[Stored]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for stored in ordered:
        end = start + stored.nbytes
        header[stored.key] = {"dtype": stored.get_dtype(), "shape": stored.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _chunks(stored: Stored) -> Iterator[bytes]:
    left = stored.nbytes
    with reading(stored.file), stored.file.open("rb") as handle:
        handle.seek(stored.span[0])
        while left:
            data = handle.read(min(left, _CHUNK_BYTES))
            if not data:
                raise OSError(f"it ends before the values of {stored.key!r}")
            left -= len(data)
            yield data
