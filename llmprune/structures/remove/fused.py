"""FFN channels of fused experts: each expert chooses its own, and they are moved to the same indices in all experts.

Channel 7 of one expert is unrelated to channel 7 of another, but they share one tensor, which can only shrink by the
same indices for all experts. The order of an expert's channels is arbitrary, though: permuting the rows of gate and up
together with the columns of down does not change its output. So the channels to remove are moved to the end:

    order = removed_last(removed, structure.groups)             # removed: one list of groups per expert
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
    """The number of experts that choose channels independently: those of a fused consumer, 1 for any other matrix.

    Args:
        layer: the decoder layer; meta tensors suffice.
        structure: one of its structures.

    Raises:
        ModelError: the experts share tensors that belong to the groups, so they cannot choose independently.
    """
    if structure.kind != "ffn":
        return 1
    counts = {matrix.parameter: matrix.experts for matrix in prunable_matrices(layer, "")}
    experts = counts[structure.consumer]
    if common := [part.name for part in structure.slices if counts.get(part.name, experts) != experts]:
        raise ModelError(
            f"the {experts} experts of {structure.consumer} share {common[0]}",
            expected="experts with separate channels",
            fix="leave this structure out of the recipe",
        )
    return experts


def removed_last(removed: Sequence[Sequence[int]], groups: int) -> Tensor:
    """The order of each expert's groups that puts the removed ones last and keeps the order of the others.

    Args:
        removed: for each expert the same number of distinct groups, in [0, groups).
        groups: number of groups in each expert.

    Returns:
        int64 [experts, groups]: the group at each new position.

    Raises:
        PatternError: the experts lose different numbers of groups, or a group is out of range or repeats.
    """
    lost = {len(own) for own in removed}
    if len(lost) != 1 or any(len(set(own)) < len(own) or not set(own) <= set(range(groups)) for own in removed):
        raise PatternError(
            f"{sorted(lost)} of {groups} groups are to be removed from each of {len(removed)} experts",
            expected=f"the same number from every expert, distinct and below {groups}",
        )
    return torch.tensor([[*(set(range(groups)) - set(own)), *own] for own in map(sorted, removed)])


def last_groups(structure: Structure, remove: int) -> tuple[int, ...]:
    """The last groups, where `removed_last` has put those to remove."""
    return tuple(range(structure.groups - remove, structure.groups))


def permute_channels(parameters: Mapping[str, Tensor], structure: Structure, order: Tensor) -> None:
    """Reorder the channels of each expert, in place; the layer's output does not change.

    Heads cannot be reordered this way: all experts share their keys and values.

    Args:
        parameters: name inside the layer -> tensor at full size; at least those of the structure's slices.
        structure: of kind "ffn" with a fused consumer (`experts_of`).
        order: int64 [experts, groups], a permutation for each expert: the group at each new position.

    Raises:
        PatternError: a row of `order` is not a permutation of the groups.
        ModelError: the structure does not consist of FFN channels.
    """
    if structure.kind != "ffn":
        raise ModelError(
            f"the groups of {structure.consumer} ({structure.kind}) have the same order in all experts",
            expected="FFN channels, which are separate in each expert",
            fix="remove the same groups from all of its matrices",
        )
    every = list(range(structure.groups))
    if any(sorted(own) != every for own in order.tolist()):
        raise PatternError(
            f"{list(order.shape)} is not an order of the {structure.groups} groups of {structure.consumer}",
            expected="[experts, groups], each row with every group once",
        )
    with torch.no_grad():
        for part in structure.slices:
            views, dim, index = by_expert(part, parameters[part.name], len(order))
            for own, view in zip(order.cpu(), views, strict=True):
                places = index.flatten().to(view.device)
                sources = index[own].flatten().to(view.device)
                view.index_copy_(dim - 1, places, view.index_select(dim - 1, sources))


def by_expert(part: Slice, tensor: Tensor, experts: int) -> tuple[Tensor, int, Tensor]:
    """View the fused parameter of a slice as one tensor per expert.

    Args:
        part: of a structure whose consumer is fused and whose groups exist in all experts.
        tensor: its parameter: [experts, *, *], [experts, n] for a bias, or matrices stacked in [experts * rows, *].
        experts: their number.

    Returns:
        A view with the experts along dimension 0, its dimension along which the groups are, and the index [groups, k]
        inside each expert.
    """
    if tensor.dim() == 3 or (tensor.dim() == 2 and part.dim == 1 and len(tensor) == experts):
        return tensor, part.dim, part.index
    index = part.index.unflatten(1, (experts, -1))[:, 0] if part.dim == 0 else part.index
    return tensor.unflatten(0, (experts, -1)), part.dim + 1, index
