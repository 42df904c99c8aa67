"""Bring the decoder layers of a model to the device one at a time, in order.

    for layer in Stream(source, ids, settings):
        for group in layer.observe(needs):
            for name in group.names:
                layer.replace(name, method(layer.weight(name), group.statistics, pattern).weight)

The caller's loop body is the algorithm. After it, the stream runs the modified layer and passes its outputs to the next
one, so that every layer is calibrated on the outputs of the pruned layers before it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.devices import PeakWatch, return_freed_memory
from llmprune.errors import ModelError, NumericsError
from llmprune.models.decoder import Matrix, prunable_matrices
from llmprune.models.source import Source, eager_experts
from llmprune.precision import dtype_name, float32_products
from llmprune.statistics import ColumnNorm, Gram, TokenWeight, check_finite
from llmprune.stream.activations import HiddenStates, LayerCalls
from llmprune.stream.observation import EveryMatrixSeenError, Group, Observer
from llmprune.stream.recorder import CapturedError, Recorder, replaced
from llmprune.stream.windows import LOGIT_BYTES, Window, window_positions, windows
from llmprune.timing import Stages

Needs = Mapping[str, type[ColumnNorm] | type[Gram] | None]
DenseRows = Callable[[int], Mapping[str, Sequence[Tensor]]]


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """How a stream runs; only `held_back` changes the result beyond rounding.

    Attributes:
        device: where layers are computed.
        batch_size: samples per forward pass.
        held_back: how many of the last samples to exclude from the statistics.
        activation_budget: bytes of hidden states in CPU memory; the rest goes to disk.
        outputs: also compute the last layer's outputs, which the logits need.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 8
    held_back: int = 0
    activation_budget: int = 4 << 30
    outputs: bool = False


