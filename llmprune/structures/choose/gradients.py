"""Score the groups of structures by gradients of the dense model's loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from llmprune.models.source import Source
from llmprune.stream.backward import BackwardStream, LayerGradients
from llmprune.stream.stream import StreamSettings
from llmprune.structures.choose.channels import channels_of, matrix_parameters
from llmprune.structures.choose.scores import NEEDS, SCORES
from llmprune.structures.find.discovery import Structure
from llmprune.structures.remove.fused import experts_of
from llmprune.timing import Stages

GradientMethod = Literal["taylor", "fisher"]
# One dict for each structure of a layer, in order: score -> [groups].
LayerScores = list[dict[str, Tensor]]


def gradient_scores(
    source: Source,
    ids: Tensor,
    settings: StreamSettings | None,
    structures: Mapping[int, Sequence[Structure]],
    methods: Sequence[GradientMethod],
    stages: Stages | None = None,
    watch: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[int, LayerScores]:
    """Score the groups of structures of the dense model by gradients of its loss.

    Args:
        source: of the layers.
        ids: tokens [samples, length].
        settings: as for `BackwardStream`.
        structures: layer -> structures that are not refused.
        methods: the scores.
        stages: stopwatch.
        watch: as for `BackwardStream`.

    Returns:
        Layer -> for each of its structures, in order, method -> float64 [groups]; for channels of fused experts, which
        each expert chooses independently, [experts, groups]. On the CPU.

    Raises:
        ModelError: layers pass more than hidden states to one another, or experts share some of their channels.
        NumericsError: an activation or a gradient is NaN or infinite.
    """
    names = {
        layer: sorted({name for structure in own for name in matrix_parameters(source.layers[layer], structure)})
        for layer, own in structures.items()
    }
    return {
        layer.index: [{method: _score(layer, structure, method) for method in methods} for structure in own]
        for layer in BackwardStream(source, ids, settings, names, stages, watch)
        if (own := structures[layer.index])
    }


def _score(layer: LayerGradients, structure: Structure, method: GradientMethod) -> Tensor:
    def of(expert: int | None) -> Tensor:
        known = channels_of(layer.module, structure, NEEDS[method], gradients=layer.gradients, expert=expert)
        return SCORES[method](known).cpu()

    experts = experts_of(layer.module, structure)
    return of(None) if experts == 1 else torch.stack([of(expert) for expert in range(experts)])
