"""Fit layers as a whole once their matrices are solved: at once, or first the attention and then the rest."""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace

import torch

from llmprune.errors import RecipeError
from llmprune.models.decoder import Decoder
from llmprune.models.source import Source
from llmprune.pruning.targets import Targets
from llmprune.recipe.reconstruct import Reconstruct
from llmprune.storage.report import MatchRow
from llmprune.stream.activations import HiddenStates
from llmprune.stream.matching import layer_error, match_layer, trained_parameters
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream
from llmprune.structures.find.subblocks import PARTS, SubBlocks, find_subblocks, without


class Fitting:
    """Fits the layers of one run.

    Args:
        options: as in the recipe.
        targets: what layers are to return, and what they are run on.
        stream: of the run; its hidden states are those of the pruned model.

    Raises:
        RecipeError: attention and MLP are to be fitted in turn, and a layer has no such parts.
    """

    def __init__(self, options: Reconstruct, targets: Targets, stream: Stream) -> None:
        self._options, self._targets = options, targets
        self._blocks = find_parts(stream.source, options)
        self._between: HiddenStates | None = None

    def parts(self, index: int) -> SubBlocks | None:
        """The attention and the MLP of a layer, if they are fitted in turn."""
        return None if self._blocks is None else self._blocks[index]

    def prepare(self, layer: ResidentLayer, removed: Sequence[int] = ()) -> tuple[HiddenStates, HiddenStates] | None:
        """Run a layer that is dense yet, and the removed layers that it is to stand for.

        Args:
            layer: resident.
            removed: the layers directly after it that are removed.

        Returns:
            What to run the pruned layer on, and what it should return.
        """
        if self._blocks is not None:
            with self._without_mlp(layer):
                self._between = self._targets.between(layer)
        return self._targets.prepare(layer, removed)

    def match(
        self,
        layer: ResidentLayer,
        states: tuple[HiddenStates, HiddenStates],
        names: Collection[str],
        tell: Callable[[str], None],
    ) -> list[MatchRow]:
        """Fit a layer that has been solved.

        Args:
            layer: resident, pruned.
            states: as `prepare` returned them.
            names: its matrices that may be trained.
            tell: told about each epoch.

        Returns:
            A row for each part; none leaves the layer as a whole worse than it was, or both are undone.
        """
        if self._blocks is None:
            return [self._match(layer, states, names, tell)]
        modules = attention_names(self._blocks[layer.index])
        assert self._between is not None, "targets are prepared before a layer is pruned"
        halfway, self._between = (states[0], self._between), None
        solved = {
            parameter: parameter.detach().clone()
            for _, parameter in trained_parameters(layer, names, self._options.train)
        }
        start, before = time.perf_counter(), layer_error(layer, *states)
        measuring = time.perf_counter() - start
        with self._without_mlp(layer):
            first = self._match(layer, halfway, names, tell, lambda name: name.startswith(modules))
        rest = self._match(layer, states, names, tell, lambda name: not name.startswith(modules))
        rest = replace(rest, before=before, seconds=rest.seconds + measuring)
        if rest.after > before:
            # A better attention can be worse together with the MLP that it was fitted without.
            with torch.no_grad():
                for parameter, values in solved.items():
                    parameter.copy_(values)
            first, rest = (replace(row, after=row.before, best=0) for row in (first, rest))
        return [replace(first, part="attention"), rest]

    def _without_mlp(self, layer: ResidentLayer) -> AbstractContextManager[None]:
        assert self._blocks is not None, "only where parts are fitted in turn"
        return without(layer.module, layer.index, [self._blocks[layer.index]["mlp"]])

    def _match(
        self,
        layer: ResidentLayer,
        states: tuple[HiddenStates, HiddenStates],
        names: Collection[str],
        tell: Callable[[str], None],
        among: Callable[[str], bool] = lambda name: True,
    ) -> MatchRow:
        start = time.perf_counter()
        zeros = {name: layer.count_zeros(name) for name in names}
        matched = match_layer(layer, *states, names, self._options.matching, tell, among)
        changed = [name for name in names if layer.count_zeros(name) < zeros[name]]
        assert not changed, f"block matching revived zeros of {changed}"
        return MatchRow(layer.name, self._options.target, seconds=time.perf_counter() - start, **asdict(matched))


def repeated_share(layer: ResidentLayer, parts: SubBlocks | None) -> float:
    """How much of a pass through a layer is one through its attention alone; 0 if it is fitted in one go."""
    if parts is None:
        return 0.0
    sizes = [(matrix.parameter, matrix.shape[0] * matrix.shape[1]) for matrix in layer.matrices.values()]
    attention = sum(size for name, size in sizes if name.startswith(attention_names(parts)))
    return attention / max(sum(size for _, size in sizes), 1)


def attention_names(parts: SubBlocks) -> tuple[str, ...]:
    """How the names of the parameters in a layer's attention begin."""
    return tuple(f"{name}." for name in parts["attention"].modules)


def find_parts(source: Source, options: Reconstruct | None) -> list[SubBlocks] | None:
    """The attention and the MLP of each layer, if they are to be fitted in turn; no weights are read.

    Raises:
        RecipeError: a layer has none, or it cannot run without its MLP.
    """
    if options is None or options.window == "layer":
        return None
    found = find_subblocks(Decoder(source.model, source.layers_path, source.layers))
    for index, blocks in enumerate(found):
        for part in PARTS:
            refusal = blocks[part].refusal
            if refusal is not None:
                raise RecipeError(
                    f"reconstruct.window is attention+mlp, and layer {index} has no {part} by itself: {refusal}",
                    expected="layers that add the output of an attention, then that of an MLP, to their hidden states",
                    fix="set reconstruct.window to layer",
                )
    return found
