"""What each layer is to return when it is fitted as a whole, and what it is run on."""

from collections.abc import Callable, Sequence

from llmprune.devices import return_freed_memory
from llmprune.models.source import Source
from llmprune.recipe.reconstruct import Target
from llmprune.stream.activations import HiddenStates
from llmprune.stream.stream import ResidentLayer, Stream


class Targets:
    """Follows the dense model through a stream, one layer ahead of pruning.

    Args:
        target: as in the recipe.
        stream: of the run; its hidden states are those of the pruned model.
        dense: opens the dense model again, for layers that an interrupted run has committed: their weights here are
            pruned already.
    """

    def __init__(self, target: Target, stream: Stream, dense: Callable[[], Source] | None = None) -> None:
        self._target, self._stream, self._open = target, stream, dense
        self._dense: HiddenStates | None = None
        self._source: Source | None = None
        self._ahead = -1

    def prepare(self, layer: ResidentLayer, removed: Sequence[int] = ()) -> tuple[HiddenStates, HiddenStates]:
        """Run a layer that is dense yet, and the removed layers that it is to stand for.

        Args:
            layer: resident.
            removed: the layers directly after it that are removed.

        Returns:
            What to run the pruned layer on, and what it should return.
        """
        if self._target == "local":
            outputs = self._stream.hidden.copy()
            layer.advance(outputs)
            advance_removed(self._stream, removed, outputs)
            return self._stream.hidden, outputs
        states = self._states()
        inputs = states.copy() if self._target == "dense" else self._stream.hidden
        layer.advance(states)
        advance_removed(self._stream, removed, states)
        self._ahead = max(self._ahead, *removed, layer.index)
        return inputs, states

    def between(self, layer: ResidentLayer) -> HiddenStates:
        """What a layer that is dense yet, run without its MLP, should return; to be called before `prepare`."""
        outputs = (self._stream.hidden if self._target == "local" else self._states()).copy()
        layer.advance(outputs)
        return outputs

    def follow(self, layer: ResidentLayer, *, dense: bool) -> None:
        """Keep up with a layer that is not fitted in this run.

        Args:
            layer: resident.
            dense: whether its weights are the dense model's; otherwise they are read again.
        """
        if self._target == "local" or layer.index <= self._ahead:
            return
        states = self._states()
        if dense:
            layer.advance(states)
            return
        assert self._open is not None, "committed layers come from a checkpoint"
        source = self._source = self._source or self._open()
        device = self._stream.settings.device
        source.load_layer(layer.index, device)
        try:
            original = ResidentLayer(self._stream, layer.index)
            original.become(source.layers[layer.index], layer.name)
            original.advance(states)
        finally:
            source.free_layer(layer.index)

    def _states(self) -> HiddenStates:
        """The dense model's hidden states; before the first layer both models have the same."""
        if self._dense is None:
            self._dense = self._stream.hidden.copy()
        return self._dense


def advance_removed(stream: Stream, removed: Sequence[int], states: HiddenStates) -> None:
    """Run hidden states through layers that are ahead of the stream's own; each is loaded and freed.

    Args:
        stream: of the run.
        removed: numbers of the layers, in order.
        states: replaced by the outputs of the last one.
    """
    for index in removed:
        with stream.stages("load"):
            stream.source.load_layer(index, stream.settings.device)
        try:
            ResidentLayer(stream, index).advance(states)
        finally:
            stream.source.free_layer(index)
            return_freed_memory()
