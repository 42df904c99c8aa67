"""Bring the decoder layers of a model to the device one at a time, in order.

    for layer in Stream(source, ids, settings):
        for group in layer.observe(needs):
            for name in group.names:
                layer.replace(name, method(layer.weight(name), group.statistics, pattern).weight)

The caller's loop body is the algorithm. After it, the stream runs the modified layer and passes its outputs to the next
one, so that every layer is calibrated on the outputs of the pruned layers before it.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmprune.devices import PeakWatch, return_freed_memory
from llmprune.errors import CalibrationError, ModelError
from llmprune.models.source import Source, eager_experts
from llmprune.ranks import SINGLE, Ranks
from llmprune.stream.activations import HiddenStates, LayerCalls
from llmprune.stream.recorder import CapturedError, Recorder, replaced
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.windows import LOGIT_BYTES, Window, window_positions, windows
from llmprune.timing import Stages
from llmprune.units import quantity


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """How a stream runs; only `held_back` changes the result beyond rounding.

    Attributes:
        device: where layers are computed.
        batch_size: samples per forward pass.
        held_back: how many of the last samples to exclude from the statistics.
        activation_budget: bytes of hidden states in CPU memory; the rest goes to disk.
        outputs: also compute the last layer's outputs, which the logits need.
        ranks: the processes that share the batches; every one runs each layer, on batches of its own.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 8
    held_back: int = 0
    activation_budget: int = 4 << 30
    outputs: bool = False
    ranks: Ranks = SINGLE


