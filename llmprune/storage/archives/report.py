"""What was archived or extracted."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmprune.units import format_size, quantity


@dataclass(frozen=True, slots=True)
class ArchiveRow:
    """A file of a checkpoint folder.

    Attributes:
        file: its path in the folder, with /.
        bytes: its size.
        coded_bytes: its size in the archive.
    """

    file: str
    bytes: int
    coded_bytes: int


@dataclass(frozen=True, slots=True)
class ArchiveReport:
    """What was archived or extracted.

    Attributes:
        archive: the archive.
        folder: the checkpoint folder.
        rows: one per file.
        dense_bytes: size of the checkpoint's tensors when dense.
        estimated: whether the sizes in the archive are estimates, of a dry run.
    """

    archive: Path
    folder: Path
    rows: tuple[ArchiveRow, ...]
    dense_bytes: int
    estimated: bool = False

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(row.bytes for row in self.rows)

    @property
    def coded_bytes(self) -> int:
        """Their size in the archive."""
        return sum(row.coded_bytes for row in self.rows)

    @property
    def ratio(self) -> float:
        """Bytes in the archive per byte of the files."""
        return self.coded_bytes / max(1, self.bytes)

    @property
    def weights_ratio(self) -> float:
        """Bytes of the weight files in the archive per byte of the dense tensors: about 0.38 for 50 % in bfloat16."""
        weights = sum(row.coded_bytes for row in self.rows if row.file.endswith(".safetensors"))
        return weights / max(1, self.dense_bytes)

    def __repr__(self) -> str:
        files = quantity(len(self.rows), "file")
        sizes = f"{format_size(self.bytes)} in {files}, {format_size(self.coded_bytes)} archived"
        return f"ArchiveReport({self.archive}, {sizes})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types: totals, and the rows under "files"."""
        totals = ("bytes", "coded_bytes", "ratio", "dense_bytes", "weights_ratio", "estimated")
        return {
            "archive": str(self.archive),
            "folder": str(self.folder),
            **{name: getattr(self, name) for name in totals},
            "files": [asdict(row) for row in self.rows],
        }
