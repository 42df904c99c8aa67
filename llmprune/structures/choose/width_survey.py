"""Measure the hidden channels of the dense model: their importance, and their share of each norm's input energy."""

import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.errors import ModelError, RecipeError
from llmprune.statistics import ColumnNorm, check_finite
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream
from llmprune.structures.choose.scores import (
    Channels,
    activation_norm,
    lowest_groups,
    magnitude_l1,
    magnitude_l2,
    norm_gain,
)
from llmprune.structures.remove.width import Width

WIDTH_SCORES = ("activation-norm", "energy", "norm-gain", "magnitude-l1", "magnitude-l2")


@dataclass(frozen=True, slots=True)
class WidthChoice:
    """Which hidden channels are kept; all fields are ready for JSON.

    Attributes:
        channels: ascending.
        factors: norm -> the factor applied to its gain, so that its output has the right scale on average.
        energy: norm -> the share of its input's mean square in the kept channels, in [0, 1].
        score: the score used for the choice.
    """

    channels: list[int]
    factors: dict[str, float]
    energy: dict[str, float]
    score: str


class WidthSurvey:
    """Collects the statistics for choosing hidden channels, in one pass over the dense model.

        survey = WidthSurvey(width, "activation-norm")
        for layer in (stream := Stream(source, ids, StreamSettings(outputs=True))):
            survey.see(layer)
        survey.finish(stream)
        choice = survey.result()

    The scores, of which the highest are kept:

    * activation-norm: root of the mean square of each norm's output, summed over the norms (Minitron,
      arXiv 2407.14679, takes norms over samples and means over positions);
    * energy: the channel's share of the mean square of a norm's input, averaged over tokens, summed over the norms;
    * norm-gain: the sum of the norms' |gains|;
    * magnitude-l1, magnitude-l2: norm of all weights that read or write the channel.

    Args:
        width: the plan.
        score: one of WIDTH_SCORES.

    Raises:
        RecipeError: the score is unknown.
    """

    def __init__(self, width: Width, score: str = "activation-norm") -> None:
        if score not in WIDTH_SCORES:
            raise RecipeError(f"width score {score!r}", expected=", ".join(WIDTH_SCORES))
        self._width, self._score = width, score
        self._weighed = torch.zeros(width.size, dtype=torch.float64)
        self._inputs: dict[str, ColumnNorm] = {}
        self._outputs: dict[str, ColumnNorm] = {}

    def see(self, layer: ResidentLayer) -> None:
        """Run a dense layer over the statistics batches; the layer does not advance.

        Raises:
            NumericsError: an activation is not finite.
        """
        prefix = f"{layer.name}."
        self._weigh((prefix + name, parameter) for name, parameter in layer.module.named_parameters())
        names = [name for name in self._width.norms if name.startswith(prefix)]
        inside = {name: layer.module.get_submodule(name.removeprefix(prefix)) for name in names}
        with torch.no_grad(), layer.stream.stages("forward"), self._watching(inside):
            for batch in range(layer.stream.statistics_batches):
                layer.forward(layer.stream.hidden[batch], batch)
        self._require_seen(inside)

    def finish(self, stream: Stream) -> None:
        """Measure what is outside the decoder layers, once the stream has ended.

        Args:
            stream: of the dense model, run with `outputs`; its hidden states are the last layer's outputs.

        Raises:
            ModelError: a norm was not used.
        """
        model, layers = stream.source.model, f"{stream.source.layers_path}."
        outside = {name: model.get_submodule(name) for name in self._width.norms if not name.startswith(layers)}
        # Whole batches, since there are no logits here that would have to fit into memory.
        logits = cast(Generator[Any, None, None], stream.logits(stream.hidden, limit_bytes=sys.maxsize))
        with self._watching(outside), _without_head(model), closing(logits) as batches:
            for batch, _ in zip(range(stream.statistics_batches), batches, strict=False):
                if batch == 0:
                    named = model.named_parameters()
                    self._weigh((name, parameter) for name, parameter in named if not name.startswith(layers))
        self._require_seen(outside)

    def result(self) -> WidthChoice:
        """Choose the channels, once all layers and the ends (embeddings, final norm and LM head) have been seen.

        Raises:
            NumericsError: a score is NaN.
        """
        width = self._width
        self._require_seen(width.norms)
        gone = set(lowest_groups(self._scores(), width.size - width.kept).tolist())
        channels = [channel for channel in range(width.size) if channel not in gone]
        energy = {}
        for name, seen in self._inputs.items():
            share = seen.squares.double() / seen.squares.double().sum()
            energy[name] = float(share[channels].sum())
        factors = {name: (share * width.size / width.kept) ** 0.5 for name, share in energy.items()}
        return WidthChoice(channels, factors, energy, self._score)

    def _scores(self) -> Tensor:
        if self._score == "energy":
            return torch.stack([seen.squares.double().cpu() / seen.tokens for seen in self._inputs.values()]).sum(0)
        if self._score == "activation-norm":
            size = self._width.size
            known = [Channels(size, tokens=seen.tokens, squares=seen.squares.cpu()) for seen in self._outputs.values()]
            return torch.stack([activation_norm(channels) for channels in known]).sum(0)
        return self._weighed

    def _weigh(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Add up some weights, or the gains among them, for each channel."""
        size = self._width.size
        offsets = {norm.gain: norm.offset for norm in self._width.norms.values()}
        for name, parameter in parameters:
            if self._score == "norm-gain" and name in offsets:
                self._weighed += norm_gain(Channels(size, gains=[parameter.detach() + offsets[name]])).cpu()
            for dim in self._width.places.get(name, ()) if self._score.startswith("magnitude") else ():
                channels = Channels(size, matrices=[parameter.detach().movedim(dim, -1).reshape(-1, size)])
                own = magnitude_l1(channels) if self._score == "magnitude-l1" else magnitude_l2(channels).square()
                self._weighed += own.cpu()  # the sum of squares ranks like its root

    @contextmanager
    def _watching(self, norms: Mapping[str, nn.Module]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in norms.items():
                stack.callback(module.register_forward_hook(self._hook(name), with_kwargs=True).remove)
            yield

    def _hook(self, name: str) -> Callable[..., None]:
        centred, size = self._width.norms[name].centred, self._width.size

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            rows = (args[0] if args else next(iter(kwargs.values()))).reshape(-1, size).float()
            if centred:
                rows = rows - rows.mean(-1, keepdim=True)
            # All tokens count equally, whatever their norm: that of the first may be a thousand times as large.
            rows = rows * rows.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt()
            self._inputs.setdefault(name, ColumnNorm.empty(size, rows.device)).update(rows)
            if self._score == "activation-norm":
                self._outputs.setdefault(name, ColumnNorm.empty(size, rows.device)).update(output.reshape(-1, size))

        return hook

    def _require_seen(self, norms: Iterable[str]) -> None:
        for name in norms:
            if name not in self._inputs:
                raise ModelError(
                    f"the norm {name} was not used in the forward pass of the calibration text",
                    expected="every norm over hidden channels to be used",
                    fix="leave the hidden width as it is",
                )
            check_finite(self._inputs[name].squares, f"the input of {name}")


@contextmanager
def _without_head(model: PreTrainedModel) -> Iterator[None]:
    """Skip the LM head, the largest matmul of all, since the logits are not needed."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    head.forward = lambda hidden: hidden[..., :1]
    try:
        yield
    finally:
        del head.forward
