"""The rows of a report by decoder layer and kind of matrix, and charts of them.

An MoE model has thousands of matrices, so all experts of a layer share one point, whose hover text gives their range.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llmprune.pages.charts import PALETTE, Axis, Series, level, lines
from llmprune.pages.page import Chart, Part, Table
from llmprune.storage.report import MatrixRow, Report, StructureRow
from llmprune.units import format_seconds

_Value = TypeVar("_Value")

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

LAYER = Axis("decoder layer", whole=True)
ERROR = "relative output error"


@dataclass(frozen=True, slots=True)
class Cell:
    """The matrices of one kind in one layer.

    Attributes:
        layer: the layer's number.
        kind: the name inside the layer, with a wildcard for the expert.
        rows: the report's rows.
    """

    layer: int
    kind: str
    rows: tuple[MatrixRow, ...]

    @property
    def errors(self) -> list[float]:
        """The errors that were measured."""
        return [row.error for row in self.rows if row.error is not None]

    @property
    def error(self) -> float | None:
        """The mean of the measured errors."""
        return sum(self.errors) / len(self.errors) if self.errors else None

    @property
    def sparsity(self) -> float:
        """The fraction of zeros, as counted."""
        elements = sum(row.shape[0] * row.shape[1] for row in self.rows)
        return sum(row.zeros for row in self.rows) / max(elements, 1)

    @property
    def hover(self) -> str:
        """The hover text."""
        first = self.rows[0]
        count = f"{len(self.rows)} x " if len(self.rows) > 1 else ""
        said = [
            f"layer {self.layer}: {self.kind}",
            f"{count}{first.shape[0]} x {first.shape[1]}",
            f"{_distinct(row.pattern for row in self.rows)} by {_distinct(row.method for row in self.rows)}",
            f"sparsity {self.sparsity:.2%}",
        ]
        if self.error is not None:
            spread = f", {min(self.errors):.4g} to {max(self.errors):.4g}" if len(self.errors) > 1 else ""
            said.append(f"error {self.error:.4g}{spread}")
        climbed = sum(len(row.damping_tried) > 1 for row in self.rows)
        priors = sum(row.prior_tokens > 0 for row in self.rows)
        said += [f"dampening increased for {climbed}"] if climbed else []
        said += [f"{priors} with too few tokens"] if priors else []
        seconds = sum(row.seconds for row in self.rows)
        said += [f"solved in {format_seconds(seconds)} s"] if seconds else []
        return "\n".join(said)


def cells(rows: Iterable[MatrixRow]) -> list[Cell]:
    """Group rows by layer and kind, in their original order."""
    found: dict[tuple[int, str], list[MatrixRow]] = {}
    for row in rows:
        found.setdefault((number(row.layer), kind_of(row.layer, row.name)), []).append(row)
    return [Cell(layer, kind, tuple(same)) for (layer, kind), same in found.items()]


def number(layer: str) -> int:
    """The number at the end of a layer's dotted name; 0 if it has none."""
    last = layer.rpartition(".")[2]
    return int(last) if last.isdecimal() else 0


def kind_of(layer: str, name: str) -> str:
    """A matrix's name inside its layer, with a wildcard for the expert.

    Example:
        >>> kind_of("model.layers.3", "model.layers.3.mlp.experts.17.up_proj")
        'mlp.experts.*.up_proj'
    """
    return _NUMBER.sub("*", name.removeprefix(f"{layer}.").removesuffix(".weight"))


def pivot(found: Mapping[tuple[int, str], _Value], shown: Callable[[_Value], str]) -> Table:
    """A row for each layer and a column for each kind; cells are empty where a layer has none."""
    layers = list(dict.fromkeys(layer for layer, _ in found))
    kinds = list(dict.fromkeys(kind for _, kind in found))
    rows = tuple(
        (str(layer), *(shown(found[layer, kind]) if (layer, kind) in found else "" for kind in kinds))
        for layer in layers
    )
    return Table(("layer", *kinds), rows, text=())


