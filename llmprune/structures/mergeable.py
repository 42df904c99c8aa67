"""Find out whether decoder layers can be merged: whether the heads and FFN channels of one can move into another.

The gains of their norms must fold into what reads them, all layers must have the same heads and channels, attention and
MLP must be separate, and apart from gains, and biases that add up, no parameter may be shared by the groups of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llmprune.errors import ModelError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.structures.find.discovery import Structure
from llmprune.structures.find.subblocks import PARTS, Part, SubBlocks, find_subblocks
from llmprune.structures.residual import Residual, find_residual

_KINDS = {"attention": "heads", "mlp": "ffn"}


@dataclass(frozen=True, slots=True, eq=False)
class Mergeable:
    """What it takes to merge any two layers of a model.

    Attributes:
        residual: which gains fold into what.
        blocks: the attention and the MLP of each layer, neither refused.
        groups: the heads, and the FFN channels; the same in every layer.
    """

    residual: Residual
    blocks: Sequence[SubBlocks]
    groups: dict[Part, Structure]


def bias_of(consumer: str) -> str:
    """The name of the bias that is added to a consumer's product, if there is one."""
    return f"{consumer.removesuffix('.weight')}.bias"


def find_mergeable(dense: CheckpointSource, found: Sequence[Sequence[Structure]]) -> Mergeable:
    """Find what it takes to merge the layers of a checkpoint, without reading any weights.

    Args:
        dense: the checkpoint.
        found: the structures of each layer.

    Raises:
        ModelError: its layers cannot be merged, with the reason.
    """
    blocks = find_subblocks(dense.decoder, found)
    groups: dict[Part, Structure] = {}
    for index, (layer, structures) in enumerate(zip(dense.layers, found, strict=True)):
        for part in PARTS:
            own = _only(dense, index, structures, part, blocks)
            if not _same(own, groups.setdefault(part, own)):
                raise _refusal(dense, index, f"its {own.kind} are not those of the first layer")
            if not isinstance(layer.get_submodule(own.consumer.rpartition(".")[0]), nn.Linear):
                raise _refusal(dense, index, f"{own.consumer} does not belong to a linear layer")
    for name, values in dense.config.get_text_config(decoder=True).to_dict().items():
        # Attention types, layers without positions: what a group computes depends on the layer it is in.
        if isinstance(values, list) and len(values) == len(dense.layers) and any(v != values[0] for v in values):
            index = next(index for index, value in enumerate(values) if value != values[0])
            raise _refusal(dense, index, f"{name} in the config is not the same for all layers")
    try:
        residual = find_residual(dense, untie=True)  # only the layers are folded: embeddings may stay tied
    except ModelError as error:
        raise _refusal(dense, 0, f"the gains of its norms do not fold into what reads them: {error.what}") from error
    _require_everything_moves(dense, residual, groups)
    return Mergeable(residual, blocks, groups)


def _only(
    dense: CheckpointSource, index: int, structures: Sequence[Structure], part: Part, blocks: Sequence[SubBlocks]
) -> Structure:
    """The heads, or the FFN channels, of a layer that has nothing else in that place."""
    kind, block = _KINDS[part], blocks[index][part]
    if other := [s.kind for s in structures if s.kind not in _KINDS.values()]:
        raise _refusal(dense, index, f"it has {other[0]} of its own")
    own = [structure for structure in structures if structure.kind == kind]
    if len(own) != 1:
        raise _refusal(dense, index, f"it has {len(own)} structures of {kind}, not one")
    if reason := own[0].refusal or block.refusal:
        raise _refusal(dense, index, f"its {kind}: {reason}")
    return own[0]


def _same(one: Structure, other: Structure) -> bool:
    if one is other:
        return True
    alike = (one.consumer, one.groups, one.columns) == (other.consumer, other.groups, other.columns)
    return (
        alike
        and [(s.name, s.dim) for s in one.slices] == [(s.name, s.dim) for s in other.slices]
        and all(torch.equal(mine.index, theirs.index) for mine, theirs in zip(one.slices, other.slices, strict=True))
    )


def _require_everything_moves(dense: CheckpointSource, residual: Residual, groups: dict[Part, Structure]) -> None:
    """Every parameter belongs to the groups, or is a gain that folds, or the bias of a consumer."""
    tensors = dict(dense.layers[0].named_parameters())
    slices = [piece for structure in groups.values() for piece in structure.slices]
    moving = {piece.name for piece in slices if piece.name in tensors}
    moving |= {bias_of(structure.consumer) for structure in groups.values()}
    gains = {name.removeprefix(f"{dense.layer_name(0)}.") for name in residual.offsets}
    if shared := [name for name in tensors if name not in moving | gains]:
        raise _refusal(dense, 0, f"all its groups share {shared[0]}")
    for piece in slices:
        if piece.name not in tensors:
            raise _refusal(dense, 0, f"{piece.name} is not a parameter")
        if piece.index.numel() != tensors[piece.name].shape[piece.dim]:
            raise _refusal(dense, 0, f"some of {piece.name} belongs to no group")


def _refusal(dense: CheckpointSource, index: int, reason: str) -> ModelError:
    return ModelError(
        f"{dense.layer_name(index)} cannot be merged with its neighbour: {reason}",
        expected="layers of the same heads and FFN channels, behind norms whose gains fold into what reads them",
        fix="set structures.depth.replace to linear, or leave it out; `reconstruct` also makes up for removed layers",
    )
