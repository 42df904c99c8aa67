"""The inputs that matrices have in the dense model, token by token beside those in the pruned one.

The difference is what earlier matrices have lost. Routed experts are left out: in both models they read some of the
tokens, and not the same ones.
"""

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llmprune.stream.activations import HiddenStates, LayerCalls
from llmprune.stream.observation import EveryMatrixSeenError, InputRecorder
from llmprune.stream.resident import DenseRows, ResidentLayer
from llmprune.stream.stream import Stream


def dense_rows(layer: ResidentLayer, states: HiddenStates, calls: LayerCalls, names: Collection[str]) -> DenseRows:
    """Give the inputs of matrices in the dense model, batch by batch.

    Args:
        layer: with the dense model's weights while the function is called.
        states: the dense model's hidden states that enter it.
        calls: what the dense model passes to it besides.
        names: its matrices; routed experts among them are left out.

    Returns:
        A function that runs the layer on the batch of a number, and returns matrix name -> input rows of each of its
        matmuls, in their order.
    """
    watched = [layer.matrices[name] for name in names if not layer.matrices[name].routed]
    if not watched:
        return lambda batch: {}
    stages, parameters = layer.stream.stages, dict(layer.module.named_parameters())
    recorder = InputRecorder(parameters, watched, {matrix.name: None for matrix in watched}, stages)

    def rows(batch: int) -> Mapping[str, Sequence[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        recorder.rows = found
        with torch.no_grad(), calling(layer.stream, calls), contextlib.suppress(EveryMatrixSeenError), recorder:
            layer.forward(states[batch], batch)
        recorder.end_batch()
        recorder.rows = {}  # what is returned is freed by whoever gets it
        return found

    return rows


@contextlib.contextmanager
def calling(stream: Stream, calls: LayerCalls) -> Iterator[None]:
    """Layers of a stream that run in this block get these calls, and leave what they return in them."""
    own, stream.calls = stream.calls, calls
    try:
        yield
    finally:
        stream.calls = own


def frozen(layer: ResidentLayer) -> ResidentLayer:
    """A copy of a layer on its device, which keeps its weights when the layer is pruned."""
    twin = ResidentLayer(layer.stream, layer.index)
    twin.become(copy.deepcopy(layer.module), layer.name)
    return twin
