"""Read a safetensors checkpoint one tensor at a time, and write shards atomically.

Which files belong to a checkpoint is decided here, in the same way as in transformers: model.safetensors if it exists,
otherwise the files that model.safetensors.index.json names.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from llmprune.errors import CheckpointError
from llmprune.storage.records import is_plain_name, read_as

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# What torch.save writes is named so.
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_NAME_SHOWN = 80

# Elements read at a time when a tensor is converted to another dtype.
_READ_ELEMENTS = 1 << 22

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint: its place, shape and dtype, without its values.

    Attributes:
        key: its name in the checkpoint.
        file: the safetensors file that holds it.
        shape: its dimensions.
        dtype: its element type.
        span: offsets [start, end) of its bytes in the file.
    """

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    span: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return self.span[1] - self.span[0]

    def __getitem__(self, index: object) -> Tensor:
        """Read it: a fresh copy, independent of the file (transformers reads its lazy tensors as `tensor[...]`).

        Raises:
            CheckpointError: the file has disappeared or was truncated.
        """
        return self.read(self.dtype)

    def read(self, dtype: torch.dtype) -> Tensor:
        """Read it as another dtype, without a full copy in the stored dtype.

        Raises:
            CheckpointError: the file has disappeared or was truncated.
        """
        # Not memory-mapped: the file's pages would count towards memory in addition to the copy, and a mapped tensor
        # may be misaligned, which can change the last bit of results.
        values = torch.empty(math.prod(self.shape), dtype=dtype)
        with reading(self.file), self.file.open("rb") as handle:
            handle.seek(self.span[0])
            for part in values.split(_READ_ELEMENTS) if dtype != self.dtype else [values]:
                raw = part if dtype == self.dtype else torch.empty(len(part), dtype=self.dtype)
                if handle.readinto(raw.view(torch.uint8).numpy().data) < raw.nbytes:
                    raise OSError(f"it ends before the values of {self.key!r}")
                if raw is not part:
                    part.copy_(raw)
        return values.view(self.shape)

    def sample(self, pieces: int, elements: int) -> Tensor:
        """Read some of its values as a vector: a few runs, evenly spaced; all if they are not many more.

        Args:
            pieces: how many runs, at least 2.
            elements: values in each.

        Raises:
            CheckpointError: the file has disappeared or was truncated.
        """
        size = math.prod(self.shape)
        if size <= 2 * pieces * elements:
            return self[...].flatten()
        parts = []
        for piece in range(pieces):
            start = self.span[0] + (size - elements) * piece // (pieces - 1) * self.dtype.itemsize
            span = start, start + elements * self.dtype.itemsize
            parts.append(Stored(self.key, self.file, (elements,), self.dtype, span)[...])
        return torch.cat(parts)

    def get_dtype(self) -> str:
        """The safetensors name of the dtype, for transformers."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint, sorted by name.

    Other safetensors files in the folder (original or consolidated copies) are not part of the checkpoint.

    Raises:
        CheckpointError: neither a single file nor an index exists, the index cannot be read, or it names a file that
            does not exist.
    """
    names = shard_names(folder)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder / INDEX_NAME} names files that do not exist ({len(missing)} of {len(names)}): {listed(missing)}",
            fix="download or copy the missing files into the folder",
        )
    return [folder / name for name in names]


def shard_names(folder: Path) -> list[str]:
    """Name the safetensors files that make up a checkpoint, whether they exist or not.

    Raises:
        CheckpointError: neither a single file nor an index exists, or the index cannot be read.
    """
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    if not (folder / INDEX_NAME).is_file():
        raise without_weights(str(folder), [path.name for path in folder.iterdir()] if folder.is_dir() else [])
    return indexed_files(folder)


def indexed_files(folder: Path) -> list[str]:
    """Name the files that the index of a checkpoint names.

    Raises:
        CheckpointError: the index cannot be read.
    """
    return sorted(set(_read_weight_map(folder / INDEX_NAME).values()))


def read_index(folder: Path) -> dict[str, Stored]:
    """List the tensors of a checkpoint folder without reading them.

    Raises:
        CheckpointError: there are no safetensors files, or a shard is missing, truncated, corrupted or lacks a tensor
            that the index names.
    """
    files = weight_files(folder)
    tensors = {stored.key: stored for file in files for stored in read_header(file)}
    if files == [folder / SINGLE_NAME]:
        return tensors
    weight_map = _read_weight_map(folder / INDEX_NAME)
    if absent := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(
            f"{folder / weight_map[absent[0]]} lacks {listed([repr(key) for key in absent], most=1)}",
            expected=f"every tensor that {INDEX_NAME} names",
            fix="download the checkpoint again",
        )
    return {key: tensors[key] for key in weight_map}


def read_header(file: Path) -> list[Stored]:
    """List the tensors of one safetensors file, sorted by key.

    Raises:
        CheckpointError: the file is missing, truncated or corrupted, or has a dtype that is not supported.
    """
    header = header_bytes(file)
    found = []
    for key, entry in sorted(json.loads(header).items()):
        if key == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{file}: {key!r} has dtype {entry['dtype']}", expected=", ".join(DTYPES))
        start, end = (8 + len(header) + offset for offset in entry["data_offsets"])
        found.append(Stored(key, file, tuple(entry["shape"]), DTYPES[entry["dtype"]], (start, end)))
    return found


