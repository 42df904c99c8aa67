"""Tables of exports."""

from typing import TYPE_CHECKING

from rich.console import RenderableType

from llmprune.cli.console import facts, new_table
from llmprune.units import format_size

if TYPE_CHECKING:
    from llmprune.exporting.report import ExportReport


def export_tables(report: "ExportReport") -> list[RenderableType]:
    """The files that were written, and what can be said of them."""
    files = new_table("file", "size", left=(0,))
    for row in report.files:
        files.add_row(row.file, format_size(row.bytes))
    share = report.bytes / max(1, report.dense_bytes)
    totals = facts(
        (report.to, str(report.output)),
        ("dense", format_size(report.dense_bytes)),
        ("exported", f"{format_size(report.bytes)} (x{share:.3f})"),
        *report.facts.items(),
    )
    return [files, totals]