class Stream:
    """The decoder layers of a source, one resident at a time, each with its calibration inputs.

    Args:
        source: where the layers come from.
        ids: tokens [samples, length].
        settings: device, batches and memory.
        stages: stopwatch; a new one by default.

    Attributes:
        batches: all tokens, in the order of the samples; those held back are in batches of their own.
        statistics_batches: how many of them are not held back; they come first.
        own: the numbers of the batches that this process runs, in order: all of them, unless several share the run.
        counted: those of them that are not held back.
        validation: the others.
        tell: called before every batch but the first that goes through the embeddings or a layer, with a few words; by
            default nobody listens.

    Raises:
        ModelError: the model does not pass hidden states from one layer to the next unchanged.
        NumericsError: a layer's output is not finite; names the layer.
    """

    def __init__(
        self, source: Source, ids: Tensor, settings: StreamSettings | None = None, stages: Stages | None = None
    ) -> None:
        self.source, self.settings = source, settings or StreamSettings()
        self.stages = stages or Stages()
        self.hidden = HiddenStates(self.settings.activation_budget)
        # Held-back samples have batches of their own, so that the statistics include a whole batch or none of it. They
        # are few: one batch of them would have all processes but one wait.
        held_back, size = self.settings.held_back, self.settings.batch_size
        counted, part = len(ids) - held_back, min(size, -(-held_back // self.settings.ranks.size))
        self.batches = [*ids[:counted].split(size), *(ids[counted:].split(part) if held_back else ())]
        self.statistics_batches = -(-counted // size)
        numbers, share = range(len(self.batches)), self.settings.ranks.own
        self.counted, self.validation = (
            share(part) for part in (numbers[: self.statistics_batches], numbers[self.statistics_batches :])
        )
        self.own = [*self.counted, *self.validation]
        self.calls = LayerCalls(self.settings.device)
        self.memory: PeakWatch | None = None
        self.tell: Callable[[str], None] = lambda words: None

    @property
    def peak_bytes(self) -> int:
        """Peak memory so far, as report rows have it; 0 if nobody watches it."""
        return 0 if self.memory is None else self.memory.read()

    def __iter__(self) -> Iterator["ResidentLayer"]:
        """Yield the layers in order; after each loop body its outputs become the next layer's inputs."""
        with eager_experts(self.source.model):
            self.capture()
            last = len(self.source.layers) - 1
            for index in range(last + 1):
                with self.stages("load"):
                    self.source.load_layer(index, self.settings.device)
                layer = ResidentLayer(self, index)
                try:
                    yield layer
                    if not layer.skipped and (index < last or self.settings.outputs):
                        layer.advance()
                finally:
                    self.source.free_layer(index)
                    return_freed_memory()

    def logits(
        self,
        *final: HiddenStates,
        limit_bytes: int = LOGIT_BYTES,
        watch: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[tuple[Window, tuple[Tensor, ...]]]:
        """Yield the logits of one or more sets of final hidden states, window by window.

        The model's own code is run with its decoder layers replaced by the given hidden states, so that whatever it
        does around the head (norm, scaling, soft-capping) is included.

        Args:
            final: the sets, each with one tensor per batch.
            limit_bytes: of each set's logits in a window, counted as float32.
            watch: called with the number of positions done and their total.

        Yields:
            A window, and each set's logits [samples, positions, vocabulary] there.
        """
        done, total = 0, sum(self.batches[batch].numel() for batch in self.own)
        with self._ends():
            for batch in self.own:
                ids = self.batches[batch]
                heads = [self._head_of(ids, states[batch]) for states in final]
                for window in self.windows(batch, limit_bytes):
                    # Not around the yield: gradients would stay disabled in the caller's code.
                    with torch.no_grad(), self.stages("forward"):
                        logits = tuple(head(window) for head in heads)
                    yield window, logits
                    del logits
                    done += window.cut(ids).numel()
                    watch(done, total)

    def windows(self, batch: int, limit_bytes: int = LOGIT_BYTES) -> Iterator[Window]:
        """The windows of a batch, in order; the logits of each fit into the limit."""
        samples, length = self.batches[batch].shape
        return windows(batch, (samples, length), window_positions(self.source, limit_bytes))

    def _head_of(self, ids: Tensor, final: Tensor) -> Callable[[Window], Tensor]:
        """The logits of a batch as a function of a window."""
        whole: list[Tensor] = []

        def head(window: Window) -> Tensor:
            if window.can_cut(final):
                return self.head(window.cut(ids), window.cut(final))
            # Hidden states in a shape of the model's own: computed together, once.
            whole[:] = whole or [self.head(ids, final)]
            return window.cut(whole[0])

        return head

    def capture(self) -> None:
        """Run the model's own code around its decoder layers, and record how it calls each of them."""
        with torch.no_grad(), self.stages("forward"):
            # The stand-in for a layer must return what the layer returns, so one layer is run to find out.
            with self._ends():
                args, kwargs = self._first_call(self.batches[0])
            # Both the ends (embeddings, norm, head) and a layer are large, so they are never in memory together.
            self.source.load_layer(0, self.settings.device)
            try:
                self.calls.learn(self.source.layers[0].forward(*args, **kwargs))
            finally:
                self.source.free_layer(0)
            del args, kwargs
            with self._ends():
                for batch in self.told_batches():
                    self._record(batch, self.batches[batch])

    def told_batches(self) -> Iterator[int]:
        """The numbers of the own batches; tells of each but the first, so that a long pass is not a silent one."""
        for place, batch in enumerate(self.own):
            if place:
                self.tell(f"batch {place + 1} of {len(self.own)}")
            yield batch

    @contextlib.contextmanager
    def _ends(self) -> Iterator[None]:
        """Everything outside the layers, on the device."""
        self.source.load_ends(self.settings.device)
        try:
            yield
        finally:
            self.source.free_ends()

    def _first_call(self, ids: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """How the model calls its first layer."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(index: int, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            raise CapturedError

        with replaced(self.source.layers, note), contextlib.suppress(CapturedError):
            self._run_model(ids)
        if not calls:
            raise self._uncalled(0)
        return calls[0]

    def _record(self, batch: int, ids: Tensor) -> None:
        recorder = Recorder(self, batch)
        with replaced(self.source.layers, recorder.forward), contextlib.suppress(CapturedError):
            self._run_model(ids)
        self.calls.end_batch()
        if recorder.expected != len(self.source.layers):
            raise self._uncalled(recorder.expected)

    def _uncalled(self, called: int) -> ModelError:
        return ModelError(
            f"{type(self.source.model).__name__} called {called} of {len(self.source.layers)} layers "
            f"in {self.source.layers_path}",
            expected="a forward pass that calls each decoder layer once, in order",
            fix="set decoder_layers in the recipe to another list of layers",
        )

    def _run_model(self, ids: Tensor) -> Any:
        return self.source.model(input_ids=ids.to(self.settings.device), use_cache=False)

    def head(self, ids: Tensor, final: Tensor) -> Tensor:
        """The logits of some tokens [samples, length], for given final hidden states; the ends must be loaded."""
        final = final.to(self.settings.device)

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            return self.calls.stand_in(index, final)

        with replaced(self.source.layers, stand_in):
            logits = self._run_model(ids).logits
        self.calls.end_batch()
        return logits


def require_batches(settings: StreamSettings, samples: int) -> None:
    """Refuse more processes than there are batches for the statistics.

    Raises:
        CalibrationError: some would have nothing to do.
    """
    counted, size = samples - settings.held_back, settings.ranks.size
    if (batches := -(-counted // settings.batch_size)) < size:
        change = f"set batch_size to at most {counted // size}" if counted >= size else f"read {size} sequences or more"
        sequences = quantity(counted, "calibration sequence")
        raise CalibrationError(
            f"{size} processes for {quantity(batches, 'batch', 'batches')}: {sequences}, "
            f"{settings.batch_size} in a batch",
            expected="a batch for each process",
            fix=f"{change} (not with --resume), or start at most {quantity(batches, 'process', 'processes')}",
        )
