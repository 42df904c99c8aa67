"""Figures in plotly's JSON schema, as plain data: plotly itself is not needed to build or to test them.

The colours of text, axes and grid are left to the page, which knows whether it is in dark mode.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from llmprune.pages.labels import place_names

# Equally visible on white and on black; the symbols distinguish lines where colours do not.
PALETTE = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#2f9e9a", "#d4a72c", "#9c755f", "#e377a2", "#8a929b")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down", "pentagon", "hexagon")

# Charts with more lines than _LEGEND grow by the height of the extra legend entries.
_HEIGHT, _LEGEND, _LEGEND_HEIGHT = 380, 6, 12
_FEW = 12
# Ratio of the largest to the smallest number above which the small ones would be invisible on a linear axis.
_WIDE = 20.0
# Values that differ by less than this part look equal.
_EQUAL = 5e-4
# The smallest axis ranges of a scatter chart, relative to its values: speeds vary by a tenth from run to run.
_LEAST_X, _LEAST_Y = 0.4, 0.05


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or one set of bars or points.

    Attributes:
        name: in the legend.
        x: numbers or names.
        y: None and non-finite values leave a gap.
        hover: the hover text of each point.
        colour: index into the palette.
        dashed: draw a dashed line without markers, for a reference.
        deviation: standard errors of y, drawn as error bars; empty for none.
    """

    name: str
    x: Sequence[float | str]
    y: Sequence[float | None]
    hover: Sequence[str] = ()
    colour: int = 0
    dashed: bool = False
    deviation: Sequence[float | None] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """How to draw an axis.

    Attributes:
        title: including the unit.
        percent: the numbers are fractions, shown in percent.
        log: logarithmic if the numbers are positive and far apart; "always" if ratios are what matters.
        zero: starts at zero.
        names: categorical; plotly would otherwise parse some names as numbers or dates.
        whole: whole numbers, with no ticks between them where there are few.
    """

    title: str
    percent: bool = False
    log: bool | str = False
    zero: bool = False
    names: bool = False
    whole: bool = False


def lines(series: Sequence[Series], x: Axis, y: Axis) -> dict[str, Any]:
    """A line with markers for each series, or a dashed line for a reference."""
    return _figure([_line(one) for one in series], series, x, y)


def bars(series: Sequence[Series], x: Axis, y: Axis) -> dict[str, Any]:
    """Vertical bars, grouped if there are several series."""
    return _figure([_bar(one) for one in series], series, x, y)


def shares(series: Series, x: Axis) -> dict[str, Any]:
    """Horizontal bars for named amounts, the first at the top."""
    trace = {**_bar(series), "orientation": "h", "x": _finite(series.y), "y": _labels(series.x)}
    figure = _figure([trace], [series], x, Axis("", names=True))
    figure["layout"]["yaxis"] |= {"autorange": "reversed", "automargin": True}
    figure["layout"]["height"] = 120 + 28 * len(series.x)
    return figure


def points(series: Sequence[Series], frontier: Series, x: Axis, y: Axis, *, labelled: bool) -> dict[str, Any]:
    """A marker for each run, and a line through the Pareto front if it has several points.

    With `labelled`, each point is labelled with the first line of its hover text, if there is room.
    """
    figure = _figure([_points(one) for one in series], series, x, y)
    layout = figure["layout"]
    layout["height"] = 460
    for place, (name, axis) in enumerate((("xaxis", x), ("yaxis", y))):
        values = [_scaled(layout[name], v) for one in series for v in (one.x, one.y)[place]]
        layout[name]["range"] = _with_room(values, from_zero=axis.zero, least=(_LEAST_X, _LEAST_Y)[place])
    if labelled:
        _label(figure["data"], series, layout)
    if len(set(zip(frontier.x, frontier.y, strict=True))) > 1:
        line = {**_line(frontier), "hoverinfo": "skip"}
        del line["hovertemplate"]
        figure["data"].insert(0, line)
    return figure


def constant(figure: Mapping[str, Any]) -> str | None:
    """The one value of a figure whose two or more values are all equal, as its axis shows it; None of any other.

    Values are equal if no reader could tell them apart: within 0.05 % of the largest. Scatter charts never are.
    """
    traces = figure["data"]
    if any(trace.get("mode", "").startswith("markers") for trace in traces):
        return None
    along = [("xaxis", trace["x"]) if trace.get("orientation") == "h" else ("yaxis", trace["y"]) for trace in traces]
    numbers = [value for _, values in along for value in values if value is not None]
    if len(numbers) < 2 or max(numbers) - min(numbers) > _EQUAL * max(map(abs, numbers)):
        return None
    axis = figure["layout"][along[0][0]]
    title = str(axis["title"]["text"])
    title = title[:1].upper() + title[1:]
    return f"{title} {numbers[0]:.1%}" if "%" in axis.get("tickformat", "") else f"{title} {numbers[0]:.4g}"


def level(name: str, x: Sequence[float | str], value: float) -> Series:
    """A dashed horizontal line from the first to the last x."""
    ends = [x[0], x[-1]] if x else []
    return Series(name, ends, [value] * len(ends), dashed=True, colour=len(PALETTE) - 1)


def _points(series: Series) -> dict[str, Any]:
    return {
        **_line(series),
        "mode": "markers",
        "cliponaxis": False,
        "marker": {"size": 12, "color": PALETTE[series.colour], "symbol": _SYMBOLS[series.colour]},
    }


