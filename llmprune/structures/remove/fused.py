"""FFN channels inside fused experts: each expert chooses its own, and they move to the same numbers in all of them.

Channel 7 of one expert has nothing to do with channel 7 of another, but they lie in one tensor, which can only shrink
for all experts alike. The order of the channels of an expert is free, though: moving the rows of gate and up together
with the columns of down changes nothing of what it computes. So what each expert can do without is moved to its end:

    order = removed_last(removed, structure.groups)             # removed: one list of groups an expert
    permute_channels(dict(layer.module.named_parameters()), structure, order)
    cut = Cut(structure, last_groups(structure, len(removed[0])))
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from llmprune.errors import ModelError, PatternError
from llmprune.models.decoder import prunable_matrices
from llmprune.structures.find.discovery import Slice, Structure


def experts_of(layer: nn.Module, structure: Structure) -> int:
    """How many experts choose their channels each for itself: those of a fused consumer, 1 of any other matrix.

    Args:
        layer: the decoder layer; meta tensors suffice.
        structure: one of its structures.

    Raises:
        ModelError: the experts have some of what goes with the groups in common, so they cannot choose.
    """
    if structure.kind != "ffn":
        return 1
    counts = {matrix.parameter: matrix.experts for matrix in prunable_matrices(layer, "")}
    experts = counts[structure.consumer]
    if common := [part.name for part in structure.slices if counts.get(part.name, experts) != experts]:
        raise ModelError(
            f"the {experts} experts of {structure.consumer} have {common[0]} in common",
            expected="experts whose channels are their own",
            fix="leave this structure out of the recipe",
        )
    return experts


def removed_last(removed: Sequence[Sequence[int]], groups: int) -> Tensor:
    """The order of each expert's groups that puts the removed ones last, and leaves the others as they follow.

    Args:
        removed: for each expert as many groups, distinct, in [0, groups).
        groups: how many each expert has.

    Returns:
        int64 [experts, groups]: at each place the group that comes there.

    Raises:
        PatternError: the experts lose different numbers of groups, or a group is out of range or repeats.
    """
    lost = {len(own) for own in removed}
    if len(lost) != 1 or any(len(set(own)) < len(own) or not set(own) <= set(range(groups)) for own in removed):
        raise PatternError(
            f"{sorted(lost)} of {groups} groups to remove from each of {len(removed)} experts",
            expected=f"as many from every expert, distinct numbers below {groups}",
        )
    return torch.tensor([[*(set(range(groups)) - set(own)), *own] for own in map(sorted, removed)])


def last_groups(structure: Structure, remove: int) -> tuple[int, ...]:
    """The groups that a cut takes once `removed_last` has put them there."""
    return tuple(range(structure.groups - remove, structure.groups))


def permute_channels(parameters: Mapping[str, Tensor], structure: Structure, order: Tensor) -> None:
    """Reorder the channels of each expert, in place; what the layer computes stays the same.

    Heads cannot be moved so: their keys and values serve all experts.

    Args:
        parameters: name inside the layer -> tensor at full size; at least those of the structure's slices.
        structure: of kind "ffn" with a fused consumer (`experts_of`).
        order: int64 [experts, groups], a permutation for each expert: which group comes to each place.

    Raises:
        PatternError: a row of `order` is no permutation of the groups.
        ModelError: the structure is none of FFN channels.
    """
    if structure.kind != "ffn":
        raise ModelError(
            f"the groups of {structure.consumer} ({structure.kind}) have one order for all experts",
            expected="FFN channels, which each expert has for itself",
            fix="remove the same groups from all of its matrices",
        )
    every = list(range(structure.groups))
    if any(sorted(own) != every for own in order.tolist()):
        raise PatternError(
            f"an order {list(order.shape)} of the {structure.groups} groups of {structure.consumer}",
            expected="[experts, groups], each row with every group once",
        )
    with torch.no_grad():
        for part in structure.slices:
            views, dim, index = by_expert(part, parameters[part.name], len(order))
            for own, view in zip(order.cpu(), views, strict=True):
                places = index.flatten().to(view.device)
                come = index[own].flatten().to(view.device)
                view.index_copy_(dim - 1, places, view.index_select(dim - 1, come))


def by_expert(part: Slice, tensor: Tensor, experts: int) -> tuple[Tensor, int, Tensor]:
    """See the fused parameter of a slice as one tensor an expert.

    Args:
        part: of a structure whose consumer is fused, and whose groups all experts have.
        tensor: its parameter: [experts, *, *], [experts, n] for a bias, or matrices stacked in [experts * rows, *].
        experts: how many.

    Returns:
        A view with the experts along dimension 0, the dimension along which the groups lie in it, and the index
        [groups, k] inside each expert.
    """
    if tensor.dim() == 3 or (tensor.dim() == 2 and part.dim == 1 and len(tensor) == experts):
        return tensor, part.dim, part.index
    index = part.index.unflatten(1, (experts, -1))[:, 0] if part.dim == 0 else part.index
    return tensor.unflatten(0, (experts, -1)), part.dim + 1, index
