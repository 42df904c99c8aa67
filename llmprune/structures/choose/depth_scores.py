"""Depth pruning: which decoder layers, or attention and MLP sub-blocks of layers, the model needs least.

Three measures, all from calibration tokens:

* block influence, 1 - cos(x, y) between a layer's inputs and outputs (ShortGPT, arXiv:2403.03853); for one sub-block,
  between the layer's outputs without and with it;
* the angle between the hidden states before and after a run of layers (Gromov et al., arXiv:2403.17887);
* the KL divergence of the whole model's predictions (`greedy.py`).

The first two are surveys that share one pass over the dense model: `see(layer)` for each layer, then `finish(stream)`.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from llmprune.errors import ModelError, NumericsError, RecipeError
from llmprune.stream.activations import HiddenStates
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream
from llmprune.structures.find.subblocks import Part, SubBlocks, without

Method = Literal["block-influence", "angular-distance", "greedy-kl"]


class DepthUnit(NamedTuple):
    """What depth pruning can remove: a whole decoder layer, or one sub-block of it. In JSON, [3, "attention"]."""

    layer: int
    part: Literal["layer"] | Part


@dataclass(frozen=True, slots=True)
class DepthRemoval:
    """Which layers and sub-blocks are removed, and why.

    Attributes:
        method: how they were chosen.
        removed: ascending.
        scores: block influence in [0, 2]; angle in [0, 1] of the run that begins with a layer; for "greedy-kl" the KL
            divergence, in nats per token, at the last step in which the candidate was measured.
        steps: for "greedy-kl", in order of removal: what was removed, and the KL divergence of each candidate.
    """

    method: Method
    removed: tuple[DepthUnit, ...]
    scores: Mapping[DepthUnit, float]
    steps: tuple[tuple[DepthUnit, Mapping[DepthUnit, float]], ...] = ()

    @property
    def layers(self) -> list[int]:
        """The whole layers that are removed, ascending."""
        return [layer for layer, part in self.removed if part == "layer"]

    @property
    def blocks(self) -> dict[int, list[Part]]:
        """Layer -> the sub-blocks removed from a layer that is kept."""
        result: dict[int, list[Part]] = {}
        for layer, part in self.removed:
            if part != "layer":
                result.setdefault(layer, []).append(part)
        return result

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON: a score is [layer, part, number], with null for a non-finite number."""
        return {
            "method": self.method,
            "removed": [list(candidate) for candidate in self.removed],
            "scores": _rows(self.scores),
            "steps": [{"removed": list(candidate), "kl": _rows(values)} for candidate, values in self.steps],
        }


def layer_candidates(layers: int, protect: int = 0, *, first: bool = False) -> list[DepthUnit]:
    """All decoder layers except the last `protect`, and except the first if that is kept."""
    return [DepthUnit(layer, "layer") for layer in range(int(first), layers - protect)]


def block_candidates(blocks: Sequence[SubBlocks], parts: Iterable[Part], protect: int = 0) -> list[DepthUnit]:
    """The removable sub-blocks of these kinds, in all decoder layers except the last `protect`."""
    return [
        DepthUnit(layer, part)
        for layer in range(len(blocks) - protect)
        for part in parts
        if blocks[layer][part].refusal is None
    ]


def remove_lowest(scores: Mapping[DepthUnit, float], candidates: Sequence[DepthUnit], count: int) -> DepthRemoval:
    """Choose the candidates with the lowest influence; on ties, the earlier layer is removed.

    Args:
        scores: of all layers, or of all sub-blocks: a `BlockInfluence.result` or `LayerDistance.influence`.
        candidates: what may be removed.
        count: how many to remove.

    Raises:
        RecipeError: that many cannot be removed.
        NumericsError: a score is not finite.
    """
    check_count(count, len(candidates), len(scores))
    _check_finite(scores)
    ranked = sorted(candidates, key=lambda candidate: (scores[candidate], candidate))
    return DepthRemoval("block-influence", tuple(sorted(ranked[:count])), dict(scores))


def remove_run(angles: Sequence[float], count: int, protect: int = 0, *, first: bool = False) -> DepthRemoval:
    """Choose the run of consecutive layers that rotates the hidden states least; on ties, the earlier run.

    Args:
        angles: for each layer, the angle of the run of `count` layers that begins there.
        count: number of layers in a run.
        protect: how many of the last layers to keep.
        first: whether to keep the first layer.

    Raises:
        RecipeError: no run fits.
        NumericsError: an angle is not finite.
    """
    layers = len(angles) + count - 1
    check_count(count, layers - protect - first, layers)
    scores = {DepthUnit(layer, "layer"): angle for layer, angle in enumerate(angles)}
    _check_finite(scores)
    start = min(range(int(first), len(angles) - protect), key=lambda layer: (angles[layer], layer))
    removed = tuple(DepthUnit(layer, "layer") for layer in range(start, start + count))
    return DepthRemoval("angular-distance", removed, scores)


class LayerDistance:
    """How far each run of layers rotates the hidden states of a dense model.

    Keeps the same tokens of the last few layers, [rows, hidden] in the model's dtype on the CPU.

    Args:
        span: number of layers in a run; 1 for block influence.
        rows: number of tokens compared.

    Attributes:
        influence: layer -> mean over tokens of 1 - cos, for the run that begins there.
        angles: for each layer, mean over tokens of arccos(cos) / pi, in [0, 1], for the run that begins there.
    """

    def __init__(self, span: int = 1, rows: int = 1024) -> None:
        self._sample = _Sample(rows)
        self._recent: deque[Tensor] = deque(maxlen=span + 1)
        self.influence: dict[DepthUnit, float] = {}
        self.angles: list[float] = []

    def see(self, layer: ResidentLayer) -> None:
        """Record the inputs of the next layer."""
        self._add(layer.stream)

    def finish(self, stream: Stream) -> None:
        """Record the outputs of the last layer, which a stream with `outputs` has at its end."""
        assert stream.settings.outputs, "the last layer's outputs are needed"
        self._add(stream)

    def _add(self, stream: Stream) -> None:
        self._recent.append(self._sample.take(stream, stream.hidden))
        if len(self._recent) == self._recent.maxlen:
            cosines = _cosines(self._recent[0], self._recent[-1])
            self.influence[DepthUnit(len(self.angles), "layer")] = float((1 - cosines).mean())
            self.angles.append(float(cosines.arccos().mean()) / math.pi)


