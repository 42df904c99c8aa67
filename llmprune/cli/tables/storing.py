"""Tables of archives."""

from typing import TYPE_CHECKING

from rich.console import RenderableType

from llmprune.cli.console import facts, new_table
from llmprune.units import format_size

if TYPE_CHECKING:
    from llmprune.storage.archives.report import ArchiveReport


def archive_tables(report: "ArchiveReport", archive: str, folder: str) -> list[RenderableType]:
    """The files with their sizes, and the totals; `archive` and `folder` as they are shown."""
    about = "about " if report.estimated else ""
    files = new_table("file", "size", "archived", "", left=(0,))
    for row in report.rows:
        share = row.coded_bytes / max(1, row.bytes)
        files.add_row(row.file, format_size(row.bytes), about + format_size(row.coded_bytes), f"x{share:.3f}")
    totals = facts(
        ("folder", folder),
        ("archive", archive),
        ("files", format_size(report.bytes)),
        ("archived", f"{about}{format_size(report.coded_bytes)} (x{report.ratio:.3f})"),
        ("weights", f"{about}x{report.weights_ratio:.3f} of the dense tensors, {format_size(report.dense_bytes)}"),
    )
    return [files, totals]
