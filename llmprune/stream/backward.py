"""Gradients of the loss with respect to a model's weights, with one decoder layer in memory at a time.

The forward pass keeps the inputs of every layer (in CPU memory up to a budget, on disk beyond it). The backward pass,
from the last layer to the first, runs each layer again on its inputs and propagates the gradient at its outputs to its
weights and to its inputs, which are the outputs of the previous layer. Samples are processed one by one: Fisher
information needs the square of each sample's gradient.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from llmprune.devices import return_freed_memory
from llmprune.errors import NumericsError
from llmprune.models.source import Source, eager_experts
from llmprune.statistics import check_finite
from llmprune.stream.activations import HiddenStates
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.stream.variants import Separation
from llmprune.timing import Stages


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """The gradient of the loss with respect to one parameter, over calibration samples.

    Attributes:
        mean: in the parameter's shape, float32 or wider.
        mean_square: the mean over samples of each sample's squared gradient; same shape and dtype.
    """

    mean: Tensor
    mean_square: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerGradients:
    """The gradients of one decoder layer.

    Attributes:
        index: its position in the stream.
        module: the layer itself, on the device until the next one is requested.
        gradients: parameter inside the layer -> gradients of the loss, float32 or wider, on the device.
        token_squares: mean square of the gradient of each sample's summed loss with respect to the layer's output at
            each token, float32 [samples, length], in CPU memory; None if it was not asked for.
    """

    index: int
    module: nn.Module
    gradients: dict[str, Gradients]
    token_squares: Tensor | None = None


class BackwardStream:
    """The decoder layers of a source from last to first, each with the gradients of its weights.

        for layer in BackwardStream(source, ids, settings, {0: ["mlp.down_proj.weight"]}):
            layer.gradients["mlp.down_proj.weight"].mean

    The loss of a sample is its mean next-token cross entropy; gradients and squared gradients are averaged over
    samples. The model is not changed.

    Args:
        source: where the layers come from.
        ids: tokens [samples, length], length >= 2; held-back samples are not used.
        settings: device and memory; the batch size is always 1, and inputs of layers that exceed the budget go to
            disk.
        names: layer -> its parameters whose gradients are wanted; only these layers are yielded, and there is no
            backward pass through the layers before the first of them.
        outputs: layers whose gradients with respect to the output at each token are wanted; they are yielded too.
        stages: stopwatch; a new one by default.
        watch: called with what is done and its number of steps taken and in total: layers "forward", samples at the
            "head", layers "backward".

    Raises:
        ModelError: layers pass each other more than hidden states, so that gradients would miss a path.
        NumericsError: an activation or a gradient is NaN or infinite; names the layer.
    """

    def __init__(
        self,
        source: Source,
        ids: Tensor,
        settings: StreamSettings | None,
        names: Mapping[int, Collection[str]],
        stages: Stages | None = None,
        watch: Callable[[str, int, int], None] = lambda what, done, total: None,
        outputs: Collection[int] = (),
    ) -> None:
        settings = settings or StreamSettings()
        self.source, self.device, self._names, self._outputs = source, settings.device, names, outputs
        self._ids, self._watch = ids[: len(ids) - settings.held_back], watch
        # Half of the memory for the inputs of all layers, half for the hidden states or gradients in transit.
        budget = settings.activation_budget // 2
        single = replace(settings, batch_size=1, held_back=0, activation_budget=budget, outputs=True)
        self._stream = Stream(source, self._ids, single, stages)
        self._inputs = HiddenStates(budget)

    def __iter__(self) -> Iterator[LayerGradients]:
        """Run the forward pass, then yield the layers from last to first."""
        wanted = [*(index for index, own in self._names.items() if own), *self._outputs]
        if not wanted:
            return
        self._forward(min(wanted))
        self._start()
        with eager_experts(self.source.model):
            layers = len(self.source.layers)
            for index in range(layers - 1, min(wanted) - 1, -1):
                self._watch("backward", layers - 1 - index, layers - min(wanted))
                self.source.load_layer(index, self.device)
                try:
                    with self._stream.stages("forward"):
                        squares = self._token_squares() if index in self._outputs else None
                        gradients = self._backward(index)
                    if gradients or squares is not None:
                        yield LayerGradients(index, self.source.layers[index], gradients, squares)
                finally:
                    self.source.free_layer(index)
                    return_freed_memory()

    def _forward(self, first: int) -> None:
        """Keep the inputs of the layers from `first` on, and the outputs of the last one."""
        separation = Separation(fix="use a score that needs no gradients")
        for layer in self._stream:
            self._watch("forward", layer.index, len(self.source.layers))
            separation.check(layer)
            if layer.index >= first:
                for sample in range(len(self._ids)):
                    self._inputs[self._key(layer.index, sample)] = self._stream.hidden[sample]

    def _start(self) -> None:
        """Replace the last layer's outputs with the gradient of the loss with respect to them."""
        with self._stream.stages("forward"):
            self.source.load_ends(self.device)
            try:
                for sample in range(len(self._ids)):
                    self._watch("head", sample, len(self._ids))
                    self._stream.hidden[sample] = self._loss_gradient(sample)
            finally:
                self.source.free_ends()

    def _loss_gradient(self, sample: int) -> Tensor:
        """The gradient of the loss summed over tokens: that of the mean could underflow in 16 bits."""
        final, ids = self._stream.hidden[sample].to(self.device), self._ids[sample : sample + 1].to(self.device)
        gradient = torch.empty_like(final)
        windows = list(self._stream.windows(sample))
        if not windows[0].can_cut(final):
            windows = list(self._stream.windows(sample, limit_bytes=sys.maxsize))
        for window in windows:
            part = window.cut(final).detach().requires_grad_()
            targets = ids[0, window.positions.start + 1 : window.positions.stop + 1]
            with torch.enable_grad():
                logits = self._stream.head(window.cut(ids), part)[0, : len(targets)]
                loss = F.cross_entropy(
                    logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum"
                )
                check_finite(loss.detach(), f"the loss of calibration sample {sample}")
                window.cut(gradient).copy_(torch.autograd.grad(loss, part)[0])
            del logits, loss
        return gradient

    def _token_squares(self) -> Tensor:
        """Of the gradients at the outputs of the layer that comes next."""
        above = (self._stream.hidden[sample].float() for sample in range(len(self._ids)))
        return torch.stack([gradient.reshape(-1, *gradient.shape[-2:]).square().mean((0, -1)) for gradient in above])

    def _backward(self, index: int) -> dict[str, Gradients]:
        """Propagate every sample's gradient from the layer's outputs to its inputs; returns those of its weights."""
        module = self.source.layers[index]
        weights = {name: module.get_parameter(name) for name in self._names.get(index, ())}
        sums = {name: _zeros(weight) for name, weight in weights.items()}
        tokens, samples = self._ids.shape[1] - 1, len(self._ids)
        with _differentiable(module, weights.values()):
            for sample in range(samples):
                gradients = self._sample_gradients(index, sample, list(weights.values()))
                for (total, squares), gradient in zip(sums.values(), gradients, strict=True):
                    # Experts that received no token have no gradient.
                    if gradient is not None:
                        wide = gradient.to(total.dtype) / tokens
                        total += wide
                        squares.addcmul_(wide, wide)
        return {name: self._mean(index, name, *both, samples) for name, both in sums.items()}

    def _sample_gradients(self, index: int, sample: int, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The gradients of one sample's loss; that at the layer's inputs replaces that at its outputs."""
        inputs = self._inputs[self._key(index, sample)].detach().to(self.device).requires_grad_()
        args, kwargs = self._stream.calls.get(index, sample)
        with torch.enable_grad():
            outputs = tree_leaves(self.source.layers[index](inputs, *args, **kwargs))[0]
        above = self._stream.hidden[sample].to(self.device)
        below, *gradients = torch.autograd.grad(outputs, [inputs, *weights], above, allow_unused=True)
        check_finite(below, f"the gradient at the inputs of {self.source.layers_path}.{index}")
        self._stream.hidden[sample] = below
        return gradients

    def _mean(self, index: int, name: str, total: Tensor, squares: Tensor, samples: int) -> Gradients:
        try:
            check_finite(squares, f"the gradient of {self.source.layers_path}.{index}.{name}")
        except NumericsError as error:
            raise NumericsError(error.what, expected=error.expected, fix="set compute_dtype: float32") from None
        return Gradients(total / samples, squares / samples)

    def _key(self, index: int, sample: int) -> int:
        return index * len(self._ids) + sample


def _zeros(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two sums: of gradients and of their squares."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros_like(weight, dtype=dtype), torch.zeros_like(weight, dtype=dtype)


@contextmanager
def _differentiable(module: nn.Module, weights: Collection[Tensor]) -> Iterator[None]:
    """Have autograd track these weights of a module and no others."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
