"""What the decisions of a run rest on: scores of layers and blocks, a budget's shares, and the energy that stays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmprune.pages.charts import Axis, Series, bars, lines
from llmprune.pages.layers import LAYER, kind_of, pivot
from llmprune.pages.page import Chart, Facts, Part, Table

_SCORES = {
    "block-influence": ("Block influence", "1 - cosine of input and output", "The lowest go."),
    "angular-distance": ("Angular distance", "angle of the run that begins here", "The run of the lowest angle goes."),
    "greedy-kl": ("Measured divergence", "nats a token", "Of the last step in which each was weighed."),
}
_PARTS = {"depth": "decoder layers", "attention": "attention blocks", "mlp": "MLP blocks"}


def evidence_parts(evidence: Mapping[str, Any]) -> list[Part]:
    """Charts of a report's header["decisions"]["evidence"]; kinds of evidence that are not known are named."""
    parts: list[Part] = [_removal(name, evidence[name]) for name in _PARTS if name in evidence]
    if "width" in evidence:
        parts.append(_width(evidence["width"]))
    if "budget" in evidence:
        parts += _budget(evidence["budget"])
    if others := sorted(set(evidence) - {*_PARTS, "width", "budget"}):
        parts.append(Facts((("without a chart", f"{', '.join(others)}: see report.json"),)))
    return parts


def _removal(part: str, removal: Mapping[str, Any]) -> Chart:
    """Scores of layers, or of blocks of one kind: those that go and those that stay."""
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
        for name, gone, colour in (("stays", False, 0), ("goes", True, 3))
    ]
    figure = bars(series, LAYER, Axis(unit))
    # Every layer has one of the two bars.
    figure["layout"]["barmode"] = "overlay"
    table = Table(
        ("layer", "score", ""),
        tuple((str(layer), _number(score), "goes" if layer in removed else "stays") for layer, score in rows),
        text=(2,),
    )
    return Chart(f"chart-{part}", f"{title} of {_PARTS[part]}", figure, table, f"Measured on the dense model. {note}")


def _width(width: Mapping[str, Any]) -> Chart:
    norms, shares = list(width["energy"]), list(width["energy"].values())
    hover = [f"{norm}: {share:.2%}" for norm, share in width["energy"].items()]
    return Chart(
        "chart-width",
        "Energy of the hidden channels that stay",
        bars(
            [Series("energy", list(range(len(norms))), shares, hover)],
            Axis("norms, in order", whole=True),
            _share("energy"),
        ),
        Table(("norm", "energy"), tuple((norm, f"{share:.2%}") for norm, share in width["energy"].items())),
        f"The share of each norm's input in the channels that were chosen by {width['score']}.",
    )


def _budget(plan: Mapping[str, Any]) -> list[Part]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for share in plan["shares"]:
        # Consumers are named inside their layer.
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
            "What the budget takes, beside equal widths",
            lines(_shares(kinds), LAYER, _share("groups removed")),
            _shares_table(kinds, lambda share: f"{share['removed']:,} ({share['uniform']:,}) of {share['groups']:,}"),
            "Dashed: the best choice of the same budget that takes the same part everywhere.",
        ),
        Chart(
            "chart-sensitivity",
            "How much the model misses each structure",
            lines(sensitivity, LAYER, Axis("nats a token", log=True, zero=True)),
            _shares_table(kinds, lambda share: f"{share['divergence']:.4g} (-{share['reference']:,})"),
            f"Divergence from the dense model when this structure alone loses {_references(plan['shares'])} of its "
            "groups; in the table, how many in brackets.",
        ),
    ]


def _shares(kinds: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Series]:
    """For each kind of structure what goes, and what would go uniformly."""
    series = []
    for place, (kind, own) in enumerate(kinds.items()):
        for name, key, dashed in ((kind, "removed", False), (f"{kind}, uniform", "uniform", True)):
            hover = [f"layer {s['layer']}: {name}\n{s[key]:,} of {s['groups']:,} go" for s in own]
            values = [share[key] / max(share["groups"], 1) for share in own]
            series.append(Series(name, [share["layer"] for share in own], values, hover, place, dashed))
    return series


def _shares_table(kinds: Mapping[str, Sequence[Mapping[str, Any]]], shown: Callable[[Mapping[str, Any]], str]) -> Table:
    found = {(share["layer"], kind): share for kind, own in kinds.items() for share in own}
    return pivot(dict(sorted(found.items())), shown)


def _prediction(plan: Mapping[str, Any]) -> Facts:
    uniform = "no equal widths keep the budget"
    if plan["uniform_error"] is not None:
        uniform = f"{plan['uniform_error']:.4g} nats a token"
    taken = "equal widths: their prediction is as good" if plan["is_uniform"] else "different widths"
    return Facts(
        (
            ("taken", taken),
            ("predicted divergence", f"{plan['error']:.4g} nats a token"),
            ("with equal widths", uniform),
            ("no choice is predicted below", f"{plan['bound']:.4g} nats a token"),
        )
    )


def _references(shares: Sequence[Mapping[str, Any]]) -> str:
    """What part of its groups a structure loses when it is weighed; they come in steps, so not all lose the same."""
    parts = [share["reference"] / max(share["groups"], 1) for share in shares]
    low, high = (f"{end(parts, default=0.0):.0%}" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def _sensitivity(kind: str, share: Mapping[str, Any]) -> str:
    without = f"without {share['reference']:,} of {share['groups']:,}: {share['divergence']:.4g} nats a token"
    return f"layer {share['layer']}: {kind}\n{without}"


def _share(title: str) -> Axis:
    return Axis(title, percent=True, zero=True)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
