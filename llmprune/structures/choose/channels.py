"""Gather what scores read of a structure: weights, statistics and gradients, channels in the order of groups."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import PatternError
from llmprune.models.decoder import Matrix, prunable_matrices
from llmprune.statistics import ChannelGram, ColumnNorm, Gram, Moments
from llmprune.stream.backward import Gradients
from llmprune.structures.choose.scores import Channels
from llmprune.structures.find.discovery import Slice, Structure
from llmprune.structures.remove.fused import by_expert


def channels_of(
    layer: nn.Module,
    structure: Structure,
    needs: Collection[str],
    *,
    statistics: ColumnNorm | Gram | None = None,
    gradients: Mapping[str, Gradients] | None = None,
    expert: int | None = None,
) -> Channels:
    """Assemble what a score needs to know about a structure, channels in the order of its groups.

        score = SCORES[name](channels_of(layer.module, structure, NEEDS[name], statistics=group.statistics))

    Biases, scales of norms and routers go with their groups but count for no score.

    Args:
        layer: the decoder layer in memory, at full size.
        structure: one of its structures that is not refused.
        needs: the fields of `Channels` to fill (`scores.NEEDS`); the others are left empty.
        statistics: of the consumer's inputs (the group of `observe` that holds it): `ColumnNorm` or `Gram` for squares,
            `Moments` or `ChannelGram` for all. Of a fused consumer: those of the one expert.
        gradients: parameter inside the layer -> its gradients; at least those of `matrix_parameters`.
        expert: of a fused consumer the one whose channels are asked for; None: all experts' weights together.

    Returns:
        Weights and gradients in float32 or wider, copies, each [*, channels]; 3-D parameters have their experts' rows
        one below the other.

    Raises:
        PatternError: the structure is one of experts and has no inputs that channels could be scored by.
    """
    if {"reading", "squares", "sums", "active"} & set(needs) and not structure.columns:
        raise PatternError(
            f"{structure.consumer}: {structure.groups} experts have no activations to be scored by",
            expected="for experts: reap, frequency, or a score of weights or gradients",
        )
    matrices = _matrices(layer)
    parts = [part for part in structure.slices if part.name in matrices]
    parameters = {part.name: layer.get_parameter(part.name).detach() for part in parts}

    def gather(tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [_gathered(part, tensors[part.name], matrices[part.name].experts, expert) for part in parts]

    known = gradients or {}
    reads = next((place for place, part in enumerate(parts) if part.name == structure.consumer), 0)
    weights = gather(parameters) if {"matrices", "reading"} & set(needs) else []
    return Channels(
        groups=structure.groups,
        matrices=weights if "matrices" in needs else (),
        reading=weights[reads] if "reading" in needs else None,
        gradients=gather({name: g.mean for name, g in known.items()}) if "gradients" in needs else (),
        squared_gradients=(
            gather({name: g.mean_square for name, g in known.items()}) if "squared_gradients" in needs else ()
        ),
        **(_sums(statistics) if statistics is not None else {}),
    )


def matrix_parameters(layer: nn.Module, structure: Structure) -> list[str]:
    """The parameters inside the layer whose weights, and whose gradients, the scores of a structure read."""
    matrices = _matrices(layer)
    return list(dict.fromkeys(part.name for part in structure.slices if part.name in matrices))


def _matrices(layer: nn.Module) -> dict[str, Matrix]:
    return {matrix.parameter: matrix for matrix in prunable_matrices(layer, "")}


def _gathered(part: Slice, tensor: Tensor, experts: int, expert: int | None) -> Tensor:
    """[*, groups * k], a copy: the rows or columns of a slice, in the order of groups, as columns."""
    dim, index = part.dim, part.index
    if expert is not None and experts > 1:
        views, dim, index = by_expert(part, tensor, experts)
        tensor, dim = views[expert], dim - 1
    taken = tensor.movedim(dim, -1)[..., index.flatten().to(tensor.device)]
    return taken.reshape(-1, taken.shape[-1]).to(torch.promote_types(taken.dtype, torch.float32))


def _sums(statistics: ColumnNorm | Gram) -> dict[str, Any]:
    moments = statistics.moments if isinstance(statistics, ChannelGram) else statistics
    # An expert that no token reached has sums of zero, and no mean.
    known: dict[str, Any] = {"tokens": max(moments.tokens, 1), "squares": moments.squares}
    if isinstance(moments, Moments):
        known |= {"sums": moments.totals, "active": moments.active}
    return known
