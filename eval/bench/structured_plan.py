"""Which structures the benchmark of structured pruning removes: the rows of its tables."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.sizes import layer_size, parameters
from llmprune.recipe.structures import GroupScore
from llmprune.structures.describe.latency import level_sizes
from llmprune.structures.find.discovery import Structure, find_structures

SCORES: tuple[str, ...] = get_args(GroupScore)
FRACTIONS = (0.125, 0.25, 0.375, 0.5)
WIDTH_SCORES = ("energy", "activation-norm", "norm-gain", "magnitude-l1", "magnitude-l2")
# Chosen on other text (LOG.md). With four times the text, a quarter of the epochs are as many steps.
MATCHING = {"epochs": 8, "lr": 1.0e-3, "sequences": 4}
MORE, MATCHING_MORE = 512, {**MATCHING, "epochs": 2}
# A budget keeps multiples of these numbers of FFN channels, and may remove 640 of 704, which 64 divides.
MULTIPLES, MOST = (64, 16, 1), 0.91


@dataclass(frozen=True, slots=True)
class Row:
    """One run.

    Attributes:
        removed: what is removed; a column of the table.
        label: how it is chosen; a row of the table.
        structures: the section of the recipe.
        reconstruct: likewise; None: layers are not fitted as a whole.
        samples: calibration sequences; None: those of the protocol.
    """

    removed: str
    label: str
    structures: Mapping[str, Any]
    reconstruct: Mapping[str, Any] | None = None
    samples: int | None = None

    @property
    def name(self) -> str:
        """A unique name of the row."""
        return f"{self.removed}: {self.label}"


def quality_rows(source: CheckpointSource) -> list[Row]:
    """Every score, with and without a refit, for one and two KV groups of each layer and for FFN channels."""
    heads = _structures(source)["heads"].groups
    parts: dict[str, dict[str, Any]] = {f"{part:.1%} FFN": {"ffn": part} for part in FRACTIONS}
    parts[f"25.0% FFN + 1 of {heads} heads"] = {"heads": 1, "ffn": 0.25}
    parts |= {f"{count} of {heads} heads": {"heads": count} for count in (1, 2) if count < heads}
    return [
        Row(removed, label, {kind: _section(kind, amount, choice) for kind, amount in amounts.items()})
        for removed, amounts in parts.items()
        for label, choice in _choices(amounts)
    ]


def budget_rows(source: CheckpointSource) -> list[Row]:
    """One budget for all layers, of the size of a quarter of the FFN channels and one KV group of each layer.

    It is compared with every uniform choice of the same number of parameters: some heads of each layer, and channels
    for the rest.
    """
    layer, found = source.layers[0], _structures(source)
    heads, ffn = found["heads"], found["ffn"]

    def saved(structure: Structure, groups: int) -> float:
        full, rest = level_sizes(layer, structure, [0, groups], parameters)
        return full - rest

    total = saved(heads, 1) + saved(ffn, ffn.groups // 4)
    part = total / layer_size(layer, parameters)
    removed = f"{part:.1%} of the layers' parameters"
    rows = []
    for count in range(heads.groups):
        channels = math.floor((total - saved(heads, count)) / saved(ffn, 1) + 1e-9)
        if 0 < channels < ffn.groups:
            amounts = {"heads": count, "ffn": channels} if count else {"ffn": channels}
            structures = {kind: _section(kind, amount, {"method": "obs"}) for kind, amount in amounts.items()}
            rows.append(Row(removed, f"uniform: {count} of {heads.groups} heads, {channels} channels", structures))
    for multiple in MULTIPLES:
        # As much as the uniform choices remove; slightly less, so that rounding cannot ask for one group more.
        budget = {"remove": part * (1 - 1e-12), "multiple": multiple, "most": MOST}
        rows.append(Row(removed, f"budget: multiple {multiple}", {"heads": {}, "ffn": {}, "budget": budget}))
    return rows


def depth_rows(source: CheckpointSource) -> list[Row]:
    """Layers, blocks of layers and hidden channels."""
    layers = len(source.layers)
    count = max(layers // 4, 1)
    hidden = {name: {"width": {"remove": 0.25, "method": name}} for name in WIDTH_SCORES}
    parts: dict[str, dict[str, dict[str, Any]]] = {
        f"{count} of {layers} layers": {
            name: {"depth": {"remove": count, "method": name}} for name in ("block-influence", "angular", "kl")
        },
        **{
            f"{count} {block} blocks": {
                name: {part: {"remove": count, "method": name}} for name in ("block-influence", "kl")
            }
            for part, block in (("attention", "attention"), ("mlp", "MLP"))
        },
        "25% of the hidden channels": hidden,
    }
    return [Row(removed, name, structures) for removed, own in parts.items() for name, structures in own.items()]


def matched_rows(source: CheckpointSource) -> list[Row]:
    """What block matching adds to exact removal and to removed layers, with two amounts of calibration text."""
    heads, layers = _structures(source)["heads"].groups, len(source.layers)
    count = max(layers // 4, 1)
    parts: dict[str, dict[str, Any]] = {f"{part:.1%} FFN": {"ffn": part} for part in (0.25, 0.5)}
    parts[f"25.0% FFN + 1 of {heads} heads"] = {"heads": 1, "ffn": 0.25}
    exact = {
        removed: {kind: _section(kind, amount, {"method": "obs"}) for kind, amount in amounts.items()}
        for removed, amounts in parts.items()
    }
    rows = [row for removed, structures in exact.items() for row in _fitted(removed, "obs", structures)]
    removed = f"{count} of {layers} layers"
    for label, replaced in (("", {}), (" + linear map", {"replace": "linear"}), (" + merge", {"replace": "merge"})):
        rows += _fitted(removed, f"block-influence{label}", {"depth": {"remove": count, **replaced}})
    return rows


def _fitted(removed: str, label: str, structures: Mapping[str, Any]) -> Iterator[Row]:
    yield Row(removed, label, structures)
    yield Row(removed, f"{label} + block matching", structures, MATCHING)
    yield Row(removed, f"{label} + block matching, {MORE} samples", structures, MATCHING_MORE, MORE)


def _choices(amounts: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The scores that apply to these structures, each with and without a refit."""
    for score in SCORES:
        if score == "activation-frequency" and "heads" in amounts:
            continue  # about half of the sums that attention passes to o_proj are positive, whatever the head
        for refit in (True,) if score == "obs" else (False, True):
            yield f"{score} + refit" if refit else score, {"method": score, "refit": refit}


def _section(kind: str, amount: float, choice: Mapping[str, Any]) -> dict[str, Any]:
    return {"remove": amount, **choice, **({"multiple": 1} if kind == "ffn" else {})}


def _structures(source: CheckpointSource) -> dict[str, Structure]:
    """Heads and channels of the first layer; in the models of this benchmark all layers are the same."""
    return {structure.kind: structure for structure in find_structures(source.decoder)[0]}
