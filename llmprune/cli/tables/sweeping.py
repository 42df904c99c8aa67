"""What `llmprune sweep` shows: a comparison of the runs and why some failed, or a forecast."""

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from llmprune.cli.console import facts, new_table
from llmprune.cli.tables.comparing import comparison_tables
from llmprune.units import format_seconds, format_size, quantity

if TYPE_CHECKING:
    from llmprune.pruning.sweep.sweep import Sweep, SweepForecast


def sweep_tables(sweep: "Sweep") -> list[RenderableType]:
    """A comparison of the finished runs, the failed ones with their errors, and where all of them are."""
    parts = [] if sweep.comparison is None else comparison_tables(sweep.comparison)
    for row in sweep.failed:
        error = row.error or {}
        said = [(name, error[name]) for name in ("expected", "fix") if error.get(name)]
        parts += [Text(f"{row.name} failed", "bold red"), facts(("error", error.get("what", "")), *said)]
    finished = sum(row.state == "finished" for row in sweep.rows)
    return [*parts, Text(f"{finished} of {len(sweep.rows)} runs finished, in {sweep.folder}")]


def forecast_table(forecast: "SweepForecast") -> RenderableType:
    """One line per run, and the totals."""
    table = new_table("run", "seconds (estimate)", "peak memory", "disk", left=(0,))
    for row in forecast.rows:
        if row.finished:
            table.add_row(row.name, "finished", "", "")
        else:
            table.add_row(
                row.name, format_seconds(row.seconds), format_size(row.peak_bytes), format_size(row.disk_bytes)
            )
    totals = format_seconds(forecast.seconds), format_size(forecast.peak_bytes), format_size(forecast.disk_bytes)
    count = quantity(len(forecast.rows), "run")
    table.add_row(Text(count, "bold"), *(Text(total, "bold") for total in totals))
    return table
