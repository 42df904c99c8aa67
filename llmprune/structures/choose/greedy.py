"""Remove decoder layers or their blocks greedily: in each step what costs the whole model's predictions least."""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from llmprune.errors import ModelError, NumericsError
from llmprune.models.source import Source
from llmprune.stream.activations import HiddenStates
from llmprune.stream.stream import ResidentLayer, Stream, StreamSettings
from llmprune.structures.choose.depth_scores import Candidate, Removal, check_count
from llmprune.structures.find.subblocks import Blocks, without

# Bytes of logits that exist at once while variants of the model are compared.
_LOGIT_BYTES = 1 << 30
# Positions whose logits are widened to float32 at once.
_POSITIONS = 512


def remove_greedily(
    source: Source,
    ids: Tensor,
    settings: StreamSettings,
    candidates: Sequence[Candidate],
    count: int,
    blocks: Sequence[Blocks] = (),
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Removal:
    """Remove one candidate after the other, each time the one without which the predictions diverge least.

    Each step is one pass over the layers with a variant of the hidden states for each candidate: about half as many
    forwards of a layer as layers times candidates. At the end KL(dense || variant) of the next-token predictions is
    measured.

    Args:
        source: the dense model.
        ids: tokens [samples, length]; a few samples suffice.
        settings: device, batches, and the bytes of CPU memory for the hidden states of all variants together.
        candidates: what may go.
        count: how many go; of a layer's block and the layer itself only the layer counts in the end.
        blocks: of each layer, if candidates are blocks.
        watch: told how many layers of how many have been passed.

    Raises:
        RecipeError: so many cannot go.
        ModelError: layers hand one another more than hidden states, which belongs to one variant only.
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
        search.step(lambda passed: watch(passed, count * layers))
    return search.result()


class _Greedy:
    """Greedy removal, step by step."""

    def __init__(self, start: Callable[[], Stream], candidates: Sequence[Candidate], blocks: Sequence[Blocks]) -> None:
        self._start, self._blocks = start, blocks
        self._open = list(candidates)
        self._gone: list[Candidate] = []
        self._steps: list[tuple[Candidate, Mapping[Candidate, float]]] = []
        self._dense: HiddenStates | None = None
        self._passed = 0

    def step(self, watch: Callable[[int], None]) -> None:
        """Measure what each candidate costs on top of what has gone; the cheapest goes."""
        stream = self._start()
        alone = _Alone()
        variants: dict[Candidate, HiddenStates] = {}
        for layer in stream:
            alone.check(layer)
            self._visit(layer, variants)
            self._passed += 1
            watch(self._passed)
        if self._dense is None:
            self._dense = stream.hidden  # nothing has gone yet
        divergences = _divergences(stream, self._dense, variants)
        best = min(divergences, key=lambda candidate: (divergences[candidate], candidate))
        self._gone.append(best)
        self._steps.append((best, divergences))
        # A layer that goes takes its blocks along.
        self._open = [c for c in self._open if c != best and (c.layer != best.layer or best.part != "layer")]

    def result(self) -> Removal:
        whole = {candidate.layer for candidate in self._gone if candidate.part == "layer"}
        removed = sorted(c for c in self._gone if c.part == "layer" or c.layer not in whole)
        scores = {candidate: value for _, values in self._steps for candidate, value in values.items()}
        return Removal("greedy-kl", tuple(removed), dict(sorted(scores.items())), tuple(self._steps))

    def _visit(self, layer: ResidentLayer, variants: dict[Candidate, HiddenStates]) -> None:
        """Take all variants past a layer, and begin those of its own candidates."""
        gone = {part for number, part in self._gone if number == layer.index}
        layer.skipped = True  # its outputs are computed here
        for states in variants.values():
            self._advance(layer, states, gone)
        for candidate in self._open:
            if candidate.layer == layer.index:
                variants[candidate] = layer.stream.hidden.copy()
                self._advance(layer, variants[candidate], gone | {candidate.part})
        self._advance(layer, layer.stream.hidden, gone)

    def _advance(self, layer: ResidentLayer, states: HiddenStates, gone: set[Any]) -> None:
        if "layer" not in gone:
            with without(layer.module, layer.index, [self._blocks[layer.index][part] for part in sorted(gone)]):
                layer.advance(states)


class _Alone:
    """Makes sure that layers hand nothing to one another but the hidden states.

    Whatever else the model hands to a layer is known before any layer has run, and must be the same objects afterwards.
    """

    def __init__(self) -> None:
        self._known: list[list[Tensor]] = []

    def check(self, layer: ResidentLayer) -> None:
        calls, layers = layer.stream.calls, len(layer.stream.source.layers)
        if not self._known:
            self._known = [list(_tensors(calls.get(index, 0))) for index in range(layers)]
        now = list(_tensors(calls.get(layer.index, 0)))
        known = self._known[layer.index]
        if len(now) != len(known) or any(one is not other for one, other in zip(now, known, strict=True)):
            raise ModelError(
                f"{layer.name} reads more than hidden states of the layers before it",
                expected="layers that hand one another hidden states only: anything else is that of one variant",
                fix="choose by block influence or angular distance",
            )


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors inside tuples, lists and mappings of any class, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, MutableMapping | list | tuple):
        for item in value.values() if isinstance(value, MutableMapping) else value:
            yield from _tensors(item)


def _divergences(
    stream: Stream, dense: HiddenStates, variants: Mapping[Candidate, HiddenStates]
) -> dict[Candidate, float]:
    """Mean over predicted tokens of KL(dense || variant), in nats."""
    vocabulary = stream.source.model.config.get_text_config(decoder=True).vocab_size
    together = max(_LOGIT_BYTES // (4 * stream.batches[0].numel() * vocabulary) - 1, 1)
    predicted = sum(ids[:, 1:].numel() for ids in stream.batches)
    names, result = list(variants), dict[Candidate, float]()
    for start in range(0, len(names), together):
        some = names[start : start + together]
        totals = dict.fromkeys(some, 0.0)
        for first, *others in stream.logits(dense, *(variants[name] for name in some)):
            for name, logits in zip(some, others, strict=True):
                totals[name] += _divergence(first, logits)
        result |= {name: total / predicted for name, total in totals.items()}
    for name, value in result.items():
        if math.isnan(value):
            raise NumericsError(f"without {name.part} {name.layer}, the predictions diverge by {value}")
    return result


def _divergence(dense: Tensor, other: Tensor) -> float:
    """Sum over predicted tokens of KL(dense || other), from logits [samples, length, vocabulary]."""
    flat = [logits[:, :-1].reshape(-1, logits.shape[-1]) for logits in (dense, other)]
    total = 0.0
    for parts in zip(*(logits.split(_POSITIONS) for logits in flat), strict=True):
        before, after = (part.float().log_softmax(-1) for part in parts)
        total += float(F.kl_div(after, before, reduction="sum", log_target=True))
    return total
