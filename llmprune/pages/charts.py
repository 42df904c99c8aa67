"""Figures in plotly's JSON schema, as plain data: nothing is imported to make them, and tests can read them.

Colours of text, axes and grid are left to the page, which knows whether it is dark.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from llmprune.pages.labels import place_names

# Of about equal weight on white and on black; the symbols tell lines apart where colours do not.
PALETTE = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#2f9e9a", "#d4a72c", "#9c755f", "#e377a2", "#8a929b")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down", "pentagon", "hexagon")

# What a legend takes from a chart is given back, from so many lines on.
_HEIGHT, _LEGEND, _LEGEND_HEIGHT = 380, 6, 12
_FEW = 12
# Factor between the largest and the smallest number from which on small ones would lie on the axis.
_WIDE = 20.0
# The smallest ranges of a chart of points, as parts of its values: speeds differ by a tenth from run to run.
_LEAST_X, _LEAST_Y = 0.4, 0.05


@dataclass(frozen=True, slots=True)
class Series:
    """Numbers that belong together.

    Attributes:
        name: for the legend.
        x: numbers or names.
        y: None and what is not finite leave a gap.
        hover: what is said of each point.
        colour: place in the palette.
        dashed: a line without markers, for what is compared with.
        deviation: standard errors of y, drawn as bars; empty for none.
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
    """What stands at an axis.

    Attributes:
        title: with the unit.
        percent: numbers are fractions.
        log: logarithmic if the numbers are positive and far apart; "always" where ratios are what matters.
        zero: begins at zero.
        names: holds names, which plotly would otherwise read as numbers or dates where it can.
        whole: counts things, so that few of them have no ticks between.
    """

    title: str
    percent: bool = False
    log: bool | str = False
    zero: bool = False
    names: bool = False
    whole: bool = False


def lines(series: Sequence[Series], x: Axis, y: Axis) -> dict[str, Any]:
    """A line with markers for each series; a dashed one for what is compared with."""
    return _figure([_line(one) for one in series], series, x, y)


def bars(series: Sequence[Series], x: Axis, y: Axis) -> dict[str, Any]:
    """Bars, those of several series beside each other."""
    return _figure([_bar(one) for one in series], series, x, y)


def shares(series: Series, x: Axis) -> dict[str, Any]:
    """Horizontal bars for named amounts, the first on top."""
    trace = {**_bar(series), "orientation": "h", "x": _finite(series.y), "y": _labels(series.x)}
    figure = _figure([trace], [series], x, Axis("", names=True))
    figure["layout"]["yaxis"] |= {"autorange": "reversed", "automargin": True}
    figure["layout"]["height"] = 120 + 28 * len(series.x)
    return figure


def points(series: Sequence[Series], frontier: Series, x: Axis, y: Axis, *, labelled: bool) -> dict[str, Any]:
    """A marker for each run, and a line through those that no other run beats, where they are several.

    Names are the first lines of what is said of the points; `labelled` ones have theirs beside them where it has room.
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
    """Write names beside points, those of all series out of each other's way."""
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
    """A value as the ranges of an axis have it."""
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
        # One line still says what it is; bars have their names at the axis.
        "showlegend": len(traces) > 1 or traces[0]["type"] == "scatter",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": _axis(x, [value for one in series for value in one.x]),
        "yaxis": _axis(y, [value for one in series for value in one.y]),
    }
    return {"data": traces, "layout": layout}


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
        # Labels at 1, 2 and 5 while there is room for them.
        result |= {"type": "log", "dtick": "D2" if high < 1000 * low else 1, "tickformat": ".3~g"}
    elif axis.zero and low >= 0:
        # Nothing but zeros still has an axis.
        result["range"] = [0, 1.08 * high or 1]
    return result


def _with_room(values: Sequence[float], *, from_zero: bool, least: float) -> list[float]:
    """A range in which names beside the outermost points do not run into the axis.

    Args:
        values: shown, in the axis's own scale.
        from_zero: begins there.
        least: the smallest range, as a part of the largest value: noise shall not look like a difference.
    """
    low, high = (0.0 if from_zero else min(values)), max(values)
    missing = max(least * max(abs(low), abs(high)) - (high - low), 0.0)
    room = 0.18 * (high - low) + missing / 2 or 1.0
    return [low if from_zero else low - room, high + room]


def _finite(values: Sequence[float | None]) -> list[float | None]:
    """Numbers to six digits, which no eye tells from more; a gap for what is none."""
    return [None if value is None or not math.isfinite(value) else float(f"{value:.6g}") for value in values]


def _labels(values: Sequence[Any]) -> list[Any]:
    """Plotly reads a little HTML in texts: names are escaped, and lines end with its own break."""
    return [escape(v, quote=False).replace("\n", "<br>") if isinstance(v, str) else v for v in values]
