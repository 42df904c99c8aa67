"""Gather the inputs of scores: a structure's weights, statistics and gradients, with channels in group order."""

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
    """Assemble the inputs of a score for one structure, with channels in the order of its groups.

        score = SCORES[name](channels_of(layer.module, structure, NEEDS[name], statistics=group.statistics))

    Biases, gains of norms and routers are removed with their groups but are not scored.

    Args:
        layer: the decoder layer in memory, at full size.
        structure: one of its structures that is not refused.
        needs: the fields of `Channels` to fill (`scores.NEEDS`); the others are left empty.
        statistics: of the consumer's inputs (from the group of `observe` that contains it): `ColumnNorm` or `Gram` for
            squares, `Moments` for all but products, `ChannelGram` for all. For a fused consumer, those of the selected
            expert.
        gradients: parameter inside the layer -> its gradients; at least those of `matrix_parameters`.
        expert: for a fused consumer, the expert whose channels are scored; None: all experts' weights together.

    Returns:
        Copies of weights and gradients in float32 or wider, each [*, channels]; the rows of all experts in a 3-D
        parameter are stacked.

    Raises:
        PatternError: the structure consists of experts, which have no input channels to score.
    """
    if {"reading", "squares", "sums", "active", "products"} & set(needs) and not structure.columns:
        raise PatternError(
            f"{structure.consumer}: {structure.groups} experts cannot be scored by channel activations",
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
    """The parameters inside the layer whose weights and gradients a structure's scores read."""
    matrices = _matrices(layer)
    return list(dict.fromkeys(part.name for part in structure.slices if part.name in matrices))


def _matrices(layer: nn.Module) -> dict[str, Matrix]:
    return {matrix.parameter: matrix for matrix in prunable_matrices(layer, "")}


def _gathered(part: Slice, tensor: Tensor, experts: int, expert: int | None) -> Tensor:
    """[*, groups * k], a copy: the rows or columns of a slice as columns, in group order."""
    dim, index = part.dim, part.index
    if expert is not None and experts > 1:
        views, dim, index = by_expert(part, tensor, experts)
        tensor, dim = views[expert], dim - 1
    taken = tensor.movedim(dim, -1)[..., index.flatten().to(tensor.device)]
    return taken.reshape(-1, taken.shape[-1]).to(torch.promote_types(taken.dtype, torch.float32))


def _sums(statistics: ColumnNorm | Gram) -> dict[str, Any]:
    moments = statistics.moments if isinstance(statistics, ChannelGram) else statistics
    # An expert without tokens has sums of zero, and no mean.
    known: dict[str, Any] = {"tokens": max(moments.tokens, 1), "squares": moments.squares}
    if isinstance(moments, Moments):
        known |= {"sums": moments.totals, "active": moments.active}
    if isinstance(statistics, ChannelGram):
        known["products"] = statistics.products
    return known
