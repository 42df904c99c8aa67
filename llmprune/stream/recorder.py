"""Record how a model's own code calls its decoder layers."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llmprune.errors import ModelError

if TYPE_CHECKING:
    from llmprune.stream.stream import Stream


class CapturedError(Exception):
    """Ends a forward pass once the last decoder layer has been called."""


class Recorder:
    """Stands in for all decoder layers during one forward pass: passes the hidden states on and records the calls.

    Attributes:
        expected: index of the layer that must be called next.
    """

    def __init__(self, stream: "Stream", batch: int) -> None:
        self._stream, self._batch = stream, batch
        self._names = [next(iter(inspect.signature(layer.forward).parameters)) for layer in stream.source.layers]
        self._state: tuple[object, ...] = ()
        self.expected = 0

    def forward(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """One decoder layer's call."""
        if args:
            hidden, *rest = args
        else:
            hidden, rest = kwargs.pop(self._names[index]), []
        self._check(index, hidden)
        self._stream.calls.record(index, self._batch, tuple(rest), kwargs)
        self.expected += 1
        if self.expected == len(self._names):
            raise CapturedError
        return self._stream.calls.stand_in(index, hidden)

    def _check(self, index: int, hidden: Tensor) -> None:
        # Same memory, no writes since: the model did not change the hidden states in between.
        state = hidden.data_ptr(), hidden.shape, hidden.stride(), hidden.dtype, hidden._version
        if index == 0 and self.expected == 0:
            self._state = state
            self._stream.hidden[self._batch] = hidden
        name = type(self._stream.source.model).__name__
        if index != self.expected or state != self._state:
            raise ModelError(
                f"{name} calls layer {index} of {self._stream.source.layers_path} after {self.expected} others"
                if index != self.expected
                else f"{name} changes the hidden states between its decoder layers (before layer {index})",
                expected="layers that are called in order, and whose output is passed to the next one unchanged",
                fix="this architecture cannot be streamed layer by layer",
            )


@contextlib.contextmanager
def replaced(layers: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace every layer's `forward(...)` with `forward(index, ...)`."""
    # A model dispatched by accelerate keeps its hooks in an instance attribute `forward`.
    before = [vars(layer).get("forward") for layer in layers]
    for index, layer in enumerate(layers):
        layer.forward = functools.partial(forward, index)
    try:
        yield
    finally:
        for layer, original in zip(layers, before, strict=True):
            if original is None:
                del layer.forward
            else:
                layer.forward = original
