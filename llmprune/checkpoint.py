"""Read a safetensors checkpoint one tensor at a time, and write shards atomically."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmprune.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint: where it is and what it is, without its values."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def __getitem__(self, index: object) -> Tensor:
        """Read it: a fresh copy, independent of the file (transformers reads its lazy tensors as `tensor[...]`)."""
        with _open(self.file) as handle:
            # Cloned because a mapped tensor may be misaligned, and results depend on alignment in the last bit.
            return handle.get_tensor(self.key).clone()

    def get_dtype(self) -> str:
        """The safetensors name of the dtype, as transformers asks for it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def read_index(folder: Path) -> dict[str, Stored]:
    """List the tensors of a checkpoint folder without reading them.

    Raises:
        CheckpointError: no safetensors, or a shard missing, truncated, corrupted or without a tensor of the index.
    """
    index = folder / INDEX_NAME
    weight_map = None
    files = {folder / SINGLE_NAME}
    if index.exists() and not (folder / SINGLE_NAME).exists():  # transformers prefers the single file as well
        weight_map = _read_weight_map(index)
        files = {folder / name for name in weight_map.values()}
    tensors: dict[str, Stored] = {}
    for file in sorted(files):
        tensors.update({stored.key: stored for stored in read_header(file)})
    if weight_map is None:
        return tensors
    if absent := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(
            f"{folder / weight_map[absent[0]]} lacks {absent[0]!r}" + _and_more(absent),
            expected=f"every tensor that {INDEX_NAME} names",
            fix="download the checkpoint again",
        )
    return {key: tensors[key] for key in weight_map}


def read_header(file: Path) -> list[Stored]:
    """List the tensors of one safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or corrupted.
    """
    with _open(file) as handle:
        found = []
        for key in handle.keys():  # noqa: SIM118 - safe_open is no mapping
            part = handle.get_slice(key)
            if part.get_dtype() not in DTYPES:
                raise CheckpointError(f"{file}: {key!r} has dtype {part.get_dtype()}", expected=", ".join(DTYPES))
            found.append(Stored(key, file, tuple(part.get_shape()), DTYPES[part.get_dtype()]))
    return found


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file so that it is either complete or absent.

    Returns:
        The sha256 of the file.

    Raises:
        CheckpointError: the disk is full or not writable; nothing is left behind.
    """
    temporary = file.with_name(f".{file.name}.partial")
    contiguous = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    with removed_on_failure(temporary):
        save_file(contiguous, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors creates private files
        digest = file_digest(temporary)
        publish(temporary, file)
    return digest


def write_text(file: Path, text: str) -> None:
    """Write a text file so that it is either the old one or the new one, never half of it."""
    temporary = file.with_name(f".{file.name}.partial")
    with removed_on_failure(temporary):
        temporary.write_text(text, encoding="utf-8")
        publish(temporary, file)


def write_json(file: Path, content: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    write_text(file, json.dumps(content, indent=2, allow_nan=False) + "\n")


def publish(temporary: Path, file: Path) -> None:
    """Flush a finished file to disk and give it its name."""
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(file)


@contextlib.contextmanager
def removed_on_failure(temporary: Path) -> Iterator[None]:
    """Turn a failed write into a `CheckpointError` and leave no partial file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {temporary.parent}: {error}",
            expected="a writable folder with enough free space",
            fix="free some space or mend the permissions, then run again with --resume",
        ) from error


def file_digest(file: Path) -> str:
    """The sha256 of a file's content, as hex."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        handle = safe_open(file, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} does not exist", expected="a safetensors file", fix="download the checkpoint again"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or corrupted: {error}",
            expected="a complete safetensors file",
            fix="download the checkpoint again",
        ) from error
    with handle:
        yield handle


def _read_weight_map(index: Path) -> dict[str, str]:
    fix = "download the checkpoint again"
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}", fix=fix) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", expected="tensor names and their files", fix=fix)
    return weight_map


def _and_more(items: list[str]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