def header_bytes(file: Path) -> bytes:
    """The JSON header of a safetensors file, which follows the 8 bytes of its length.

    Raises:
        CheckpointError: the file is missing, truncated or corrupted.
    """
    # safe_open refuses inconsistent headers: lengths, shapes, overlaps, gaps. For torch it would map the file as memory
    # that can be written, which the system refuses where the file is larger than the machine's memory.
    with reading(file), _open_plain(file) as handle, safe_open(file, framework="np"):
        return handle.read(int.from_bytes(handle.read(8), "little"))


def _open_plain(file: Path) -> BinaryIO:
    """Open a file, unless reading it could wait for ever; unlike safetensors, say why it cannot be opened."""
    if file.exists() and not file.is_file():
        raise OSError("it is not a file")
    return file.open("rb")


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file so that it is either complete or absent.

    Returns:
        The sha256 of the file.

    Raises:
        CheckpointError: the disk is full or the folder is not writable; no partial file is left.
    """
    temporary = file.with_name(f".{file.name}.partial")
    contiguous = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    with removed_on_failure(temporary):
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(contiguous, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # safetensors creates files that only their owner can read, whatever the umask
        digest = file_digest(temporary)
        publish(temporary, file)
    return digest


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the old content or the new, never a part."""
    temporary = file.with_name(f".{file.name}.partial")
    with removed_on_failure(temporary):
        temporary.write_text(text, encoding="utf-8")
        publish(temporary, file)


def write_json(file: Path, content: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    write_text(file, json.dumps(content, indent=2, allow_nan=False) + "\n")


def require_writable(file: Path) -> None:
    """Refuse a place where `write_text` could not write, before the work whose result belongs there.

    Raises:
        CheckpointError: the folder, or the nearest one that exists, is not writable, or it is a file.
    """
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK) or file.is_dir():
        raise CheckpointError(
            f"cannot write {file}: {file if file.is_dir() else folder} is not a writable "
            + ("file" if file.is_dir() else "folder"),
            expected="a file in a writable folder",
            fix="fix the permissions, or choose another place with --output where the command has this option",
        )


def publish(temporary: Path, file: Path) -> None:
    """Flush a finished file to disk and rename it to its final name."""
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
            fix="free some space or fix the permissions, then run the command again (a run or a sweep with --resume)",
        ) from error


def file_digest(file: Path) -> str:
    """The sha256 of a file's content, as hex."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def reading(file: Path, fix: str = "download the checkpoint again") -> Iterator[None]:
    """Turn a safetensors file that cannot be read into a `CheckpointError`, with this way out."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist", expected="a safetensors file", fix=fix) from None
    except PermissionError as error:
        raise CheckpointError(
            f"{file} cannot be read: permission denied", expected="a file that you may read", fix="fix its permissions"
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or corrupted: {error}",
            expected="a complete safetensors file",
            fix=fix,
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file cannot be read, or holds another JSON type.
    """
    fix = "download or copy the file again; it may be truncated"
    return read_as(path, dict[str, Any], expected="a JSON object", fix=fix)


def without_weights(where: str, names: Sequence[str]) -> CheckpointError:
    """The error for a folder or repository with these file names, which is not a readable checkpoint."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    others = sorted(name for name in names if name.endswith((".safetensors", ".gguf")))
    if pickles:
        what = f"{where} has only pickled weights, which can run code when they are read: {listed(pickles)}"
        fix = "convert it once: AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER) writes safetensors"
    elif others:
        what = f"{where} has neither {SINGLE_NAME} nor {INDEX_NAME}, only {listed(others)}"
        fix = "use the folder or repository that transformers' from_pretrained loads"
    else:
        what = f"{where} has no weights"
        fix = "check that this is a model and that its download is complete"
    return CheckpointError(what, expected=f"{SINGLE_NAME}, or {INDEX_NAME} and the files that it names", fix=fix)


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first names, followed by the number of those left out."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class _Index(TypedDict):
    weight_map: dict[str, str]


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_SHOWN else f"{name[:_NAME_SHOWN]}..."


def _read_weight_map(index: Path) -> dict[str, str]:
    fix = "download or copy the file again"
    weight_map = read_as(index, _Index, expected="a JSON object with a weight_map", fix=fix)["weight_map"]
    if not weight_map:
        raise CheckpointError(
            f"{index} has an empty weight_map", expected="a JSON object that maps tensor names to file names", fix=fix
        )
    names = sorted(set(weight_map.values()))
    # Only plain file names: a path could lead out of the folder.
    if strange := [name for name in names if not is_plain_name(name) or not name.endswith(".safetensors")]:
        raise CheckpointError(
            f"{index} names {listed([_shortened(name) for name in strange])}",
            expected="names of safetensors files in the same folder",
            fix="save the model again with save_pretrained",
        )
    return weight_map