class BlockInfluence:
    """How far the outputs of each layer of a dense model rotate when its attention or its MLP is removed.

    For an MLP that follows attention this is 1 - cos(x, x + MLP(x)), as in block influence; for attention it includes
    the effect on the MLP. It costs an extra forward of each layer per sub-block.

    Args:
        blocks: sub-blocks of each layer; those that are refused get no score.
        rows: number of tokens compared.
        parts: which sub-blocks.
    """

    def __init__(
        self, blocks: Sequence[SubBlocks], rows: int = 1024, parts: Sequence[Part] = ("attention", "mlp")
    ) -> None:
        self._sample = _Sample(rows)
        self._blocks, self._parts = blocks, parts
        self._waiting: dict[DepthUnit, Tensor] = {}
        self._scores: dict[DepthUnit, float] = {}

    def see(self, layer: ResidentLayer) -> None:
        """Run the next layer without each of its sub-blocks."""
        self._compare(layer.stream)
        for part in self._parts:
            block = self._blocks[layer.index][part]
            if block.refusal is None:
                with without(layer.module, layer.index, [block]):
                    self._waiting[DepthUnit(layer.index, part)] = self._sample.run(layer)

    def finish(self, stream: Stream) -> None:
        """Record the outputs of the last layer, which a stream with `outputs` has at its end."""
        assert stream.settings.outputs, "the last layer's outputs are needed"
        self._compare(stream)

    def result(self) -> dict[DepthUnit, float]:
        """Sub-block -> mean over tokens of 1 - cos between the layer's outputs without and with it."""
        return dict(self._scores)

    def _compare(self, stream: Stream) -> None:
        if self._waiting:
            outputs = self._sample.take(stream, stream.hidden)
            for candidate, rows in self._waiting.items():
                self._scores[candidate] = float((1 - _cosines(rows, outputs)).mean())
            self._waiting.clear()


class _Sample:
    """The same tokens of hidden states at every layer, drawn uniformly from the statistics batches."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._chosen: list[Tensor] = []

    def take(self, stream: Stream, states: HiddenStates) -> Tensor:
        """The sampled rows [rows, hidden] of a set of hidden states."""
        return torch.cat([self._pick(states[batch], mask) for batch, mask in enumerate(self._masks(stream))])

    def run(self, layer: ResidentLayer) -> Tensor:
        """The sampled rows of a layer's outputs, computed with the layer as it currently is."""
        stream, rows = layer.stream, []
        with torch.no_grad(), stream.stages("forward"):
            for batch, mask in enumerate(self._masks(stream)):
                if bool(mask.any()):
                    output = layer.forward(stream.hidden[batch], batch)
                    rows.append(self._pick(tree_leaves(output)[0].cpu(), mask))
        return torch.cat(rows)

    def _masks(self, stream: Stream) -> list[Tensor]:
        """For each batch, the mask [samples, length] of its sampled tokens."""
        if not self._chosen:
            shapes = [ids.shape for ids in stream.batches[: stream.statistics_batches]]
            counts = [shape.numel() for shape in shapes]
            chosen = torch.zeros(sum(counts), dtype=torch.bool)
            random = torch.Generator().manual_seed(0)
            chosen[torch.randperm(len(chosen), generator=random)[: self._rows]] = True
            self._chosen = [part.view(shape) for part, shape in zip(chosen.split(counts), shapes, strict=True)]
        return self._chosen

    @staticmethod
    def _pick(hidden: Tensor, mask: Tensor) -> Tensor:
        if hidden.shape[:2] != mask.shape:
            raise ModelError(
                f"the hidden states have shape {list(hidden.shape)} for {list(mask.shape)} tokens",
                expected="samples and length as the first two dimensions",
                fix="choose the layers yourself",
            )
        return hidden[mask].flatten(1)


def _cosines(before: Tensor, after: Tensor) -> Tensor:
    return F.cosine_similarity(before.double(), after.double(), dim=1).clamp(-1, 1)


def check_count(count: int, candidates: int, everything: int, what: str = "layers or blocks") -> None:
    """Raise `RecipeError` unless that many of the candidates can be removed and something is kept."""
    most = min(candidates, everything - 1)
    if not 1 <= count <= most:
        raise RecipeError(
            f"{count} of {everything} {what} are to be removed ({candidates} removable)",
            expected=f"from 1 to {most}: one is kept" if most else "one that can be removed and one that is kept",
            fix=f"remove {most} or fewer, or protect fewer of the last layers" if most else "leave this removal out",
        )


def _check_finite(scores: Mapping[DepthUnit, float]) -> None:
    if bad := [candidate for candidate, score in scores.items() if not math.isfinite(score)]:
        raise NumericsError(f"the score of {bad[0].part} {bad[0].layer} is {scores[bad[0]]}", expected="finite numbers")


def _rows(scores: Mapping[DepthUnit, float]) -> list[list[Any]]:
    return [[*candidate, score if math.isfinite(score) else None] for candidate, score in scores.items()]