class Stream:
    """The decoder layers of a source, one resident at a time, each with its calibration inputs.

    Args:
        source: where the layers come from.
        ids: tokens [samples, length].
        settings: device, batches and memory.
        stages: stopwatch; a new one by default.

    Attributes:
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
        # Held-back samples have batches of their own, so that the statistics include a whole batch or none of it.
        counted = len(ids) - self.settings.held_back
        size = self.settings.batch_size
        self.batches = [*ids[:counted].split(size), *(ids[counted:].split(size) if self.settings.held_back else ())]
        self.statistics_batches = -(-counted // size)
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
        done, total = 0, sum(ids.numel() for ids in self.batches)
        with self._ends():
            for batch, ids in enumerate(self.batches):
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
        """The numbers of the batches; tells of each but the first, so that a long pass is not a silent one."""
        for batch in range(len(self.batches)):
            if batch:
                self.tell(f"batch {batch + 1} of {len(self.batches)}")
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


class ResidentLayer:
    """One decoder layer on the device.

    Attributes:
        name: dotted name in the model, for example "model.layers.3".
        index: its position in the stream.
        module: the layer itself.
        matrices: name -> its prunable matrices.
        replaced: the parameters in which a matrix was replaced.
        skipped: whether the next layer gets this one's inputs, as if this layer were removed.
    """

    def __init__(self, stream: Stream, index: int) -> None:
        self.stream, self.index = stream, index
        self.replaced: set[str] = set()
        self.skipped = False
        self.become(stream.source.layers[index], f"{stream.source.layers_path}.{index}")

    def become(self, module: nn.Module, name: str) -> None:
        """Use another module, already on the device, as this layer from now on; its creator must free it.

        Args:
            module: takes the same arguments, and its parameters have the same names.
            name: dotted name of the layer.
        """
        self.module, self.name = module, name
        self.matrices: dict[str, Matrix] = {m.name: m for m in prunable_matrices(module, name)}
        self._parameters = dict(module.named_parameters())

    def observe(
        self,
        needs: Needs,
        token_weight: TokenWeight = "none",
        batches: int | None = None,
        importance: Tensor | None = None,
        dense: DenseRows | None = None,
    ) -> list[Group]:
        """Run the layer over all batches and collect statistics.

        Args:
            needs: matrix name -> the statistics it needs; matrices left out are not watched.
            token_weight: how tokens are weighed in the statistics, see `statistics.TokenWeighting`.
            importance: weight of each token [samples, length] for the loss; None: all count the same.
            batches: run only this many, to see which matrices share an input; None: all.
            dense: gives the inputs in the dense model for a batch (`paired.dense_rows`), of which Grams then collect
                the differences; None: they do not.

        Returns:
            The groups of matrices that share an input, in the order in which the layer uses them.

        Raises:
            NumericsError: an activation is NaN or infinite; names the matrix.
            ModelError: a matrix was not used in any matmul.
        """
        watched, stages = [self.matrices[name] for name in needs], self.stream.stages
        observer = Observer(self._parameters, watched, needs, stages, token_weight)
        with torch.no_grad(), self.stream.stages("forward"):
            for batch in self.stream.told_batches():
                if batch == batches:
                    break
                observer.keep_rows = batch >= self.stream.statistics_batches
                if importance is not None:
                    first, samples = batch * self.stream.settings.batch_size, len(self.stream.batches[batch])
                    observer.importance = importance[first : first + samples].flatten()
                if dense is not None and not observer.keep_rows:
                    observer.dense = dense(batch)
                with contextlib.suppress(EveryMatrixSeenError), observer:
                    self.forward(self.stream.hidden[batch], batch)
                observer.end_batch()
        observer.finish()
        for group in observer.groups:
            if group.statistics is not None:
                self._check(group.statistics.squares, f"the input of {', '.join(group.names)}")
        return observer.groups

    def weight(self, name: str) -> Tensor:
        """The matrix as float32 [out, in], a copy.

        Raises:
            NumericsError: it holds NaN or infinity.
        """
        # A copy already, unless the layer is float32.
        weight = self._view(name).float()
        self._check(weight, f"the weight of {name}")
        return weight.clone() if weight.data_ptr() == self._view(name).data_ptr() else weight

    def replace(self, name: str, weight: Tensor) -> None:
        """Replace a matrix by another [out, in], rounded to the dtype in which it will be stored.

        Raises:
            NumericsError: a rounded value is NaN or infinite.
        """
        parameter = self.matrices[name].parameter
        # Rounded now, not on writing: later layers must be calibrated on the weights that will be loaded.
        rounded = weight.to(self.stream.source.stored_dtype(self.index, parameter))
        check_finite(rounded, f"{name}, pruned and stored in {dtype_name(rounded.dtype)},")
        with torch.no_grad():
            self._view(name).copy_(rounded)
        self.replaced.add(parameter)

    def count_zeros(self, name: str) -> int:
        """The number of zeros currently in the matrix."""
        return int((self._view(name) == 0).sum())

    def output_error(self, group: Group, name: str, original: Tensor) -> float | None:
        """Relative output error ||(W - V) X||^2 / ||W X||^2, W the original [out, in], V the current matrix.

        X are the held-back rows. Without them the Gram of the statistics is used; None if there is neither.
        """
        difference = original - self._view(name).float()
        rows = torch.cat(group.held_back) if group.held_back else None
        if rows is not None:
            # Three digits of the ratio are enough, so bfloat16 will do.
            with float32_products("bf16" if rows.dtype == torch.bfloat16 else "ieee"):
                lost = (rows.float() @ difference.T).square().sum()
                total = (rows.float() @ original.T).square().sum()
        elif isinstance(group.statistics, Gram) and group.statistics.tokens:
            gram = group.statistics.products
            lost = ((difference @ gram) * difference).sum()
            total = ((original @ gram) * original).sum()
        else:
            return None
        # A total that is NaN is no 0: the ratio is NaN, too, and refused.
        return 0.0 if float(total) <= 0 else float(lost / total)

    def advance(self, states: HiddenStates | None = None) -> None:
        """Run the layer in its current state; its outputs replace its inputs.

        Args:
            states: hidden states other than the stream's own, for a model that differs in some earlier layer.
        """
        hidden = self.stream.hidden if states is None else states
        with torch.no_grad(), self.stream.stages("forward"):
            for batch in self.stream.told_batches():
                output = self.stream.calls.carry(self.index, batch, self.forward(hidden[batch], batch))
                self._check(output, f"the output of {self.name}")
                hidden[batch] = output

    def forward(self, hidden: Tensor, batch: int) -> Any:
        """Call the layer with hidden states [samples, length, hidden] and what the model passes to it in this batch."""
        args, kwargs = self.stream.calls.get(self.index, batch)
        return self.module(hidden.to(self.stream.settings.device), *args, **kwargs)

    def _view(self, name: str) -> Tensor:
        matrix = self.matrices[name]
        return matrix.view(self._parameters[matrix.parameter].detach())

    def _check(self, values: Tensor, what: str) -> None:
        try:
            check_finite(values, what)
        except NumericsError as error:
            # If a parameter is the cause, naming the activation in which it first shows would mislead.
            for name, parameter in self._parameters.items():
                check_finite(parameter, f"{self.name}: the parameter {name}")
            raise error.at(self.name) from None