def layer_parts(report: Report) -> list[Part]:
    """Charts of the error, if it was measured, and the sparsity of every matrix."""
    if not report.rows:
        return []
    found = cells(report.rows)
    overall = level("all matrices", sorted({cell.layer for cell in found}), report.sparsity)
    sparsity = lines(
        [*_by_kind(found, lambda cell: cell.sparsity), overall], LAYER, Axis("sparsity", percent=True, zero=True)
    )
    return [
        *([_error_chart(found)] if any(cell.errors for cell in found) else []),
        Chart(
            "chart-sparsity",
            "Sparsity of each matrix",
            sparsity,
            _table(found, lambda cell: f"{cell.sparsity:.2%}"),
            "Counted in the stored weights. The dashed line is the sparsity of all matrices together.",
        ),
    ]


def _error_chart(found: Sequence[Cell]) -> Chart:
    return Chart(
        "chart-error",
        "Relative output error of each matrix",
        lines(_by_kind(found, lambda cell: cell.error), LAYER, Axis(ERROR, log=True, zero=True)),
        _table(found, lambda cell: "" if cell.error is None else f"{cell.error:.4g}"),
        "||(W - V) X||² / ||W X||² on held-back (validation) rows, with W before and V after pruning. "
        "Experts are averaged.",
    )


def structure_parts(report: Report) -> list[Part]:
    """Charts of how much of each structure is kept, and of the error of the matrix that reads it."""
    rows = report.structures
    if not rows:
        return []
    found = {(number(row.layer), _structure_kind(row)): row for row in rows}
    kept = _structure_series(rows, lambda row: row.kept / max(row.groups, 1))
    charts: list[Part] = [
        Chart(
            "chart-kept",
            "What is kept of each structure",
            lines(kept, LAYER, Axis("groups kept", percent=True, zero=True)),
            pivot(found, lambda row: f"{row.kept:,} of {row.groups:,}"),
            f"Layers are numbered as in the smaller model; a gap means that nothing was removed there. {_chosen(rows)}",
        )
    ]
    if any(row.error is not None for row in rows):
        charts.append(
            Chart(
                "chart-structure-error",
                "Relative output error after removing structures",
                lines(_structure_series(rows, lambda row: row.error), LAYER, Axis(ERROR, log=True, zero=True)),
                pivot(found, lambda row: "" if row.error is None else f"{row.error:.4g}"),
                "Of the matrix that reads the groups, on held-back (validation) rows, after the refit if there is one.",
            )
        )
    return charts


def _by_kind(found: Sequence[Cell], value: Callable[[Cell], float | None]) -> list[Series]:
    kinds: dict[str, list[Cell]] = {}
    for cell in found:
        kinds.setdefault(cell.kind, []).append(cell)
    return [
        Series(
            kind,
            [cell.layer for cell in same],
            [value(cell) for cell in same],
            [cell.hover for cell in same],
            colour=place % len(PALETTE),
        )
        for place, (kind, same) in enumerate(kinds.items())
    ]


def _table(found: Sequence[Cell], shown: Callable[[Cell], str]) -> Table:
    return pivot({(cell.layer, cell.kind): cell for cell in found}, shown)


def _structure_kind(row: StructureRow) -> str:
    return f"{row.kind} of {kind_of(row.layer, row.consumer)}"


def _structure_series(rows: Sequence[StructureRow], value: Callable[[StructureRow], float | None]) -> list[Series]:
    kinds: dict[str, list[StructureRow]] = {}
    for row in rows:
        kinds.setdefault(_structure_kind(row), []).append(row)
    series = []
    for place, (kind, same) in enumerate(kinds.items()):
        found = {number(row.layer): row for row in same}
        # Leave gaps at layers that lost nothing.
        layers = range(min(found), max(found) + 1)
        values = [value(found[layer]) if layer in found else None for layer in layers]
        hover = [_structure_hover(found[layer]) if layer in found else "" for layer in layers]
        series.append(Series(kind, list(layers), values, hover, colour=place % len(PALETTE)))
    return series


def _structure_hover(row: StructureRow) -> str:
    error = "" if row.error is None else f"\nerror {row.error:.4g}"
    return (
        f"layer {number(row.layer)}: {_structure_kind(row)}\n{row.kept:,} of {row.groups:,} kept\n"
        f"{_way(row)}, {row.swaps} exchanges{error}\n{format_seconds(row.seconds)} s"
    )


def _chosen(rows: Sequence[StructureRow]) -> str:
    return f"{'; '.join(dict.fromkeys(f'{row.kind}: {_way(row)}' for row in rows))}."


def _way(row: StructureRow) -> str:
    refit = ", refitted" if row.refit else ", means compensated" if row.compensated else ""
    return f"chosen by {row.method}{refit}"


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
