"""Figures are what plotly's schema allows, and show what they are given."""

import math
from typing import Any

import pytest

from llmprune.pages.charts import Axis, Series, bars, constant, level, lines, points, shares

X, Y = Axis("decoder layer"), Axis("error", log=True, zero=True)


def line(*y: float | None, **more: Any) -> Series:
    return Series("q_proj", list(range(len(y))), list(y), **more)


def test_gaps_stay_gaps_and_nothing_infinite_is_drawn() -> None:
    (trace,) = lines([line(0.5, None, math.inf, math.nan)], X, Y)["data"]
    assert trace["y"] == [0.5, None, None, None]
    assert trace["x"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("values", "kind"),
    [((0.1, 0.2), "range"), ((0.001, 0.2), "type"), ((0.0, 0.2), "range"), ((0.0, 0.0), "range"), ((None,), "range")],
)
def test_numbers_far_apart_are_shown_logarithmically_if_all_are_positive(values: Any, kind: str) -> None:
    axis = lines([line(*values)], X, Y)["layout"]["yaxis"]
    assert {"range", "type"} & set(axis) == {kind}
    if kind == "range":
        assert axis["range"][0] == 0
        assert axis["range"][1] > max(value or 0 for value in values)


def test_names_are_no_markup() -> None:
    series = Series("<b>&", ["<i>"], [1.0], ["a\n<a href='https://x'>"])
    for figure in (lines([series], X, Y), bars([series], X, Y)):
        (trace,) = figure["data"]
        assert trace["name"] == "&lt;b&gt;&amp;"
        assert trace["x"] == ["&lt;i&gt;"]
        assert trace["text"] == ["a<br>&lt;a href='https://x'&gt;"]


def test_horizontal_bars_grow_with_their_number() -> None:
    few, many = (shares(Series("s", [str(n) for n in range(count)], [1.0] * count), X) for count in (2, 20))
    assert few["data"][0]["y"] == ["0", "1"]
    assert few["data"][0]["x"] == [1.0, 1.0]
    assert many["layout"]["height"] > few["layout"]["height"]
    assert few["layout"]["yaxis"]["autorange"] == "reversed"


def test_error_bars_end_inside_the_axis() -> None:
    score = Axis("score", percent=True, zero=True)
    low, high = bars([Series("s", ["a", "b"], [0.5, 0.9], deviation=[0.1, 0.4])], X, score)["layout"]["yaxis"]["range"]
    assert low == 0
    assert high > 1.3
    # One that reaches below zero: plotly's own range, which has room for all.
    assert "range" not in bars([Series("s", ["a"], [0.1], deviation=[0.2])], X, score)["layout"]["yaxis"]


def test_equal_values_are_recognised() -> None:
    share = Axis("sparsity", percent=True, zero=True)
    assert constant(lines([line(0.5, 0.50001), level("all", [0, 1], 0.5)], X, share)) == "Sparsity 50.0%"
    assert constant(lines([line(0.0, 0.0, None)], X, Y)) == "Error 0"
    assert constant(lines([line(0.5, 0.501)], X, share)) is None
    assert constant(lines([line(0.5, None)], X, share)) is None
    assert constant(shares(Series("peak", ["predicted", "measured"], [8.0, 8.0]), Axis("MB"))) == "MB 8"
    assert constant(runs((1, 2), (1, 2))) is None


def test_few_layers_have_no_ticks_between_them() -> None:
    layers = Axis("decoder layer", whole=True)
    few, many = (lines([line(*[1.0] * count)], layers, Y)["layout"]["xaxis"] for count in (3, 80))
    assert few["dtick"] == 1
    assert "dtick" not in many


def test_all_figures_are_valid_to_plotly() -> None:
    objects = pytest.importorskip("plotly.graph_objects", reason="the plotting library validates")
    named = Series("dense", ["a", "b"], [0.5, 0.25], ["h", "h"], 1, deviation=[0.1, None])
    frontier = Series("not beaten", [1.0], [2.0], dashed=True)
    found = [
        lines([line(0.001, 1.0, colour=17), level("all", [0, 1], 0.5)], X, Y),
        bars([named, named], Axis("", names=True), Axis("score", percent=True, zero=True)),
        shares(named, Axis("seconds")),
        points([line(1.0, 2.0, hover=["a", "b"])], frontier, Axis("MB", zero=True), Y, labelled=True),
        points([line(1.0, 2.0, hover=["a", "b"])], frontier, Axis("tokens", log="always"), Y, labelled=False),
    ]
    for figure in found:
        objects.Figure(figure)  # raises on any key or value that the schema has not
    assert found[3]["data"][0]["mode"] == "markers+text"
    assert found[4]["data"][0]["mode"] == "markers"


def runs(*pairs: tuple[float, float], best: int = 1) -> dict[str, Any]:
    x, y = zip(*pairs, strict=True)
    named = Series("runs", x, y, [f"run-{number}\nsaid" for number in range(len(pairs))])
    front = Series("not beaten", x[:best], y[:best], dashed=True)
    return points([named], front, Axis("speed"), Axis("perplexity"), labelled=True)


def test_a_line_needs_two_points() -> None:
    assert [len(runs((1, 2), (2, 3), best=best)["data"]) for best in (1, 2)] == [1, 2]
    assert len(runs((1, 2), (1, 2), best=2)["data"]) == 1


def test_noise_does_not_fill_an_axis() -> None:
    low, high = runs((1.0, 20.0), (1.01, 30.0))["layout"]["xaxis"]["range"]
    assert low < 0.85 < 1.15 < high
    low, high = runs((1.0, 20.0), (9.0, 30.0))["layout"]["xaxis"]["range"]
    assert (low, high) == (pytest.approx(1 - 0.18 * 8), pytest.approx(9 + 0.18 * 8))


def test_names_keep_out_of_each_other_s_way() -> None:
    (apart,) = runs((1, 2), (9, 30))["data"]
    assert (apart["text"], apart["textposition"]) == (["run-0", "run-1"], ["top center"] * 2)
    (near,) = runs((1, 2), (1, 2.5), (9, 30))["data"]
    assert near["text"] == ["run-0", "run-1", "run-2"]
    assert near["textposition"][0] != near["textposition"][1]
    # Twenty at one place: a few have room, the others say their names to the pointer.
    (crowd,) = runs(*[(1, 2)] * 20, (9, 30))["data"]
    shown = [place for text, place in zip(crowd["text"][:20], crowd["textposition"], strict=False) if text]
    assert 2 <= len(shown) == len(set(shown)) < 9
    assert crowd["hovertext"][19] == "run-19<br>said"
