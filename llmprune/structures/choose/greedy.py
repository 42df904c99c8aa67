"""Greedy depth pruning: in each step, remove what changes the whole model's predictions least."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from llmprune.errors import NumericsError
from llmprune.models.source import Source
from llmprune.stream.activations import HiddenStates
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.stream.variants import Variants
from llmprune.structures.choose.depth_scores import DepthRemoval, DepthUnit, check_count
from llmprune.structures.find.subblocks import SubBlocks, without

_FIX = "choose by block influence or angular distance"


def remove_greedily(
    source: Source,
    ids: Tensor,
    settings: StreamSettings,
    candidates: Sequence[DepthUnit],
    count: int,
    blocks: Sequence[SubBlocks] = (),
    watch: Callable[[int, int], None] = lambda done, total: None,
    watch_head: Callable[[int, int], None] = lambda done, total: None,
) -> DepthRemoval:
    """Remove one candidate after another, each time the one without which the predictions diverge least.

    Each step is one pass over the layers with a variant of the hidden states for each candidate: about half as many
    forwards of a layer as layers times candidates. At the end, KL(dense || variant) of the next-token predictions is
    measured.

    Args:
        source: the dense model.
        ids: tokens [samples, length]; a few samples suffice.
        settings: device, batches, and the CPU memory in bytes for the hidden states of all variants together.
        candidates: what may be removed.
        count: how many to remove; if a sub-block and later its layer are chosen, the result only has the layer.
        blocks: sub-blocks of each layer, if there are any among the candidates.
        watch: called with the number of layers done and their total.
        watch_head: called with the number of positions compared after a step's last layer, and their total.

    Raises:
        RecipeError: that many cannot be removed.
        ModelError: layers pass more than hidden states to one another, which would differ between variants.
        NumericsError: a divergence is NaN.
    """
    layers = len(source.layers)
    if any(candidate.part == "layer" for candidate in candidates):
        check_count(count, len({candidate.layer for candidate in candidates}), layers)
    else:
        check_count(count, len(candidates), 2 * layers)
    share = settings.activation_budget // (len(candidates) + 2)
    settings = replace(settings, held_back=0, outputs=True, activation_budget=share)
    search = _Greedy(lambda: Stream(source, ids, settings), candidates, blocks)
    for _ in range(count):
        search.step(lambda passed: watch(passed, count * layers), watch_head)
    return search.result()


class _Greedy:
    """Greedy removal, step by step."""

    def __init__(
        self, start: Callable[[], Stream], candidates: Sequence[DepthUnit], blocks: Sequence[SubBlocks]
    ) -> None:
        self._start, self._blocks = start, blocks
        self._open = list(candidates)
        self._gone: list[DepthUnit] = []
        self._steps: list[tuple[DepthUnit, Mapping[DepthUnit, float]]] = []
        self._dense: HiddenStates | None = None
        self._passed = 0

    def step(self, watch: Callable[[int], None], watch_head: Callable[[int, int], None]) -> None:
        """Measure each candidate on top of what is already removed; remove the one with the lowest KL divergence."""
        stream = self._start()
        stream.tell = lambda words: watch(self._passed)
        variants = Variants[DepthUnit](stream, _FIX)
        for layer in stream:
            self._visit(layer, variants)
            self._passed += 1
            watch(self._passed)
        if self._dense is None:
            self._dense = stream.hidden  # nothing has been removed yet
        # The last position has no next token to predict; perplexity leaves it out too.
        divergences = variants.divergences(self._dense, last_position=False, watch=watch_head)
        _require_numbers(divergences)
        best = min(divergences, key=lambda candidate: (divergences[candidate], candidate))
        self._gone.append(best)
        self._steps.append((best, divergences))
        # Removing a layer removes its sub-blocks too.
        self._open = [c for c in self._open if c != best and (c.layer != best.layer or best.part != "layer")]

    def result(self) -> DepthRemoval:
        whole = {candidate.layer for candidate in self._gone if candidate.part == "layer"}
        removed = sorted(c for c in self._gone if c.part == "layer" or c.layer not in whole)
        scores = {candidate: value for _, values in self._steps for candidate, value in values.items()}
        return DepthRemoval("greedy-kl", tuple(removed), dict(sorted(scores.items())), tuple(self._steps))

    def _visit(self, layer: ResidentLayer, variants: Variants[DepthUnit]) -> None:
        """Advance all variants past a layer, and begin those of its own candidates."""
        layer.skipped = True  # its outputs are computed here
        gone = {part for number, part in self._gone if number == layer.index}
        if "layer" in gone:
            return  # its sub-blocks are no longer candidates
        with self._without(layer, gone):
            variants.advance(layer)
        for candidate in self._open:
            if candidate.layer == layer.index:
                whole = candidate.part == "layer"
                with self._without(layer, gone if whole else gone | {candidate.part}):
                    variants.begin(candidate, layer, skipped=whole)
        with self._without(layer, gone):
            layer.advance()

    def _without(self, layer: ResidentLayer, gone: set[Any]) -> AbstractContextManager[None]:
        return without(layer.module, layer.index, [self._blocks[layer.index][part] for part in sorted(gone)])


def _require_numbers(divergences: Mapping[DepthUnit, float]) -> None:
    for candidate, value in divergences.items():
        if math.isnan(value):
            raise NumericsError(f"without {candidate.part} {candidate.layer}, the predictions diverge by {value}")
