"""Several variants of a model in one pass: each has its own hidden states, carried through the same resident layers.

A variant differs from the streamed model in one layer, and after that only in its hidden states. So each decoder layer
is loaded once, whatever the number of variants, and each variant costs one forward pass of every layer that follows.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.errors import ModelError
from llmprune.stream.activations import HiddenStates
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream
from llmprune.stream.windows import Window, window_positions

# Limit on the bytes of logits in memory while variants are compared, counted as float32.
_LOGIT_BYTES = 1 << 30

Name = TypeVar("Name", bound=Hashable)


class Separation:
    """Refuses layers that pass each other anything but hidden states.

    Whatever else the model passes to its layers (masks, rotary embeddings) is the same for every variant as long as no
    layer computes it: it is known before any layer has run, and consists of the same tensors when a layer is reached.
    Keys and values that one layer shares with another do not; they would belong to one variant only, and a gradient
    would miss the path through them.

    Args:
        fix: what to do with a model that is refused.
    """

    def __init__(self, fix: str) -> None:
        self._fix = fix
        self._before: list[list[Tensor]] = []

    def check(self, layer: ResidentLayer) -> None:
        """Check what is passed to a layer; called for each layer in order, for the first one before it has run.

        Raises:
            ModelError: the layer reads something computed by an earlier layer, other than hidden states.
        """
        stream = layer.stream
        if not self._before:
            self._before = [_handed(stream, index) for index in range(len(stream.source.layers))]
        before, now = self._before[layer.index], _handed(stream, layer.index)
        if len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True)):
            raise ModelError(
                f"{layer.name} reads more than the hidden states of earlier layers",
                expected="layers that pass each other only hidden states",
                fix=self._fix,
            )


class Variants(Generic[Name]):
    """Hidden states of variants of the streamed model.

        variants = Variants(stream, fix)
        for layer in stream:
            variants.advance(layer)
            with changed(layer):
                variants.begin("without", layer)
        variants.divergences(stream.hidden, last_position=False)["without"]

    Args:
        stream: the one whose layers become resident; its activation budget applies to each variant separately.
        fix: what to do with a model whose layers pass each other more than hidden states.
    """

    def __init__(self, stream: Stream, fix: str) -> None:
        self._stream, self._separation = stream, Separation(fix)
        self._states: dict[Name, HiddenStates] = {}

    def advance(
        self,
        layer: ResidentLayer,
        changed: Callable[[Name], AbstractContextManager[None]] = lambda name: nullcontext(),
    ) -> None:
        """Carry all variants through a layer in its current state.

        Args:
            layer: the layer.
            changed: inside what it returns for a variant, the layer is as that variant has it.

        Raises:
            ModelError: the layer reads more than the hidden states of earlier layers.
            NumericsError: an output is not finite; names the layer.
        """
        self._separation.check(layer)
        for name, states in self._states.items():
            with changed(name):
                layer.advance(states)

    def begin(self, name: Name, layer: ResidentLayer, skipped: bool = False) -> None:
        """Start a variant with this layer in its current state, and all earlier layers as the stream had them.

        Args:
            name: of the variant.
            layer: the stream's own hidden states are still its inputs.
            skipped: whether the variant omits the layer.

        Raises:
            NumericsError: an output is not finite; names the layer.
        """
        self._states[name] = self._stream.hidden.copy()
        if not skipped:
            layer.advance(self._states[name])

    def divergences(
        self,
        dense: HiddenStates,
        *,
        last_position: bool,
        watch: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[Name, float]:
        """Compare the predictions of all variants, which have passed all layers, with those of the dense model.

        Args:
            dense: its final hidden states.
            last_position: whether to include the prediction after a sample's last token. The sample has no token to
                check it against, so perplexity omits it; two distributions can still be compared there.
            watch: called with the number of positions compared and their total, over all variants.

        Returns:
            Variant -> mean over positions of KL(dense || variant), in nats/token; NaN or infinite where the logits are.
        """
        names = list(self._states)
        totals = dict.fromkeys(names, 0.0)
        together = self._together()
        for start in range(0, len(names), together):
            some = names[start : start + together]
            states = [self._states[name] for name in some]

            def count(done: int, every: int, start: int = start, some: int = len(some)) -> None:
                watch(start * every + some * done, len(names) * every)

            for window, logits in self._stream.logits(dense, *states, watch=count):
                for name, more in zip(some, _sums(window, logits, last_position), strict=True):
                    totals[name] += more
        positions = sum(ids[:, 0 if last_position else 1 :].numel() for ids in self._stream.batches)
        return {name: total / positions for name, total in totals.items()}

    def _together(self) -> int:
        """How many variants have logits in memory at once, in addition to the dense model's."""
        source, batch = self._stream.source, self._stream.batches[0]
        positions = min(window_positions(source), batch.numel())
        vocabulary = source.model.config.get_text_config(decoder=True).vocab_size
        return max(_LOGIT_BYTES // (4 * positions * vocabulary) - 1, 1)


@contextmanager
def with_weights(layer: ResidentLayer, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Temporarily replace matrices of a resident layer.

    Args:
        layer: the layer.
        weights: name -> its matrix [out, in] for the time being.
    """
    names = {layer.matrices[name].parameter for name in weights}
    before = {name: layer.module.get_parameter(name).detach().clone() for name in names}
    try:
        for name, weight in weights.items():
            layer.replace(name, weight)
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                layer.module.get_parameter(name).copy_(values)


def kl_divergence(dense: Tensor, other: Tensor) -> float:
    """Sum over positions of KL(dense || other), in nats: each position's in float32, their sum in float64.

    Args:
        dense: log-probabilities [..., positions, vocabulary], float32 or wider.
        other: the same.
    """
    return float(kl_divergences(dense, other).sum())


def kl_divergences(dense: Tensor, other: Tensor) -> Tensor:
    """KL(dense || other) of each position, in nats, float64 [..., positions]; computed in float32.

    Args:
        dense: log-probabilities [..., positions, vocabulary], float32 or wider.
        other: the same.
    """
    return F.kl_div(other, dense, reduction="none", log_target=True).sum(-1).double()


def _sums(window: Window, logits: tuple[Tensor, ...], last_position: bool) -> list[float]:
    """KL(first || other) for each of the others, summed over positions; logits [samples, positions, vocabulary]."""
    ends = window.positions.stop == window.shape[1] and not last_position
    first, *others = (part[:, : -1 if ends else None] for part in logits)
    before = first.float().log_softmax(-1)
    return [kl_divergence(before, other.float().log_softmax(-1)) for other in others]


def _handed(stream: Stream, index: int) -> list[Tensor]:
    """The tensors passed to a layer in the first batch, apart from the hidden states."""
    return list(nested_tensors(stream.calls.get(index, 0)))


def nested_tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers, in order.

    Layers may write to a shared mapping of a class that `tree_leaves` does not traverse: what they write then appears
    among the next layer's tensors.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from nested_tensors(item)
