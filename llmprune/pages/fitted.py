"""What chains of steps, corrected targets, gradients and block matching have brought, in a line for each."""

from collections.abc import Iterable, Sequence

from llmprune.methods.correction import LARGEST
from llmprune.pages.charts import Axis, Series, lines
from llmprune.pages.layers import LAYER, number
from llmprune.pages.page import Chart, Part, Table
from llmprune.storage.report import STANDING, MatchRow, MatrixRow, Report
from llmprune.units import quantity


def fitting_facts(report: Report) -> list[tuple[str, str]]:
    """Names and lines for the summary; empty where none of these is part of the run.

    Args:
        report: the run's report.
    """
    chains: dict[tuple[str, ...], list[MatrixRow]] = {}
    for row in report.rows:
        if row.losses:
            chains.setdefault((row.method, *(part.step for part in row.losses)), []).append(row)
    facts = [("loss after each step", chain_line(rows)) for rows in chains.values()]
    if corrections := [row.correction for row in report.rows if row.correction is not None]:
        facts.append(("error correction", correction_line(corrections)))
    if blind := sum(row.by_magnitude for row in report.rows):
        facts.append(("no gradients", f"for {quantity(blind, 'matrix', 'matrices')}, chosen by magnitude instead"))
    standing, matched = _divided(report.matches)
    if standing:
        facts.append(("standing for removed layers", match_line(standing)))
    if matched:
        facts.append(("block matching", match_line(matched)))
    return facts


def chain_line(rows: Sequence[MatrixRow]) -> str:
    """The mean loss of some matrices after each part of their chain, and how often a step was undone.

    Args:
        rows: at least one, all pruned by chains of the same parts.
    """
    first = rows[0].method.partition(" + ")[0]
    parts = []
    for place, part in enumerate(rows[0].losses):
        losses = [row.losses[place] for row in rows]
        undone = sum(loss.undone is not None for loss in losses)
        said = f"{part.step or first} {_mean(loss.loss for loss in losses):.4g}"
        parts.append(said + (f" (undone for {undone:,} of {len(rows):,} matrices)" if undone else ""))
    return f"{', '.join(parts)} (means of {quantity(len(rows), 'matrix', 'matrices')})"


def correction_line(corrections: Sequence[float]) -> str:
    """How far targets are from the dense weights, and for how many matrices that was too far.

    Args:
        corrections: of all matrices whose errors were collected, at least one.
    """
    large = sum(correction > LARGEST for correction in corrections)
    said = (
        f"targets differ from the dense weights by {_mean(corrections):.3g} on average, {max(corrections):.3g} at most"
    )
    left_out = f"; above {LARGEST}, and left out, for {large:,} of {len(corrections):,} matrices"
    return said + (left_out if large else "")


def match_line(rows: Sequence[MatchRow]) -> str:
    """The mean error of layers, and of their attentions, before and after they were fitted; in how many it fell."""
    before, after = (_mean(getattr(row, which) for row in rows) for which in ("before", "after"))
    better = sum(row.after < row.before for row in rows)
    targets = ", ".join(dict.fromkeys(row.target for row in rows))
    fits = "layers" if all(row.part == "layer" for row in rows) else "fits of attentions and layers"
    return f"mean error {before:.4g} before, {after:.4g} after ({targets}); lower in {better:,} of {len(rows):,} {fits}"


def match_parts(report: Report) -> list[Part]:
    """A chart of each layer's error before and after it was fitted; empty if none was."""
    _, matched = _divided(report.matches)
    if not matched:
        return []
    series = list[Series]()
    parts = dict.fromkeys(row.part for row in matched)
    for part in parts:
        own = [row for row in matched if row.part == part]
        layers = [number(row.layer) for row in own]
        of = "" if len(parts) == 1 else f" ({part})"
        for which in ("before", "after"):
            errors = [getattr(row, which) for row in own]
            hover = [f"layer {layer}{of}: {error:.4g} {which}" for layer, error in zip(layers, errors, strict=True)]
            series.append(Series(which + of, layers, errors, hover, len(series)))
    rows = tuple(
        (
            f"{number(row.layer)}{'' if row.part == 'layer' else f' {row.part}'}",
            f"{row.before:.4g}", f"{row.after:.4g}", f"{row.best} of {row.epochs}", f"{row.seconds:,.2f}",
        )
        for row in matched
    )  # fmt: skip
    return [
        Chart(
            "chart-matching",
            "Error of each layer before and after block matching",
            lines(series, LAYER, Axis("relative squared error", log=True, zero=True)),
            Table(("layer", "before", "after", "epoch kept", "seconds"), rows),
            "Mean over the tokens of the validation sequences of ||f(h) - T||² / ||T||², T the layer's target. "
            "Epoch 0: the layer stayed as it was.",
        )
    ]


def _divided(rows: Sequence[MatchRow]) -> tuple[list[MatchRow], list[MatchRow]]:
    """The rows of layers that stand for removed ones, and those of block matching."""
    standing = [row for row in rows if row.target in STANDING]
    return standing, [row for row in rows if row.target not in STANDING]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
