"""What the loss of a rotation is computed from: for each layer its folded weights and the inverses of its Grams.

They are collected in one pass over the calibration text, and kept as far as the activation budget allows; the rest is
on disk, and read again in every step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import PatternError
from llmprune.models.decoder import Matrix
from llmprune.patterns import Pattern
from llmprune.progress import Progress, Watcher
from llmprune.rotation.loss import (
    HeadIndex,
    Reader,
    Writer,
    input_scales,
    log_dropped,
    reader_scores,
    writer_scores,
)
from llmprune.statistics import Gram
from llmprune.stream.activations import HiddenStates
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream
from llmprune.structures.residual import Residual
from llmprune.structures.turning import fold_layer, value_columns, value_rows

# As in SparseGPT, a fraction of the mean diagonal.
_DAMPING = 0.01

# Rows of a parameter that reads the stream, columns of one that writes to it, that take part in the loss: R has to suit
# all matrices at once, and many times as many numbers as it has are left. Whole strips, so that groups of N:M and
# blocks stay together.
MOST_LINES, _STRIP = 1024, 128

# Full name of a matrix -> which zeros it will get, with their scope of comparison; None: it stays dense.
PatternOf = Callable[[str], Pattern | None]


def fitting(patterns: PatternOf, matrix: Matrix) -> Pattern | None:
    """The pattern of a matrix; None if it stays dense, or if it fits only once structures have been removed."""
    pattern = patterns(matrix.name)
    if pattern is None:
        return None
    try:
        pattern.check(matrix.shape)
    except PatternError:
        return None
    return pattern


def sampled(pattern: Pattern, shape: Sequence[int], dim: int, matrices: int = 1) -> Tensor | None:
    """Which rows or columns take part in the loss, evenly spread; None: all of them.

    Args:
        pattern: of the matrix.
        shape: of one matrix [out, in].
        dim: 0 for rows, 1 for columns.
        matrices: how many share the number of lines.
    """
    strips, wanted = shape[dim] // _STRIP, max(MOST_LINES // matrices // _STRIP, 1)
    if strips <= wanted:
        return None
    chosen = torch.linspace(0, strips - 1, wanted).round().long()
    lines = (chosen[:, None] * _STRIP + torch.arange(_STRIP)).flatten()
    try:
        pattern.check((len(lines), shape[1]) if dim == 0 else (shape[0], len(lines)))
    except PatternError:
        return None
    return lines


@dataclass(frozen=True, slots=True)
class _Kept:
    """The numbers of a term's tensors on the shelf."""

    kind: type[Reader] | type[Writer]
    weight: int
    scale: int
    values: HeadIndex | None
    pattern: Pattern


