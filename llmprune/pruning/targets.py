"""What the dense model has in place of a layer's inputs and outputs: what solvers and block matching aim at."""

from collections.abc import Callable, Collection, Sequence

from llmprune.devices import return_freed_memory
from llmprune.models.source import Source
from llmprune.recipe.reconstruct import Target
from llmprune.stream.activations import HiddenStates, LayerCalls
from llmprune.stream.paired import calling, dense_rows
from llmprune.stream.resident import DenseRows, ResidentLayer
from llmprune.stream.stream import Stream


class Targets:
    """Follows the dense model through a stream, one layer ahead of pruning.

    Args:
        target: of block matching, as in the recipe; None: layers are not fitted as a whole.
        stream: of the run; its hidden states are those of the pruned model.
        dense: opens the dense model again, for layers that an interrupted run has committed: their weights here are
            pruned already.
        paired: whether `rows` will be asked for.
    """

    def __init__(
        self, target: Target | None, stream: Stream, dense: Callable[[], Source] | None = None, *, paired: bool = False
    ) -> None:
        self._target, self._stream, self._open = target, stream, dense
        self._follows = paired or target in ("dense", "corrected")
        self._dense: tuple[HiddenStates, LayerCalls] | None = None
        self._source: Source | None = None
        self._ahead = -1

    def rows(self, layer: ResidentLayer, names: Collection[str]) -> DenseRows:
        """The inputs of a layer's matrices in the dense model, for `ResidentLayer.observe`; before `prepare`.

        Args:
            layer: dense.
            names: of the matrices.
        """
        return dense_rows(layer, *self._states(), names)

    def prepare(self, layer: ResidentLayer, removed: Sequence[int] = ()) -> tuple[HiddenStates, HiddenStates] | None:
        """Run a layer that is dense yet, and the removed layers that it is to stand for.

        Args:
            layer: on the device.
            removed: the layers directly after it that are removed.

        Returns:
            What to run the pruned layer on, and what it should return; None if layers are not fitted as a whole.
        """
        inputs = outputs = self._stream.hidden
        if self._target == "local":
            outputs = self._stream.hidden.copy()
            self._advance(layer, removed, outputs, self._stream.calls.fork())
        if self._follows:
            states, calls = self._states()
            if self._target == "dense":
                inputs = states.copy()
            self._advance(layer, removed, states, calls)
            self._ahead = max(self._ahead, *removed, layer.index)
            outputs = outputs if self._target == "local" else states
        return None if self._target is None else (inputs, outputs)

    def between(self, layer: ResidentLayer) -> HiddenStates:
        """What a layer that is dense yet, run without its MLP, should return; to be called before `prepare`."""
        local = self._target == "local"
        states, calls = (self._stream.hidden, self._stream.calls) if local else self._states()
        outputs = states.copy()
        self._advance(layer, (), outputs, calls.fork())
        return outputs

    def follow(self, layer: ResidentLayer, *, dense: bool) -> None:
        """Keep up with a layer that is neither fitted nor solved for in this run.

        Args:
            layer: resident.
            dense: whether its weights are the dense model's; otherwise they are read again.
        """
        if not self._follows or layer.index <= self._ahead:
            return
        states, calls = self._states()
        if dense:
            self._advance(layer, (), states, calls)
            return
        assert self._open is not None, "committed layers come from a checkpoint"
        source = self._source = self._source or self._open()
        device = self._stream.settings.device
        source.load_layer(layer.index, device)
        try:
            original = ResidentLayer(self._stream, layer.index)
            original.become(source.layers[layer.index], layer.name)
            self._advance(original, (), states, calls)
        finally:
            source.free_layer(layer.index)

    def _advance(self, layer: ResidentLayer, removed: Sequence[int], states: HiddenStates, calls: LayerCalls) -> None:
        with calling(self._stream, calls):
            layer.advance(states)
            advance_removed(self._stream, removed, states)

    def _states(self) -> tuple[HiddenStates, LayerCalls]:
        """The dense model's hidden states, and what it passes to its layers; at first both models have the same."""
        if self._dense is None:
            self._dense = self._stream.hidden.copy(), self._stream.calls.fork()
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
