"""What was exported."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmprune.units import format_size


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A file that was written.

    Attributes:
        file: its name.
        bytes: its size.
    """

    file: str
    bytes: int


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was exported.

    Attributes:
        to: "csr", "torch-prune", "gguf" or "onnx"; "checkpoint" of an import.
        output: the folder or file that was written.
        files: the files with weights.
        dense_bytes: size of the checkpoint's tensors when dense.
        facts: what else can be said, in words: name -> text.
    """

    to: str
    output: Path
    files: tuple[ExportedFile, ...]
    dense_bytes: int
    facts: dict[str, str]

    @property
    def bytes(self) -> int:
        """Size of the files with weights."""
        return sum(file.bytes for file in self.files)

    def __repr__(self) -> str:
        sizes = f"{format_size(self.dense_bytes)} dense, {format_size(self.bytes)} as {self.to}"
        return f"ExportReport({self.output}, {sizes})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {**asdict(self), "output": str(self.output), "bytes": self.bytes}


def files_of(folder: Path, *names: str) -> tuple[ExportedFile, ...]:
    """The files of a folder that match one of the patterns, sorted by name."""
    found = sorted({file for name in names for file in folder.glob(name)})
    return tuple(ExportedFile(file.name, file.stat().st_size) for file in found)
