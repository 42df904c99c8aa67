"""sensitivity.html: the curves of `llmprune sensitivity` as a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.pages.allocated import curve_parts
from llmprune.pages.charts import Axis, Series, lines
from llmprune.pages.layers import LAYER, pivot
from llmprune.pages.page import Chart, Facts, Section, render


def sensitivity_page(result: Mapping[str, Any]) -> str:
    """The page of one scan as HTML.

    Args:
        result: what `llmprune sensitivity` writes as JSON.
    """
    name = Path(str(result["model"])).name
    facts = [
        ("model", str(result["model"])),
        ("device", str(result["device"])),
        ("errors on", f"{result['tokens']['statistics']:,} calibration tokens"),
        ("divergences on", f"{result['tokens']['divergences']:,} other tokens"),
        ("masks", "Wanda's, of one kind of matrix in one layer; everything else stays dense"),
    ]
    sections = (
        Section("summary", "Summary", [Facts(tuple(facts)), _overview(result["units"])]),
        Section("curves", "Curves", curve_parts(result["units"])),
    )
    return render(f"{name}, sensitivity", "What pruning each matrix alone does to the model", sections)


def _overview(units: Any) -> Chart:
    """The divergence at the middle measured level, layer by layer."""
    kinds: dict[str, list[tuple[int, float, float]]] = {}
    for unit in units:
        known = [pair for pair in zip(unit["levels"], unit["divergences"], strict=True) if pair[1] is not None]
        if known:
            sparsity, value = known[len(known) // 2]
            kinds.setdefault(unit["kind"], []).append((unit["layer"], sparsity, value))
    series = [
        Series(
            kind,
            [layer for layer, _, _ in own],
            [value for _, _, value in own],
            [f"layer {layer}: {kind}\n{sparsity:.1%}: {value:.4g} nats/token" for layer, sparsity, value in own],
            place,
        )
        for place, (kind, own) in enumerate(kinds.items())
    ]
    found = {(layer, kind): (s, value) for kind, own in kinds.items() for layer, s, value in own}
    table = pivot(dict(sorted(found.items())), lambda pair: f"{pair[1]:.4g} ({pair[0]:.0%})")
    figure = lines(series, LAYER, Axis("KL divergence, nats/token", log=True))
    return Chart(
        "chart-overview", "How sensitive the model is to each matrix", figure, table, "At the middle measured sparsity."
    )
