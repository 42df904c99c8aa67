"""What `llmprune sensitivity` shows: one row for each kind of matrix, one column for each sparsity."""

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from llmprune.cli.console import new_table


def sensitivity_table(result: Mapping[str, Any]) -> RenderableType:
    """The mean KL divergence over the layers, and the layer that suffers most."""
    units = result["units"]
    levels = sorted({level for unit in units for level in unit["levels"]})
    table = new_table("KL, nats/token", *(f"{level:.0%}" for level in levels), "worst layer", left=(0,))
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for unit in units:
        kinds.setdefault(unit["kind"], []).append(unit)
    for kind, own in kinds.items():
        cells = []
        for level in levels:
            found = [dict(zip(unit["levels"], unit["divergences"], strict=True)).get(level) for unit in own]
            known = [value for value in found if value is not None]
            cells.append(f"{sum(known) / len(known):.4f}" if known else "not finite")
        worst = max(own, key=lambda unit: unit["divergences"][-1] or 0.0)
        table.add_row(kind, *cells, str(worst["layer"]))
    return table