class Terms:
    """The terms of every layer's loss.

    Args:
        residual: of the model.
        stream: over the calibration text, not started, of layers in float32.
        patterns: of the matrices; experts that are stored in one parameter have that of the first.
        watch: told about each layer.

    Attributes:
        nbytes: of all tensors.
    """

    def __init__(self, residual: Residual, stream: Stream, patterns: PatternOf, watch: Watcher) -> None:
        self._residual, self._device, self._patterns = residual, stream.settings.device, patterns
        # The same budget as for hidden states: those are gone when the search begins.
        self._shelf = HiddenStates(stream.settings.activation_budget)
        self._layers: list[list[_Kept]] = []
        self.nbytes = 0
        for layer in stream:
            watch(Progress("statistics", layer.index, len(stream.source.layers)))
            fold_layer(residual, layer.module, layer.name)
            self._layers.append(self._collect(layer))
        watch(Progress("statistics", len(self._layers), len(self._layers)))

    def loss(self, layer: int, rotation: Tensor, heads: Tensor | None) -> Tensor:
        """The layer's part of the mean, over all matrices, of the logarithm of what pruning takes.

        Args:
            layer: its index.
            rotation: R, float32, on the device.
            heads: R2 of its KV heads; None: they are not rotated.
        """
        # Zero for a layer that stays dense; it has a gradient all the same.
        total = 0 * rotation.sum()
        scales: dict[int, Tensor] = {}
        for kept in self._layers[layer]:
            weight = self._shelf[kept.weight].to(self._device)
            if kept.kind is Reader:
                if kept.scale not in scales:
                    scales[kept.scale] = input_scales(self._shelf[kept.scale].to(self._device), rotation)
                scores = reader_scores(Reader(weight, kept.values), scales[kept.scale], rotation, heads)
            else:
                scale = self._shelf[kept.scale].to(self._device)
                scores = writer_scores(Writer(weight, scale, kept.values), rotation, heads)
            total = total + log_dropped(scores, kept.pattern)
        return total / sum(map(len, self._layers))

    def _collect(self, layer: ResidentLayer) -> list[_Kept]:
        norms = {gain: name for gain, name in self._residual.norms.items() if gain.startswith(f"{layer.name}.")}
        writers = {name: matrix for name, matrix in layer.matrices.items() if self._writes(layer, matrix)}
        with ExitStack() as stack:
            seen: dict[str, Gram] = {}
            for gain, name in norms.items():
                module = layer.module.get_submodule(name.removeprefix(f"{layer.name}."))
                stack.callback(module.register_forward_hook(_summing(seen, gain)).remove)
            groups = layer.observe(dict.fromkeys(writers, Gram))
        statistics = {name: group.statistics for group in groups for name in group.names}
        inverses = {name: _inverse(gram) for name, gram in statistics.items() if isinstance(gram, Gram)}
        return [*self._readers(layer, seen), *self._writers(layer, writers, inverses)]

    def _readers(self, layer: ResidentLayer, seen: Mapping[str, Gram]) -> Iterator[_Kept]:
        # Experts share the statistics of all tokens: those of their own would take a Gram matrix each.
        patterns = self._pruned(layer)
        scales = {gain: self._keep(_inverse(gram)) for gain, gram in seen.items()}
        values = self._residual.values.get(layer.index)
        for name, fold in self._residual.folds.items():
            inside = name.removeprefix(f"{layer.name}.")
            if inside in patterns and fold.gain in scales:
                weight = layer.module.get_parameter(inside).detach().movedim(fold.dim, -1)
                weight = weight.reshape(-1, weight.shape[-1])
                own = value_rows(values) if values is not None and values.producer == inside else None
                lines = sampled(patterns[inside], weight.shape, 0) if own is None else None
                number = self._keep(weight if lines is None else weight[lines.to(weight.device)])
                yield _Kept(Reader, number, scales[fold.gain], own, patterns[inside])

    def _writers(
        self, layer: ResidentLayer, writers: Mapping[str, Matrix], inverses: Mapping[str, Tensor]
    ) -> Iterator[_Kept]:
        values = self._residual.values.get(layer.index)
        patterns = self._pruned(layer)
        parameters: dict[str, list[str]] = {}
        for name, matrix in writers.items():
            parameters.setdefault(matrix.parameter, []).append(name)
        for parameter, names in parameters.items():
            weight = torch.stack([layer.weight(name) for name in names])
            rotated = values is not None and values.consumer == parameter and len(names) == 1
            if values is not None and rotated:
                index = value_columns(values)
                places = index.index.to(weight.device)
                scale = inverses[names[0]][places[..., :, None], places[..., None, :]]
            else:
                index = None
                scale = torch.stack([inverses[name].diagonal() for name in names])
                lines = sampled(patterns[parameter], weight.shape[1:], 1, len(names))
                if lines is not None:
                    weight, scale = (part[..., lines.to(part.device)] for part in (weight, scale))
            yield _Kept(Writer, self._keep(weight), self._keep(scale), index, patterns[parameter])

    def _pruned(self, layer: ResidentLayer) -> dict[str, Pattern]:
        """Parameter, named inside the layer -> the pattern of the first of its matrices that is pruned."""
        found: dict[str, Pattern] = {}
        for matrix in layer.matrices.values():
            pattern = fitting(self._patterns, matrix)
            if pattern is not None:
                found.setdefault(matrix.parameter, pattern)
        return found

    def _writes(self, layer: ResidentLayer, matrix: Matrix) -> bool:
        """Whether a matrix writes to the residual stream and does not read it, too, and is pruned."""
        parameter = f"{layer.name}.{matrix.parameter}"
        ends = parameter in self._residual.places and parameter not in self._residual.folds
        return ends and fitting(self._patterns, matrix) is not None

    def _keep(self, tensor: Tensor) -> int:
        number = len(self._shelf)
        self._shelf[number] = tensor.float().clone()
        self.nbytes += 4 * tensor.numel()
        return number


def _summing(seen: dict[str, Gram], gain: str) -> Any:
    """A hook that adds a norm's output to its Gram matrix."""

    def hook(module: nn.Module, args: Sequence[Any], output: Tensor) -> None:
        rows = output.detach().reshape(-1, output.shape[-1])
        seen.setdefault(gain, Gram.empty(rows.shape[1], rows.device)).update(rows)

    return hook


def _inverse(gram: Gram) -> Tensor:
    """The inverse of the damped Gram matrix; the identity if there were no tokens."""
    upper = gram.factor(_DAMPING).upper
    root = torch.linalg.solve_triangular(upper, torch.eye(len(upper), device=upper.device), upper=True)
    return root.mT @ root
