"""The README's figure: perplexity of every bundled recipe on the bundled model against its non-zero parameters.

    python -m llmprune.eval.bench.picture docs/assets/recipes.png

The numbers are those of results/recipes-testbed-cpu.json (`python -m llmprune.eval.bench.recipes`); nothing is measured
here. A browser renders it: playwright's Chromium or the system's.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from playwright.sync_api import sync_playwright

from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.decoder import prunable_matrices
from llmprune.storage.hub import resolve_model

RESULTS = Path(__file__).parent / "results" / "recipes-testbed-cpu.json"
# Kinds of recipes and their colours.
_KINDS = {
    "zeros in the weights": "#2563eb",
    "structures, stock checkpoint": "#c2410c",
    "structures by a budget": "#047857",
    "both": "#7c3aed",
}
# Left out: off the scale, the same method as another recipe, or hidden by others.
_HIDDEN = ("random-50", "demo", "sparsegpt-4of8", "sparsegpt-attention-2of4-mlp-50")
# Where a name is placed next to its point, so that none overlaps another; default: above.
_PLACES = {
    "sparsegpt-50": "middle left", "sparsegpt-2of4": "middle right", "wanda-50": "middle left", "best": "bottom center",
    "best-fast": "middle right", "magnitude-50": "top center", "sparsegpt-60": "middle left",
    "heads-ffn-25": "middle left", "depth-25-matched": "middle right", "budget-25": "middle left",
    "ffn-25": "middle right", "ffn-25-matched": "bottom right",
}  # fmt: skip
_SIZE = {"width": 960, "height": 560}


def points(rows: list[dict[str, Any]], prunable: float) -> list[dict[str, Any]]:
    """The points to draw.

    Args:
        rows: of the results file.
        prunable: the fraction of the model's parameters in prunable matrices.
    """
    drawn = []
    for row in rows:
        if "refused" in row or row["recipe"] in _HIDDEN:
            continue
        left = row.get("parameters", 1.0)
        # Structures are removed from the prunable matrices, before the zeros (hidden width from all matrices, but no
        # recipe combines it with zeros).
        nonzero = left - row["sparsity"] * (prunable - (1 - left))
        drawn.append({"name": row["recipe"], "kind": _kind(row), "left": nonzero, "perplexity": row["perplexity"]})
    return drawn


def _kind(row: dict[str, Any]) -> str:
    if "parameters" not in row:
        return "zeros in the weights"
    if row["sparsity"]:
        return "both"
    return "structures by a budget" if "budget" in row["recipe"] else "structures, stock checkpoint"


def picture(drawn: list[dict[str, Any]], dense: float) -> go.Figure:
    """The figure: non-zero parameters on the x axis, perplexity on a logarithmic y axis."""
    figure = go.Figure()
    for kind, colour in _KINDS.items():
        own = [point for point in drawn if point["kind"] == kind]
        figure.add_scatter(
            x=[100 * point["left"] for point in own],
            y=[point["perplexity"] for point in own],
            text=[point["name"] for point in own],
            mode="markers+text",
            textposition=[_PLACES.get(point["name"], "top center") for point in own],
            marker={"size": 11, "color": colour},
            name=kind,
        )
    figure.add_scatter(x=[100], y=[dense], text=["dense"], mode="markers+text", textposition="top center",
                       marker={"size": 13, "color": "#111827", "symbol": "diamond"}, name="dense")  # fmt: skip
    figure.update_layout(
        template="plotly_white",
        title="Bundled model (8 million parameters), self-generated text; no recovery",
        xaxis_title="non-zero parameters, % of the dense model",
        yaxis_title="perplexity",
        legend={"orientation": "h", "y": -0.18},
        margin={"l": 60, "r": 20, "t": 50, "b": 40},
        **_SIZE,
    )
    figure.update_yaxes(type="log", tickvals=[20, 22, 25, 30, 40, 50, 60])
    figure.update_xaxes(range=[45, 104])
    return figure


def prunable_fraction() -> float:
    """The fraction of the bundled model's parameters in prunable matrices."""
    source = CheckpointSource(resolve_model("testbed"))
    inside = sum(m.shape[0] * m.shape[1] for layer in source.layers for m in prunable_matrices(layer, ""))
    return inside / sum(parameter.numel() for parameter in source.model.parameters())


def save(figure: go.Figure, file: Path) -> None:
    """Render the figure in a browser."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder) / "figure.html"
        figure.write_html(page_file, include_plotlyjs=True)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport=_SIZE, device_scale_factor=2)
        page.goto(page_file.as_uri())
        page.wait_for_selector(".main-svg")
        file.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=file)
        browser.close()


def main() -> None:
    """Draw the figure into a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    rows = json.loads(RESULTS.read_text("utf-8"))
    dense = next(row["dense_perplexity"] for row in rows if "refused" not in row)
    save(picture(points(rows, prunable_fraction()), dense), args.file)


if __name__ == "__main__":
    main()
