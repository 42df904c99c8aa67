"""What the tests ask of checkpoint folders: their tensors, their bytes, and what two runs must have in common."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llmprune.storage.report import Report

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file, read by safetensors itself."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def tensor_bytes(folder: Path) -> int:
    """The size of all its tensors."""
    return sum(tensor.nbytes for tensor in tensors(folder).values())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def weights_and_texts(folder: Path) -> dict[str, bytes]:
    """What two runs of one recipe must agree on to the byte: all but the files that hold times."""
    timed = {"report.json", "report.html", ".llmprune.json"}
    return {name: content for name, content in contents(folder).items() if name not in timed}


def unlisted(folder: Path) -> dict[str, bytes]:
    """Every file below the folder but the manifest, which lists them."""
    return {name: content for name, content in contents(folder).items() if name != ".llmprune.json"}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, so that -0.0 and 0.0 differ and NaN equals itself."""
    return tensor.contiguous().view(_BITS[tensor.dtype.itemsize])


def same(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and all bits are equal."""
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def zeros(tensor: Tensor) -> int:
    """Zeros, counted."""
    return tensor.numel() - int(torch.count_nonzero(tensor))


def untimed(report: Report) -> dict[str, Any]:
    """A report without what differs between two runs: times and memory."""
    content = report.to_dict()
    timed = {
        kind: [{key: row[key] for key in row if key not in ("seconds", "peak_bytes")} for row in content.pop(kind)]
        for kind in ("rows", "structures", "matches")
    }
    return {**timed, **{key: content[key] for key in content if key not in ("seconds", "memory", "speed", "finished")}}
