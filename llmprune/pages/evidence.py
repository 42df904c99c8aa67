"""Why a run removed what it did: scores of layers and blocks, a budget's shares, and the energy that is kept."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmprune.pages.charts import Axis, Series, bars, lines
from llmprune.pages.layers import LAYER, kind_of, pivot
from llmprune.pages.page import Chart, Facts, Part, Table

_SCORES = {
    "block-influence": ("Block influence", "1 - cosine of input and output", "The lowest are removed."),
    "angular-distance": (
        "Angular distance",
        "angle across the run of layers that starts here",
        "The run with the smallest angle is removed.",
    ),
    "greedy-kl": ("Measured KL divergence", "nats/token", "From the last step in which each was considered."),
}
_PARTS = {"depth": "decoder layers", "attention": "attention blocks", "mlp": "MLP blocks"}


def evidence_parts(evidence: Mapping[str, Any]) -> list[Part]:
    """Charts of a report's header["decisions"]["evidence"]; unknown kinds of evidence are listed by name."""
    parts: list[Part] = [_removal(name, evidence[name]) for name in _PARTS if name in evidence]
    if "width" in evidence:
        parts.append(_width(evidence["width"]))
    if "budget" in evidence:
        parts += _budget(evidence["budget"])
    if others := sorted(set(evidence) - {*_PARTS, "width", "budget"}):
        parts.append(Facts((("without a chart", f"{', '.join(others)}: see report.json"),)))
    return parts


def _removal(part: str, removal: Mapping[str, Any]) -> Chart:
    """Scores of layers, or of blocks of one kind: those that were removed and those that were kept."""
    title, unit, note = _SCORES.get(removal["method"], (removal["method"], "score", ""))
    removed = {layer for layer, _ in removal["removed"]}
    rows = [(layer, score) for layer, _, score in removal["scores"]]
    series = [
        Series(
            name,
            [layer for layer, _ in rows],
            [score if (layer in removed) == gone else None for layer, score in rows],
            [f"layer {layer}: {_number(score)}\n{name}" for layer, score in rows],
            colour=colour,
        )
        for name, gone, colour in (("kept", False, 0), ("removed", True, 3))
    ]
    figure = bars(series, LAYER, Axis(unit))
    # Every layer has only one of the two bars.
    figure["layout"]["barmode"] = "overlay"
    table = Table(
        ("layer", "score", ""),
        tuple((str(layer), _number(score), "removed" if layer in removed else "kept") for layer, score in rows),
        text=(2,),
    )
    return Chart(f"chart-{part}", f"{title} of {_PARTS[part]}", figure, table, f"Measured on the dense model. {note}")


def _width(width: Mapping[str, Any]) -> Chart:
    norms, shares = list(width["energy"]), list(width["energy"].values())
    hover = [f"{norm}: {share:.2%}" for norm, share in width["energy"].items()]
    return Chart(
        "chart-width",
        "Energy in the hidden channels that are kept",
        bars(
            [Series("energy", list(range(len(norms))), shares, hover)],
            Axis("norms, in order", whole=True),
            _share("energy"),
        ),
        Table(("norm", "energy"), tuple((norm, f"{share:.2%}") for norm, share in width["energy"].items())),
        f"The share of each norm's input energy in the channels that were chosen by {width['score']}.",
    )


def _budget(plan: Mapping[str, Any]) -> list[Part]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for share in plan["shares"]:
        # Consumers are named relative to their layer.
        kinds.setdefault(f"{share['kind']} of {kind_of('', share['consumer'])}", []).append(share)
    sensitivity = [
        Series(
            kind,
            [share["layer"] for share in own],
            [share["divergence"] for share in own],
            [_sensitivity(kind, share) for share in own],
            colour=place,
        )
        for place, (kind, own) in enumerate(kinds.items())
    ]
    return [
        _prediction(plan),
        Chart(
            "chart-budget",
            "What the budget removes, compared with equal widths",
            lines(_shares(kinds), LAYER, _share("groups removed")),
            _shares_table(kinds, lambda share: f"{share['removed']:,} ({share['uniform']:,}) of {share['groups']:,}"),
            "Dashed: the best choice of the same size that removes the same share everywhere.",
        ),
        Chart(
            "chart-sensitivity",
            "How sensitive the model is to each structure",
            lines(sensitivity, LAYER, Axis("nats/token", log=True, zero=True)),
            _shares_table(kinds, lambda share: f"{share['divergence']:.4g} (-{share['reference']:,})"),
            f"KL divergence from the dense model when this structure alone loses {_references(plan['shares'])} of its "
            "groups; the table gives their number in brackets.",
        ),
    ]


def _shares(kinds: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Series]:
    """For each kind of structure, what the budget removes and what equal widths would remove."""
    series = []
    for place, (kind, own) in enumerate(kinds.items()):
        for name, key, dashed in ((kind, "removed", False), (f"{kind}, uniform", "uniform", True)):
            hover = [f"layer {s['layer']}: {name}\n{s[key]:,} of {s['groups']:,} removed" for s in own]
            values = [share[key] / max(share["groups"], 1) for share in own]
            series.append(Series(name, [share["layer"] for share in own], values, hover, place, dashed))
    return series


def _shares_table(kinds: Mapping[str, Sequence[Mapping[str, Any]]], shown: Callable[[Mapping[str, Any]], str]) -> Table:
    found = {(share["layer"], kind): share for kind, own in kinds.items() for share in own}
    return pivot(dict(sorted(found.items())), shown)


def _prediction(plan: Mapping[str, Any]) -> Facts:
    uniform = "no equal widths meet the budget"
    if plan["uniform_error"] is not None:
        uniform = f"{plan['uniform_error']:.4g} nats/token"
    chosen = "equal widths, which are predicted to be as good" if plan["is_uniform"] else "different widths"
    return Facts(
        (
            ("chosen", chosen),
            ("predicted KL divergence", f"{plan['error']:.4g} nats/token"),
            ("with equal widths", uniform),
            ("lower bound for any choice", f"{plan['bound']:.4g} nats/token"),
        )
    )


def _references(shares: Sequence[Mapping[str, Any]]) -> str:
    """The share of its groups that a structure loses when its sensitivity is measured; step sizes make it vary."""
    parts = [share["reference"] / max(share["groups"], 1) for share in shares]
    low, high = (f"{end(parts, default=0.0):.0%}" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def _sensitivity(kind: str, share: Mapping[str, Any]) -> str:
    without = f"without {share['reference']:,} of {share['groups']:,}: {share['divergence']:.4g} nats/token"
    return f"layer {share['layer']}: {kind}\n{without}"


def _share(title: str) -> Axis:
    return Axis(title, percent=True, zero=True)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
