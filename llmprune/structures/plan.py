"""What a recipe will physically remove, and what that costs, before anything runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from llmprune.models.decoder import prunable_matrices
from llmprune.recipe.structures import Depth, Groups, Structures, SubBlockRemoval
from llmprune.structures.choose.scores import needs_gram
from llmprune.structures.decisions import label
from llmprune.structures.find.discovery import Structure
from llmprune.structures.mergeable import Mergeable
from llmprune.structures.removable import Removable


@dataclass(frozen=True, slots=True)
class StructurePlan:
    """Structures of the same kind and size.

    Attributes:
        kind: layers, attention, mlp, width, heads, ffn or experts.
        where: how many layers have such a structure; 1 for those of the whole model.
        groups: groups in each.
        kept: groups kept in each; None if the budget decides.
        method: how the groups are chosen.
    """

    kind: str
    where: int
    groups: int
    kept: int | None
    method: str


def plan_structures(removable: Removable | None) -> tuple[StructurePlan, ...]:
    """List what is removed, with identical structures merged."""
    if removable is None:
        return ()
    spec, layers = removable.spec, len(removable.dense.layers)
    plans: dict[StructurePlan, int] = {}
    for kind, section in spec.sections.items():
        if isinstance(section, Depth | SubBlockRemoval):
            name = "layers" if kind == "depth" else kind
            plans[StructurePlan(name, 1, layers, layers - section.count(layers), section.method)] = 1
    if spec.width is not None and removable.width is not None:
        plans[StructurePlan("width", 1, removable.width.size, removable.width.kept, spec.width.method)] = 1
    counts = removable.uniform_groups()
    for layer, own in enumerate(removable.structures):
        for structure, section in own:
            gone = counts[layer].get(label(structure))
            kept = None if gone is None else structure.groups - gone
            plan = StructurePlan(structure.kind, 1, structure.groups, kept, section.method)
            plans[plan] = plans.get(plan, 0) + 1
    return tuple(StructurePlan(p.kind, count, p.groups, p.kept, p.method) for p, count in plans.items())


def consumer_shapes(removable: Removable, layer: int) -> list[tuple[int, int]]:
    """(out, in) of a layer's matrices whose inputs are observed in order to remove heads or channels."""
    wanted = {structure.consumer for structure, _ in removable.structures[layer] if structure.kind != "experts"}
    return [m.shape for m in prunable_matrices(removable.dense.layers[layer], "") if m.parameter in wanted]


def observations(removable: Removable, layer: int) -> int:
    """How many times a layer runs at full size in order to choose what is removed from it."""
    return len({structure.kind for structure, _ in removable.structures[layer]})


def removal_work(removable: Removable, layer: int, tokens: int) -> tuple[float, float]:
    """FLOPs of the Hessians (Gram matrices) of a layer's consumers, and of removing groups from them.

    The solver's cost is that of `structures.remove.solver`: in^3 for the inverse, 2 in^2 out for the energies, and
    6 in^2 for each removed column.
    """
    by_name = {m.parameter: m for m in prunable_matrices(removable.dense.layers[layer], "")}
    gram = solve = 0.0
    for structure, section in removable.structures[layer]:
        if not isinstance(section, Groups) or not (section.refitted or needs_gram(section.method)):
            continue
        matrix = by_name[structure.consumer]
        rows, width = matrix.shape
        gone = _columns(structure, removable.uniform_groups()[layer])
        gram += matrix.experts * 2.0 * tokens * width**2
        solve += matrix.experts * (width**3 + 2.0 * width**2 * rows + 6.0 * width**2 * gone)
    return gram, solve


def kept_share(removable: Removable) -> float:
    """The fraction of the layers that are kept.

    Args:
        removable: what is removed.
    """
    depth, layers = removable.spec.depth, len(removable.dense.layers)
    return 1.0 if depth is None else 1 - depth.count(layers) / layers


def replacing_work(removable: Removable, tokens: int, counted: int) -> tuple[float, float, float]:
    """Passes over a layer, FLOPs of Gram matrices, and of solving, for letting kept layers stand for removed ones.

    Which layers these are is not known yet: every layer gets its share of the removed ones, each of which is taken to
    have a kept layer of its own before it. That one runs once, twice more on the calibration sequences (to merge both:
    their attentions twice, their MLPs once) and twice on the validation sequences; the removed one runs once.

    Args:
        removable: what is removed.
        tokens: of the calibration text, with the validation sequences.
        counted: without them.
    """
    depth = removable.spec.depth
    if depth is None or depth.replace is None:
        return 0.0, 0.0, 0.0
    layers, size = len(removable.dense.layers), removable.dense.config.get_text_config(decoder=True).hidden_size
    share = depth.count(layers) / layers
    if removable.mergeable is not None:
        shapes = merged_shapes(removable.mergeable, removable.dense.layers[0])
        gram = sum(2.0 * counted * width**2 for _, width in shapes)
        solve = sum(width**3 + 2.0 * width**2 * rows + 3.0 * width**3 for rows, width in shapes)
        return share * ((3 * counted + 2 * (tokens - counted)) / tokens + 2), share * gram, share * solve
    passes = (2 * counted + 2 * (tokens - counted)) / tokens + 2
    return share * passes, share * 4.0 * counted * size**2, share * 8.0 / 3.0 * size**3


def merged_shapes(found: Mergeable, layer: nn.Module) -> list[tuple[int, int]]:
    """(out, in) of the matrices from which groups are removed to merge two layers.

    Args:
        found: of their model.
        layer: either of them.
    """
    consumers = [layer.get_parameter(structure.consumer) for structure in found.groups.values()]
    return [(weight.shape[0], 2 * weight.shape[1]) for weight in consumers]


def _columns(structure: Structure, counts: Mapping[str, int]) -> int:
    """Number of the consumer's columns that are removed; half of them if a budget decides."""
    gone = counts.get(label(structure), structure.groups // 2)
    return gone * structure.columns


def structure_notes(plans: Sequence[StructurePlan], spec: Structures) -> Iterator[str]:
    """What a dry run cannot predict about structures."""
    if any(plan.kind in ("layers", "attention", "mlp") for plan in plans):
        yield "Which layers or blocks are removed depends on the calibration text; the table shows all of them."
    if spec.depth is not None and spec.depth.replace == "linear":
        yield "Each kept layer before a run of removed ones is multiplied by a linear map that stands for the run."
    if spec.depth is not None and spec.depth.replace == "merge":
        yield "Each kept layer before a run of removed ones takes up the best of the heads and channels of all of them."
    if spec.budget is not None:
        yield "The budget sets the widths from the calibration text; sizes and seconds are those of the full layers."
    if any(plan.method == "kl" for plan in plans):
        yield "Removal by measured KL divergence takes an extra pass over the layers for each layer or block removed."
    if any(plan.method in ("taylor", "fisher") for plan in plans):
        yield "Gradients take an extra forward and backward pass, sample by sample."
