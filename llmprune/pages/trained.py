"""A training in stages on its page: quality against sparsity, and the loss as it fell."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llmprune.pages.charts import Axis, Series, lines
from llmprune.pages.labels import zeros_line
from llmprune.pages.page import Chart, Facts, Listing, Part, Table
from llmprune.storage.report import Report
from llmprune.units import quantity


def trained_line(report: Report) -> str:
    """What was done, and what it cost, in one sentence; the report is of a training."""
    training = report.header["training"]
    name = Path(str(report.header.get("model") or "The model")).name
    stages = training["recipe"]["schedule"]["stages"]
    done = f"{name} was pruned in {quantity(stages, 'stage')} while it trained ({training['name']})"
    return f"{done}: {zeros_line(report)}; {_cost(training)}."


def trained_facts(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and lines for tables."""
    recipe = training["recipe"]
    schedule, options = recipe["schedule"], recipe["training"]
    stages = quantity(schedule["stages"], "stage")
    facts = [
        ("rule" if recipe.get("rule") else "method", str(training["name"])),
        ("schedule", f"{schedule['kind']}, {stages}, {schedule['start']:g} to {schedule['end']:g}"),
        ("zeros", f"{training['zeros']['count']:,} of {training['zeros']['weights']:,} weights that the recipe prunes"),
        ("text", f"{quantity(training['sequences'], 'sequence')} of {training['length']:,} tokens"),
        ("steps", f"{training['steps']:,}"),
        ("loss", f"{options['loss']}, learning rate {options['learning_rate']:g}, over each {options['cycle']}"),
    ]
    if "before" in training:
        measure = training["measure"]
        change = f"{shown(training['before'], measure)} -> {shown(training['after'], measure)}"
        facts.append((f"{measure} on the evaluation text", change))
    return facts


def training_parts(training: Mapping[str, Any] | None) -> list[Part]:
    """The section of a report's page; empty if the report is of no training.

    Args:
        training: the entry of its header.
    """
    if not training:
        return []
    parts: list[Part] = [Facts(tuple(trained_facts(training)))]
    if points := training["curve"]:
        parts.append(_curve(points, training["measure"]))
    if losses := training["losses"]:
        steps = [point["step"] for point in losses]
        hover = [f"step {point['step']:,}: {_number(point['loss'])}" for point in losses]
        series = Series("loss", steps, [point["loss"] for point in losses], hover)
        rows = tuple((f"{point['step']:,}", _number(point["loss"])) for point in losses)
        figure = lines([series], Axis("step"), Axis("loss"))
        parts.append(Chart("chart-loss", "Training loss", figure, Table(("step", "loss"), rows, text=())))
    parts.append(Listing("Recipe", yaml.safe_dump(dict(training["recipe"]), sort_keys=False, allow_unicode=True)))
    return parts


def curve_rows(points: list[dict[str, Any]], measure: str) -> list[tuple[str, ...]]:
    """The curve as rows: stage, step, sparsity, loss, quality."""
    return [
        (
            "before" if point["stage"] is None else str(point["stage"]),
            f"{point['step']:,}",
            f"{point['sparsity']:.1%}",
            _number(point["loss"]),
            shown(point[measure], measure),
        )
        for point in points
    ]


def shown(value: float | None, measure: str) -> str:
    """A quality, as its measure is written."""
    if value is None:
        return "not finite"
    return f"{value:.1%}" if measure == "accuracy" else f"{value:.4g}"


def _curve(points: list[dict[str, Any]], measure: str) -> Chart:
    names = ("stage", "step", "sparsity", "loss", measure)
    rows = curve_rows(points, measure)
    hover = [f"stage {row[0]}: {row[2]} zeros, {measure} {row[4]}" for row in rows]
    series = Series(
        f"{measure} on held-back text", [point["sparsity"] for point in points], [point[measure] for point in points],
        hover,
    )  # fmt: skip
    quality = Axis(measure, percent=measure == "accuracy", log=measure == "perplexity")
    figure = lines([series], Axis("sparsity", percent=True), quality)
    return Chart(
        "chart-curve", f"{measure.capitalize()} against sparsity", figure, Table(names, tuple(rows), text=(0,))
    )


def _cost(training: Mapping[str, Any]) -> str:
    measure, points = training["measure"], training["curve"]
    if "before" in training:
        before, after, where = training["before"], training["after"], ""
    elif points:
        before, after, where = points[0][measure], points[-1][measure], " of held-back text"
    else:
        return "nothing was measured"
    return f"{measure}{where}: {shown(before, measure)} -> {shown(after, measure)}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
