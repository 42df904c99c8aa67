"""GGUF files, made by llama.cpp's own converter where it is installed."""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmprune.errors import CheckpointError, MissingPackageError, ModelError
from llmprune.paths import user_path
from llmprune.progress import Progress, Watcher
from llmprune.pruning.packing import unpack
from llmprune.storage.companions import CONFIG_NAME
from llmprune.storage.files import read_json
from llmprune.storage.folders import writing_to
from llmprune.storage.packed_config import is_uneven, packed_layouts

CONVERTER_NAME = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP"

_MAGIC = b"GGUF"
# Magic, version, number of tensors, number of values.
_HEADER_BYTES = 4 + 4 + 8 + 8
_SHOWN = 300


def find_converter(llama_cpp: str | Path | None) -> Path:
    """The converter of llama.cpp.

    Args:
        llama_cpp: a clone of llama.cpp, or the converter in it; None: what the variable LLAMA_CPP names.

    Raises:
        MissingPackageError: it is not there.
    """
    named = llama_cpp if llama_cpp is not None else os.environ.get(VARIABLE)
    if named is None:
        raise MissingPackageError(
            "a GGUF file needs llama.cpp's converter, and nothing says where it is",
            expected=f"--llama-cpp FOLDER, or the variable {VARIABLE}: a clone of llama.cpp",
            fix="git clone https://github.com/ggml-org/llama.cpp, and name that folder",
        )
    path = user_path(named, MissingPackageError)
    converter = path / CONVERTER_NAME if path.is_dir() else path
    if not converter.is_file():
        raise MissingPackageError(
            f"llama.cpp's converter is not at {converter}",
            expected=f"a clone of llama.cpp, which has {CONVERTER_NAME}",
            fix=f"correct --llama-cpp or the variable {VARIABLE}",
        )
    return converter.absolute()


def require_convertible(source: Path) -> None:
    """Refuse a checkpoint whose decoder layers differ in size.

    Raises:
        ModelError: they do.
    """
    if is_uneven(read_json(source / CONFIG_NAME)):
        raise ModelError(
            f"{source} has decoder layers that differ in size, or lack a block",
            expected="layers of one size: llama.cpp reads one number of heads and one width for all layers",
            fix="remove the same from every layer, or export it to onnx",
        )


def write_gguf(source: Path, target: Path, converter: Path, kind: str, watch: Watcher) -> dict[str, str]:
    """Write a GGUF file; a packed checkpoint is unpacked beside it for as long as that takes.

    Args:
        source: a checkpoint folder, dense or packed.
        target: the file; replaced once the new one is whole.
        converter: as `find_converter` found it.
        kind: the converter's `--outtype`: "auto", "f32", "f16", "bf16", "q8_0", ...
        watch: told about every step.

    Returns:
        Facts for the report.

    Raises:
        ModelError: the converter does not accept the model.
        CheckpointError: the file cannot be written, or is not what the converter should write.
    """
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
            folder, made = source, Path(work) / target.name
            if packed_layouts(read_json(source / CONFIG_NAME)):
                folder = unpack(source, Path(work) / "dense", watch=watch).folder
            watch(Progress("converting by llama.cpp"))
            _run([sys.executable, str(converter), str(folder), "--outfile", str(made), "--outtype", kind], source)
            tensors = _tensors(made)
            made.replace(target)
    return {"tensors": str(tensors), "type": kind, "made by": str(converter)}


def _run(command: Sequence[str], source: Path) -> None:
    """Run the converter; it inherits no input, and its output is shown only if it fails."""
    done = subprocess.run(
        command, capture_output=True, stdin=subprocess.DEVNULL, text=True, errors="replace", check=False
    )
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        said = lines[-1][:_SHOWN] if lines else f"exit code {done.returncode}"
        raise ModelError(
            f"llama.cpp's converter failed on {source}: {said}",
            expected="an architecture that it converts, and the packages that it needs",
            fix=f"update llama.cpp; for all that it says, run {shlex.join(command[:2])} on a dense folder",
        )


def _tensors(file: Path) -> int:
    """The number of tensors in a GGUF file, from its header."""
    header = b""
    if file.is_file():
        with file.open("rb") as handle:
            header = handle.read(_HEADER_BYTES)
    count = int.from_bytes(header[8:16], "little")
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC) or not count:
        raise CheckpointError(
            f"llama.cpp's converter did not write {file.name}, or not as GGUF",
            expected="a GGUF file with tensors",
            fix="update llama.cpp",
        )
    return count
