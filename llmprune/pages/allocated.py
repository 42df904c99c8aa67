"""How an allocation spread the zeros, and the curves of a sensitivity scan."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.pages.charts import Axis, Series, lines
from llmprune.pages.layers import ERROR, LAYER, pivot
from llmprune.pages.page import Chart, Facts, Note, Part, Table

_DIVERGENCE = "KL divergence, nats/token"


def allocation_parts(record: Mapping[str, Any] | None) -> list[Part]:
    """The parts of a report's header["allocation"]; none without one.

    The measured curves are shown as well if the allocation was made from any.
    """
    if not record:
        return []
    parts: list[Part] = [_facts(record)]
    if record.get("worse"):
        parts.append(Note("This allocation is worse than uniform on held-back text: consider allocation: uniform."))
    parts.append(_sparsities(record["units"]))
    return parts + curve_parts(record["evidence"].get("units") or [])


def curve_parts(units: Sequence[Mapping[str, Any]]) -> list[Part]:
    """For each kind of matrix, the relative output error and the KL divergence of each layer against sparsity."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for unit in units:
        kinds.setdefault(unit["kind"], []).append(unit)
    parts: list[Part] = []
    for number, (kind, own) in enumerate(kinds.items()):
        for key, what in (("errors", ERROR), ("divergences", _DIVERGENCE)):
            parts.append(_curves(f"chart-curve-{number}-{key}", kind, own, key, what))
    return parts


def _facts(record: Mapping[str, Any]) -> Facts:
    measured = record["divergence"] is not None or record["worse"] is not None
    tokens = f"nats/token on {record['tokens']:,} held-back tokens, with Wanda masks"
    pairs = [
        ("allocation", str(record["rule"])),
        ("zeros", f"{record['zeros']:,} of {record['size']:,}, as many as with uniform"),
        ("KL divergence", f"{_number(record['divergence'])} {tokens}" if measured else "not measured"),
        ("with uniform", f"{_number(record['uniform_divergence'])} nats/token" if measured else "not measured"),
    ]
    return Facts(tuple(pairs))


def _sparsities(units: Sequence[Mapping[str, Any]]) -> Chart:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for unit in units:
        kinds.setdefault(unit["kind"], []).append(unit)
    series = [
        Series(
            kind,
            [unit["layer"] for unit in own],
            [unit["sparsity"] for unit in own],
            [f"layer {u['layer']}: {kind}\n{u['sparsity']:.2%} instead of {u['uniform']:.2%}" for u in own],
            colour=place,
        )
        for place, (kind, own) in enumerate(kinds.items())
    ]
    found = {(unit["layer"], unit["kind"]): unit for unit in units}
    table = pivot(found, lambda unit: f"{unit['sparsity']:.2%}")
    figure = lines(series, LAYER, Axis("sparsity", percent=True))
    return Chart("chart-allocation", "Sparsity of each matrix", figure, table)


def _curves(name: str, kind: str, own: Sequence[Mapping[str, Any]], key: str, what: str) -> Chart:
    series = []
    for place, unit in enumerate(own):
        pairs = [(x, y) for x, y in zip(unit["levels"], unit[key], strict=True) if y is not None]
        hover = [f"layer {unit['layer']}: {kind}\n{x:.1%}: {y:.4g}" for x, y in pairs]
        series.append(Series(f"layer {unit['layer']}", [x for x, _ in pairs], [y for _, y in pairs], hover, place))
    rows = tuple(
        (str(unit["layer"]), f"{x:.1%}", _number(y))
        for unit in own
        for x, y in zip(unit["levels"], unit[key], strict=True)
        if y is not None
    )
    figure = lines(series, Axis("sparsity", percent=True), Axis(what, log=True))
    return Chart(name, f"{kind}: {what}", figure, Table(("layer", "sparsity", what), rows))


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
