"""Several variants of a model in one pass: hidden states of their own, carried through the same resident layers.

A variant differs from the streamed model in some layer, and from there on in its hidden states alone. So each decoder
layer is loaded once, whatever the number of variants, and each of them costs one forward of every layer that follows.
"""

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch.nn.functional as F
from torch import Tensor

from llmprune.errors import ModelError
from llmprune.stream.activations import HiddenStates
from llmprune.stream.stream import ResidentLayer, Stream

# Bytes of logits that exist at once while variants are compared.
_LOGIT_BYTES = 1 << 30
# Positions whose logits are widened to float32 at once.
_POSITIONS = 512

Name = TypeVar("Name", bound=Hashable)


class Separation:
    """Refuses layers that hand one another anything but hidden states.

    What the model hands to its layers beside them (masks, rotary embeddings) is the same for every variant as long as
    no layer computes it: it is known before any layer has run, and is made of the same tensors when a layer's turn
    comes. Keys and values that one layer shares with another are not; they would be those of one variant only, and a
    gradient would miss the path through them.

    Args:
        fix: what to do about a model that is refused.
    """

    def __init__(self, fix: str) -> None:
        self._fix = fix
        self._before: list[list[Tensor]] = []

    def check(self, layer: ResidentLayer) -> None:
        """Look at what a layer is handed; called for each layer in order, the first one before it has run.

        Raises:
            ModelError: the layer reads what a layer before it has computed, other than hidden states.
        """
        stream = layer.stream
        if not self._before:
            self._before = [_handed(stream, index) for index in range(len(stream.source.layers))]
        before, now = self._before[layer.index], _handed(stream, layer.index)
        if len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True)):
            raise ModelError(
                f"{layer.name} reads more than hidden states of the layers before it",
                expected="layers that hand one another hidden states only",
                fix=self._fix,
            )


class Variants(Generic[Name]):
    """Hidden states of variants of the model that streams.

        variants = Variants(stream, fix)
        for layer in stream:
            variants.advance(layer)
            with changed(layer):
                variants.begin("without", layer)
        variants.divergences(stream.hidden, last_position=False)["without"]

    Args:
        stream: the one whose layers become resident; its activation budget holds for each variant anew.
        fix: what to do about a model whose layers hand one another more than hidden states.
    """

    def __init__(self, stream: Stream, fix: str) -> None:
        self._stream, self._separation = stream, Separation(fix)
        self._states: dict[Name, HiddenStates] = {}

    def advance(self, layer: ResidentLayer) -> None:
        """Carry all variants through a layer as it is now.

        Raises:
            ModelError: the layer reads more than hidden states of the layers before it.
            NumericsError: an output is not finite; names the layer.
        """
        self._separation.check(layer)
        for states in self._states.values():
            layer.advance(states)

    def begin(self, name: Name, layer: ResidentLayer, skipped: bool = False) -> None:
        """Start a variant that has this layer as it is now, and all layers before it as the stream had them.

        Args:
            name: of the variant.
            layer: the stream's own hidden states are still its inputs.
            skipped: the variant does without the layer.

        Raises:
            NumericsError: an output is not finite; names the layer.
        """
        self._states[name] = self._stream.hidden.copy()
        if not skipped:
            layer.advance(self._states[name])

    def divergences(self, dense: HiddenStates, *, last_position: bool) -> dict[Name, float]:
        """Compare the predictions of all variants, which have passed all layers, with those of the dense model.

        Args:
            dense: its final hidden states.
            last_position: whether the prediction after a sample's last token counts. No token of the sample says
                whether it is right, so perplexity leaves it out; two distributions can be compared there all the same.

        Returns:
            Variant -> mean over positions of KL(dense || variant), in nats; NaN or infinite where the logits are.
        """
        names = list(self._states)
        totals = dict.fromkeys(names, 0.0)
        together = self._together()
        for start in range(0, len(names), together):
            some = names[start : start + together]
            for logits in self._stream.logits(dense, *(self._states[name] for name in some)):
                for name, more in zip(some, _sums(logits, last_position), strict=True):
                    totals[name] += more
        positions = sum(ids[:, 0 if last_position else 1 :].numel() for ids in self._stream.batches)
        return {name: total / positions for name, total in totals.items()}

    def _together(self) -> int:
        """How many variants have logits in memory at once, beside the dense model's."""
        vocabulary = self._stream.source.model.config.get_text_config(decoder=True).vocab_size
        return max(_LOGIT_BYTES // (4 * self._stream.batches[0].numel() * vocabulary) - 1, 1)


def kl_divergence(dense: Tensor, other: Tensor) -> float:
    """Sum over positions of KL(dense || other), in nats.

    Args:
        dense: log-probabilities [positions, vocabulary], float32 or wider.
        other: alike.
    """
    return float(F.kl_div(other, dense, reduction="sum", log_target=True))


def _sums(logits: tuple[Tensor, ...], last_position: bool) -> list[float]:
    """KL(first || other) for each of the others, summed over positions of [samples, length, vocabulary]."""
    stop = None if last_position else -1
    first, *others = (part[:, :stop].reshape(-1, part.shape[-1]).split(_POSITIONS) for part in logits)
    sums = [0.0] * len(others)
    for place, part in enumerate(first):
        before = part.float().log_softmax(-1)
        for which, other in enumerate(others):
            sums[which] += kl_divergence(before, other[place].float().log_softmax(-1))
    return sums


def _handed(stream: Stream, index: int) -> list[Tensor]:
    """The tensors that a layer is handed in the first batch beside the hidden states."""
    return list(nested_tensors(stream.calls.get(index, 0)))


def nested_tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers, in order.

    Layers may share a mapping that they write to, of a class that `tree_leaves` does not open: what is written shows in
    the next layer's tensors.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from nested_tensors(item)