def _label(traces: Sequence[dict[str, Any]], series: Sequence[Series], layout: Mapping[str, Any]) -> None:
    """Label the points of all series without overlaps."""
    names = [text.split("\n")[0] for one in series for text in one.hover]
    found = [pair for one in series for pair in zip(one.x, one.y, strict=True)]
    places = iter(place_names([(_part(layout["xaxis"], x), _part(layout["yaxis"], y)) for x, y in found], names))
    for trace, one in zip(traces, series, strict=True):
        own = [next(places) for _ in one.x]
        shown = [text.split("\n")[0] if place else "" for text, place in zip(one.hover, own, strict=True)]
        trace |= {
            "mode": "markers+text",
            "text": _labels(shown),
            "textposition": [place or "top center" for place in own],
            "hovertext": _labels(one.hover),
            "hovertemplate": "%{hovertext}<extra></extra>",
        }


def _scaled(axis: Mapping[str, Any], value: Any) -> float:
    """A value in the units of the axis's range."""
    return math.log10(value) if axis.get("type") == "log" else float(value)


def _part(axis: Mapping[str, Any], value: Any) -> float:
    low, high = axis["range"]
    return (_scaled(axis, value) - low) / (high - low)


def _line(series: Series) -> dict[str, Any]:
    colour = PALETTE[series.colour % len(PALETTE)]
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines" if series.dashed else "lines+markers",
        "name": escape(series.name, quote=False),
        "x": _labels(series.x),
        "y": _finite(series.y),
        "line": {"color": colour, "width": 2, **({"dash": "dash"} if series.dashed else {})},
        "marker": {"size": 7, "symbol": _SYMBOLS[series.colour % len(_SYMBOLS)]},
        "hovertemplate": "%{text}<extra></extra>" if series.hover else "%{y}",
    }
    return trace | ({"text": _labels(series.hover)} if series.hover else {})


def _bar(series: Series) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "bar",
        "name": escape(series.name, quote=False),
        "x": _labels(series.x),
        "y": _finite(series.y),
        "marker": {"color": PALETTE[series.colour % len(PALETTE)]},
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>" if series.hover else "%{y}",
    }
    if series.hover:
        trace["text"] = _labels(series.hover)
    if series.deviation:
        trace["error_y"] = {"type": "data", "array": _finite(series.deviation), "color": "#c0392b"}
    return trace


def _figure(traces: list[dict[str, Any]], series: Sequence[Series], x: Axis, y: Axis) -> dict[str, Any]:
    layout = {
        "height": _HEIGHT + _LEGEND_HEIGHT * max(len(traces) - _LEGEND, 0),
        "margin": {"l": 60, "r": 16, "t": 24, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        # A single line still needs its legend; single bars are named on the axis.
        "showlegend": len(traces) > 1 or traces[0]["type"] == "scatter",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": _axis(x, [value for one in series for value in one.x]),
        "yaxis": _axis(y, [value for one in series for value in _reach(one)]),
    }
    return {"data": traces, "layout": layout}


def _reach(series: Series) -> list[float | str | None]:
    """The values of a series with the ends of their error bars, all of which an axis has to hold."""
    ends = [
        value + side * error
        for value, error in zip(series.y, series.deviation, strict=False)
        if value is not None and error is not None
        for side in (-1, 1)
    ]
    return [*series.y, *ends]


def _axis(axis: Axis, values: Sequence[float | str | None]) -> dict[str, Any]:
    numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    title = {"text": escape(axis.title, quote=False), "font": {"size": 13}}
    result: dict[str, Any] = {"title": title, "automargin": True}
    if axis.percent:
        result["tickformat"] = ".0%" if axis.zero or high - low > 0.05 else ".2%"
    if axis.whole and high - low <= _FEW:
        result["dtick"] = 1
    if axis.names:
        result["type"] = "category"
    elif axis.log and low > 0 and (axis.log == "always" or high > _WIDE * low):
        # Ticks at 1, 2 and 5 if there is room.
        result |= {"type": "log", "dtick": "D2" if high < 1000 * low else 1, "tickformat": ".3~g"}
    elif axis.zero and low >= 0:
        # All zeros still need an axis.
        result["range"] = [0, 1.08 * high or 1]
    return result


def _with_room(values: Sequence[float], *, from_zero: bool, least: float) -> list[float]:
    """A range in which the labels of the outermost points stay clear of the axis.

    Args:
        values: in the axis's own scale.
        from_zero: whether the range starts at zero.
        least: the smallest range, relative to the largest value, so that noise does not look like a difference.
    """
    low, high = (0.0 if from_zero else min(values)), max(values)
    missing = max(least * max(abs(low), abs(high)) - (high - low), 0.0)
    room = 0.18 * (high - low) + missing / 2 or 1.0
    return [low if from_zero else low - room, high + room]


def _finite(values: Sequence[float | None]) -> list[float | None]:
    """Numbers rounded to six digits, more than the eye can see; None (a gap) for non-finite values."""
    return [None if value is None or not math.isfinite(value) else float(f"{value:.6g}") for value in values]


def _labels(values: Sequence[Any]) -> list[Any]:
    """Escape texts, in which plotly interprets some HTML, and turn line breaks into its own."""
    return [escape(v, quote=False).replace("\n", "<br>") if isinstance(v, str) else v for v in values]
