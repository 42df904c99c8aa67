"""What a recipe will remove physically, and what that costs, before it does anything."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.models.decoder import prunable_matrices
from llmprune.structures.decisions import label
from llmprune.structures.find.discovery import Structure
from llmprune.structures.reduction import Reduction


@dataclass(frozen=True, slots=True)
class StructurePlan:
    """Structures of one kind and size.

    Attributes:
        kind: layers, attention, mlp, width, heads, ffn or experts.
        where: how many layers have such a structure; 1 for what belongs to the whole model.
        groups: groups of each.
        kept: groups that stay of each; None where the budget decides.
        method: how they are chosen.
    """

    kind: str
    where: int
    groups: int
    kept: int | None
    method: str


def plan_structures(reduction: Reduction | None) -> tuple[StructurePlan, ...]:
    """List what goes, alike structures together."""
    if reduction is None:
        return ()
    spec, layers = reduction.spec, len(reduction.dense.layers)
    plans: dict[StructurePlan, int] = {}
    for kind, section in spec.sections.items():
        if kind in ("depth", "attention", "mlp"):
            name = "layers" if kind == "depth" else kind
            plans[StructurePlan(name, 1, layers, layers - section.count(layers), section.method)] = 1
    if spec.width is not None and reduction.width is not None:
        plans[StructurePlan("width", 1, reduction.width.size, reduction.width.kept, spec.width.method)] = 1
    counts = reduction.uniform_groups()
    for layer, own in enumerate(reduction.structures):
        for structure, section in own:
            gone = counts[layer].get(label(structure))
            kept = None if gone is None else structure.groups - gone
            plan = StructurePlan(structure.kind, 1, structure.groups, kept, section.method)
            plans[plan] = plans.get(plan, 0) + 1
    return tuple(StructurePlan(p.kind, count, p.groups, p.kept, p.method) for p, count in plans.items())


def consumer_shapes(reduction: Reduction, layer: int) -> list[tuple[int, int]]:
    """(out, in) of the matrices of a layer whose inputs are observed to remove heads or channels from it."""
    wanted = {structure.consumer for structure, _ in reduction.structures[layer] if structure.kind != "experts"}
    return [m.shape for m in prunable_matrices(reduction.dense.layers[layer], "") if m.parameter in wanted]


def observations(reduction: Reduction, layer: int) -> int:
    """How often a layer runs at full size so that its structures can be chosen."""
    return len({structure.kind for structure, _ in reduction.structures[layer]})


def removal_work(reduction: Reduction, layer: int, tokens: int) -> tuple[float, float]:
    """Operations of the Gram matrices of a layer's consumers, and of removing groups from them.

    The solver's cost is that of `structures.solver`: in^3 for the inverse, 2 in^2 out for the energies, and 6 in^2 for
    each column that goes.
    """
    by_name = {m.parameter: m for m in prunable_matrices(reduction.dense.layers[layer], "")}
    gram = solve = 0.0
    for structure, section in reduction.structures[layer]:
        if structure.kind == "experts" or not (section.refitted or section.method == "obs"):
            continue
        matrix = by_name[structure.consumer]
        rows, width = matrix.shape
        gone = _columns(structure, reduction.uniform_groups()[layer])
        gram += matrix.experts * 2.0 * tokens * width**2
        solve += matrix.experts * (width**3 + 2.0 * width**2 * rows + 6.0 * width**2 * gone)
    return gram, solve


def _columns(structure: Structure, counts: Mapping[str, int]) -> int:
    """Columns of the consumer that go; half of them where a budget decides."""
    gone = counts.get(label(structure), structure.groups // 2)
    return gone * structure.columns


def structure_notes(plans: Sequence[StructurePlan], spec: Any) -> Iterator[str]:
    """What a dry run cannot know about structures."""
    if any(plan.kind in ("layers", "attention", "mlp") for plan in plans):
        yield "Which layers or blocks go is decided on the text; the table shows all of them."
    if spec.budget is not None:
        yield "The budget decides the widths on the text; sizes and seconds are those of the layers before that."
    if any(plan.method == "kl" for plan in plans):
        yield "Removal by measured divergence takes one more pass over the layers for each thing that goes."
    if any(plan.method in ("taylor", "fisher") for plan in plans):
        yield "Gradients take one more pass forwards and one backwards, sample by sample."
