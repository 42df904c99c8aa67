"""A comparison of runs as a page: tables, and charts of quality against size and speed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from llmprune.pages.charts import PALETTE, Axis, Series, points
from llmprune.pages.comparison import Comparison
from llmprune.pages.page import Chart, Note, Part, Section, Table, render
from llmprune.pages.run_row import COLUMNS, RunRow, cells
from llmprune.storage.files import write_text

# Up to this many points are labelled.
_LABELLED = 12
_MEGA = 1e6
# Digits in which values along the x axis must differ to count as different.
_DIGITS = 3

Value = Callable[[RunRow], float | None]


def write_comparison(comparison: Comparison, file: Path) -> Path:
    """Write a comparison as one HTML file.

    Args:
        comparison: what to write.
        file: replaced atomically if it exists; its folder is created if needed.

    Raises:
        CheckpointError: the file cannot be written.
    """
    page = comparison_page(comparison)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, page)
    return file


def comparison_page(comparison: Comparison) -> str:
    """The page as HTML."""
    sections = [
        Section(
            f"group-{place}",
            f"On {comparison.title(text)}" if text else "Without an evaluation",
            [replace(comparison.table(text), caption=""), *_charts(comparison.groups[text], place)],
        )
        for place, text in enumerate(comparison.groups)
    ]
    notes = [Note(note) for note in comparison.notes]
    subtitle = "Quality, size and speed, grouped by evaluation text"
    return render(f"Comparison of {len(comparison.runs)} runs", subtitle, [*sections, Section("notes", "Notes", notes)])


def pareto(rows: Sequence[RunRow], x: Value, y: Value, *, larger_x: bool, larger_y: bool) -> list[RunRow]:
    """The Pareto front: rows for which no other is at least as good in both values and better in one; ordered by x.

    Rows without one of the values are left out. Values of x that no reader could tell apart count as equal, so that the
    front has no vertical lines.
    """

    def merits(row: RunRow) -> tuple[float, float] | None:
        first, second = x(row), y(row)
        if first is None or second is None:
            return None
        near = float(f"{first:.{_DIGITS}g}")
        return (near if larger_x else -near, second if larger_y else -second)

    known = [(merit, row) for row in rows if (merit := merits(row)) is not None]
    best = [
        (merit, row)
        for merit, row in known
        if not any(other != merit and other[0] >= merit[0] and other[1] >= merit[1] for other, _ in known)
    ]
    return [row for _, row in sorted(best, key=lambda pair: pair[0][0])]


def _charts(rows: Sequence[RunRow], place: int) -> list[Part]:
    """Each measure of quality against size and speed, if at least two runs have both."""
    qualities: tuple[tuple[str, Axis, Value, bool], ...] = (
        ("perplexity", Axis("perplexity (lower is better)", log=True), lambda row: row.perplexity, False),
        ("tasks", Axis("mean task score (higher is better)", percent=True), lambda row: row.score, True),
    )
    prices: tuple[tuple[str, Axis, Value, bool], ...] = (
        ("size", Axis("checkpoint size in MB (lower is better)", zero=True), _megabytes, False),
        ("nonzero parameters", Axis("million nonzero parameters (lower is better)", zero=True), _nonzeros, False),
        ("speed", Axis("decode speed-up (higher is better)"), lambda row: row.decode_speedup, True),
    )
    charts: list[Part] = []
    for quality, y_axis, y, larger_y in qualities:
        for price, x_axis, x, larger_x in prices:
            known = [row for row in rows if _is_finite(x(row)) and _is_finite(y(row))]
            if len(known) > 1 and (same := _same(known, (x_axis, x), (y_axis, y))):
                charts.append(Note(f"No chart of {quality} against {price}: {same} of all runs is the same."))
            elif len(known) > 1:
                best = pareto(known, x, y, larger_x=larger_x, larger_y=larger_y)
                name = f"chart-{place}-{quality}-{price.split()[0]}"
                charts.append(
                    _chart(name, f"{quality.capitalize()} against {price}", known, best, (x_axis, x, y_axis, y))
                )
    return charts


def _same(rows: Sequence[RunRow], *axes: tuple[Axis, Value]) -> str:
    """What is equal in all rows, by the title of its axis; empty if both values differ."""
    for axis, value in axes:
        if len({f"{value(row):.{_DIGITS}g}" for row in rows}) == 1:
            return axis.title.partition(" (")[0]
    return ""


def _chart(
    name: str, title: str, rows: Sequence[RunRow], best: Sequence[RunRow], axes: tuple[Axis, Value, Axis, Value]
) -> Chart:
    x_axis, x, y_axis, y = axes
    kinds = (
        ("dense", [row for row in rows if row.recipe == "dense"], len(PALETTE) - 1),
        ("runs", [row for row in rows if row.recipe != "dense"], 0),
    )
    series = [
        Series(kind, [x(row) or 0.0 for row in own], [y(row) for row in own], [_hover(row) for row in own], colour)
        for kind, own, colour in kinds
        if own
    ]
    line = Series("Pareto front", [x(row) or 0.0 for row in best], [y(row) for row in best], colour=2, dashed=True)
    figure = points(series, line, x_axis, y_axis, labelled=len(rows) <= _LABELLED)
    numbers = tuple(
        (row.name, f"{x(row):,.4g}", f"{y(row):,.4g}", "Pareto front" if row in best else "") for row in rows
    )
    table = Table(("run", x_axis.title, y_axis.title, ""), numbers, text=(0, 3))
    note = "The dashed line is the Pareto front: no other run is better in both."
    if len({(x(row), y(row)) for row in best}) == 1:
        note = f"No other run is better than {best[0].name} in either."
    if any("" in trace.get("text", ()) for trace in figure["data"]):
        note += " Hover over points without a label to see their names."
    return Chart(name, title, figure, table, note)


def _hover(row: RunRow) -> str:
    name, recipe, *values = cells(row)
    said = [f"{column} {value}" for column, value in zip(COLUMNS[2:], values, strict=True) if value]
    said += [f"speed-up of {row.speed_of}"] if row.speed_of else []
    return "\n".join([name, recipe, *said])


def _megabytes(row: RunRow) -> float | None:
    return None if row.stored_bytes is None else row.stored_bytes / _MEGA


def _nonzeros(row: RunRow) -> float | None:
    return None if row.nonzeros is None else row.nonzeros / _MEGA


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
