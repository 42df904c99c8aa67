"""Tables of what a checkpoint holds."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmprune.cli.console import facts, new_table
from llmprune.cli.tables.folding import by_layer
from llmprune.storage.companions import MASKS_NAME
from llmprune.units import format_size, quantity

if TYPE_CHECKING:
    from llmprune.measuring.inspection import Inspection, TensorRow
    from llmprune.pruning.packing import PackReport

# Longer lists of matrices are summarised per layer.
_LONG = 32

_NUMBERED = re.compile(r"^(.*?\.\d+)\.(.+)$")


def inspection_tables(inspection: "Inspection", *, every: bool) -> list[RenderableType]:
    """The matrices of a checkpoint, and the totals.

    Unless `every` is true, layers that say the same are one; if that still leaves many rows, each layer is one row.
    """
    rows = [row for row in inspection.rows if row.pattern is not None]
    others = [row for row in inspection.rows if row.pattern is None]
    table = new_table("tensor", "shape", "dtype", "sparsity", "pattern", "size", left=(0, 2, 4))
    if every or not _fold(table, rows):
        _list(table, rows, every=every)
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in Counter(row.dtype for row in others).most_common())
    negative = sum(row.negative_zeros for row in inspection.rows)
    totals = facts(
        ("checkpoint", f"{inspection.folder}, {format_size(inspection.bytes_on_disk)}"),
        ("parameters", f"{inspection.parameters:,}, {inspection.nonzeros:,} of them nonzero"),
        (
            "sparsity",
            f"{inspection.sparsity:.2%} overall, {inspection.matrix_sparsity:.2%} in the matrices of the layers",
        ),
        ("not listed", f"{len(others)} vectors and other tensors: {kinds}" if others else "none"),
        *([("zeros stored as -0.0", f"{negative:,}")] if negative else []),
        *_mask_facts(inspection),
        *([("mismatch", f"config.json: {inspection.contradiction}")] if inspection.contradiction else []),
    )
    return [table, totals]


def _mask_facts(inspection: "Inspection") -> list[tuple[str, str]]:
    """Masks in the weights' place or beside them, and what they are for."""
    found = []
    if halves := sum(row.layout == "torch-prune" for row in inspection.rows):
        matrices = quantity(halves, "tensor")
        said = f"{matrices} stored with a mask of torch.nn.utils.prune; `llmprune import` writes an ordinary checkpoint"
        found.append(("masks", said))
    if inspection.masks is not None:
        file = Path(inspection.folder) / MASKS_NAME
        matrices = quantity(inspection.masks, "matrix", "matrices")
        found.append(("masks", f"of {matrices} in {file}, to train on with llmprune.keep_zeros(model, FILE)"))
    return found


def _fold(table: Table, rows: "Sequence[TensorRow]") -> bool:
    """Add the rows with those of equal layers merged; adds nothing and returns false if there are still many."""
    layers = by_layer(rows, lambda row: (row.shape, row.dtype, f"{row.sparsity:.2%}", row.pattern, row.layout))
    if sum(len(inside) for _, inside in layers) > _LONG:
        return False
    for layer, inside in layers:
        if layer:
            table.add_row(Text(layer, "bold"))
        for key, row, count in inside:
            name = key.removesuffix(".weight")
            size = format_size(row.bytes * count) + _as_layouts([row])
            table.add_row(f"  {name}" if layer else name, *_tensor_row(row, indented=False)[1:5], size)
    return True


def _list(table: Table, rows: "Sequence[TensorRow]", *, every: bool) -> None:
    """Add a row for each matrix, or for each layer if there are many and `every` is false."""
    layers: dict[str, list[TensorRow]] = {}
    for row in rows:
        match = _NUMBERED.match(row.name)
        layers.setdefault(match[1] if match else "", []).append(row)
    for layer, inside in layers.items():
        if layer and not every and len(rows) > _LONG:
            table.add_row(*_layer_row(layer, inside))
            continue
        if layer:
            table.add_row(Text(layer, "bold"))
        for row in inside:
            table.add_row(*_tensor_row(row, indented=bool(layer)))


def _layer_row(layer: str, rows: Sequence["TensorRow"]) -> tuple[str, ...]:
    zeros, elements = sum(row.zeros for row in rows), sum(row.elements for row in rows)
    patterns = Counter(str(row.pattern) for row in rows).most_common()
    named = ", ".join(f"{count} x {pattern}" if len(patterns) > 1 else pattern for pattern, count in patterns[:3])
    return (
        layer,
        quantity(len(rows), "matrix", "matrices"),
        ", ".join(dict.fromkeys(row.dtype for row in rows)),
        f"{zeros / max(elements, 1):.2%}",
        named + (", ..." if len(patterns) > 3 else ""),
        format_size(sum(row.bytes for row in rows)) + _as_layouts(rows),
    )


def _tensor_row(row: "TensorRow", *, indented: bool) -> tuple[str, ...]:
    name = ("  " + _NUMBERED.sub(r"\2", row.name) if indented else row.name).removesuffix(".weight")
    shape = " x ".join(map(str, row.shape))
    return name, shape, row.dtype, f"{row.sparsity:.2%}", str(row.pattern), _stored(row)


def _stored(row: "TensorRow") -> str:
    return format_size(row.bytes) + _as_layouts([row])


def _as_layouts(rows: Sequence["TensorRow"]) -> str:
    layouts = dict.fromkeys(row.layout for row in rows if row.layout != "dense")
    return f" as {', '.join(layouts)}" if layouts else ""


def packing_tables(report: "PackReport") -> list[RenderableType]:
    """How many matrices each layout holds, what stays dense and why, and the sizes before and after packing."""
    rows = new_table("layout", "matrices", "dense", "packed", "", left=(0, 4))
    for layout, reason in dict.fromkeys((row.layout, row.reason) for row in report.rows):
        same = [row for row in report.rows if (row.layout, row.reason) == (layout, reason)]
        before, after = sum(row.dense_bytes for row in same), sum(row.packed_bytes for row in same)
        rows.add_row(
            layout, str(len(same)), format_size(before), format_size(after), reason or f"{after / max(before, 1):.4f}"
        )
    before, after = report.dense_checkpoint_bytes, report.packed_checkpoint_bytes
    totals = facts(
        ("checkpoint", str(report.folder)),
        ("dense", format_size(before)),
        ("packed", f"{format_size(after)} (x{after / max(before, 1):.4f})"),
    )
    return [rows, totals]
