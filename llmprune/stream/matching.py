"""Block matching: fit what a pruned layer has left so that the layer as a whole reproduces the dense one.

Matrix by matrix, a solver can only match products. Here the kept weights, norm gains and biases of one layer are
trained together by Adam on the layer's output, through its non-linearities (the transformer matching of 3BASiL; "A free
lunch in LLM compression"). The error of a token is divided by the size of its target: plain squares serve the few
tokens whose activations are hundreds of times larger than all others (Sun et al. 2024, arXiv 2402.17762). Validation
sequences decide: the best epoch is kept, and the layer stays as it was if none is better.

A layer in float16 is fitted in float32: gradients of an error that is divided by the size of its target and by the
number of tokens are mostly smaller than the smallest float16.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from llmprune.errors import NumericsError
from llmprune.stream.activations import HiddenStates
from llmprune.stream.resident import ResidentLayer

Trained = Literal["weights", "norms", "biases"]

# The learning rate rises along a line during this share of all steps, then falls along a cosine to this share of `lr`.
_WARM_UP, _LAST = 0.1, 0.02
# Epochs after the warm-up without a lower validation error than any before them, before training ends.
_PATIENCE = 3


@dataclass(frozen=True, slots=True)
class Matching:
    """How a layer is fitted.

    Attributes:
        epochs: passes over the calibration sequences, at most.
        lr: highest learning rate of Adam, > 0.
        sequences: calibration sequences a step, at least; whole forward batches.
        train: what is trained: weights (those that were pruned and kept), norms (their gains), biases.
        seed: of the order of the batches.
    """

    epochs: int = 10
    lr: float = 3e-4
    sequences: int = 8
    train: tuple[Trained, ...] = ("weights", "norms", "biases")
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Matched:
    """What fitting a layer has brought.

    Attributes:
        before: mean relative squared error a token on the validation sequences, before.
        after: the same afterwards; never higher.
        epochs: epochs that were run.
        best: the epoch that was kept; 0: the layer stays as it was.
    """

    before: float
    after: float
    epochs: int
    best: int


def match_layer(
    layer: ResidentLayer,
    inputs: HiddenStates,
    targets: HiddenStates,
    pruned: Collection[str],
    options: Matching,
    watch: Callable[[str], None] = lambda step: None,
    among: Callable[[str], bool] = lambda name: True,
) -> Matched:
    """Fit a resident layer in place; zeros stay zero, and trained weights are rounded to the dtype they are stored in.

    Args:
        layer: pruned.
        inputs: what the layer is run on, a tensor [samples, length, hidden] a batch.
        targets: what it should return, likewise.
        pruned: the names of its pruned matrices.
        options: how.
        watch: told about each epoch.
        among: whether a parameter, by its name in the layer, may be trained.

    Raises:
        NumericsError: the loss is not finite.
    """
    with layer.stream.stages("match"):
        masters = _masters(layer, pruned, options.train, among)
        fit = _Fit(layer, inputs, targets, options, _widened(layer, masters))
        error = fit.validate(masters)
        # Layers before the first change have nothing to make up for.
        return fit.run(masters, error, watch) if masters and error else Matched(error, error, 0, 0)


def layer_error(layer: ResidentLayer, inputs: HiddenStates, targets: HiddenStates) -> float:
    """The mean relative squared error of a token on the validation sequences, of a resident layer as it is.

    Args:
        layer: the layer.
        inputs: as for `match_layer`.
        targets: likewise.
    """
    with layer.stream.stages("match"):
        return _Fit(layer, inputs, targets, Matching(), _widened(layer, ())).validate({})


@dataclass(slots=True)
class _Master:
    """A trained parameter: float32 values, and which of them may differ from zero (None: all)."""

    values: Tensor
    mask: Tensor | None
    dtype: torch.dtype
    stored: torch.dtype

    def rounded(self) -> Tensor:
        """As the layer is to have it, rounded as it will be stored; differentiable as if it were not rounded."""
        masked = self.values if self.mask is None else self.values * self.mask
        return masked + (masked.detach().to(self.stored).to(masked.dtype) - masked.detach())


class _Fit:
    """Trains one layer."""

    def __init__(
        self,
        layer: ResidentLayer,
        inputs: HiddenStates,
        targets: HiddenStates,
        options: Matching,
        widened: dict[str, Tensor] | None,
    ) -> None:
        self._layer, self._inputs, self._targets, self._options = layer, inputs, targets, options
        self._widened = widened
        self._ranks = layer.stream.settings.ranks
        self._training = list(range(layer.stream.statistics_batches))

    def run(self, masters: dict[str, _Master], before: float, watch: Callable[[str], None]) -> Matched:
        """Train until the validation error no longer falls; the best state is written into the layer."""
        best = before
        kept, best_epoch, epoch = {name: m.values.detach().clone() for name, m in masters.items()}, 0, 0
        optimiser = torch.optim.Adam([m.values for m in masters.values()], lr=self._options.lr)
        steps = self._options.epochs * len(self._groups(0))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _factor(step, steps))
        # A high learning rate first makes an error worse that ends much lower: what falls from epoch to epoch goes on,
        # even where it is not below that of the untrained layer yet.
        trained, waited = math.inf, 0
        for epoch in range(1, self._options.epochs + 1):
            watch(f"matching, epoch {epoch} of {self._options.epochs}")
            for group in self._groups(epoch):
                optimiser.zero_grad()
                self._accumulate(masters, group)
                self._share_gradients(masters)
                optimiser.step()
                schedule.step()
            error = self.validate(masters)
            if error < best:
                best, best_epoch = error, epoch
                for name, master in masters.items():
                    kept[name].copy_(master.values.detach())
            waited = 0 if error < trained or epoch <= _WARM_UP * self._options.epochs else waited + 1
            trained = min(trained, error)
            if waited >= _PATIENCE:
                break
        for name, master in masters.items():
            master.values.data.copy_(kept[name])
        self._write(masters)
        return Matched(before, best, epoch, best_epoch)

    def _groups(self, epoch: int) -> list[list[int]]:
        """The batches of each step of an epoch, in an order of its own."""
        generator = torch.Generator().manual_seed(self._options.seed + 7919 * self._layer.index + epoch)
        order = [self._training[place] for place in torch.randperm(len(self._training), generator=generator).tolist()]
        groups: list[list[int]] = [[]]
        for batch in order:
            if sum(len(self._layer.stream.batches[one]) for one in groups[-1]) >= self._options.sequences:
                groups.append([])
            groups[-1].append(batch)
        return groups

    def _accumulate(self, masters: dict[str, _Master], group: list[int]) -> None:
        """Add the gradients of one step's batches; each process those of its own, then everyone's."""
        total = sum(self._layer.stream.batches[batch].numel() for batch in group)
        for batch in (batch for batch in group if batch in self._layer.stream.own):
            with torch.enable_grad():
                loss = self._errors(masters, batch).sum() / total
                loss.backward()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NumericsError(
                    f"{self._layer.name}: the loss of block matching is {value}",
                    expected="a finite loss",
                    fix="lower reconstruct.lr, or set compute_dtype: float32",
                )

    def _share_gradients(self, masters: dict[str, _Master]) -> None:
        if self._ranks.size > 1:
            for master in masters.values():
                if master.values.grad is None:  # none of the batches were its own
                    master.values.grad = torch.zeros_like(master.values)
                self._ranks.total(master.values.grad)

    def validate(self, masters: dict[str, _Master]) -> float:
        """The mean error of a token on the validation sequences."""
        stream = self._layer.stream
        with torch.no_grad():
            own = sum(float(self._errors(masters, batch).double().sum()) for batch in stream.validation)
        tokens = sum(ids.numel() for ids in stream.batches[stream.statistics_batches :])
        return sum(self._ranks.gather(own)) / max(tokens, 1)

    def _errors(self, masters: dict[str, _Master], batch: int) -> Tensor:
        """||f(h) - T||^2 / ||T||^2 of each token, float32."""
        stream = self._layer.stream
        args, kwargs = stream.calls.get(self._layer.index, batch)
        hidden, target = (states[batch].to(stream.settings.device) for states in (self._inputs, self._targets))
        parameters = {name: master.rounded().to(master.dtype) for name, master in masters.items()}
        if self._widened is not None:
            hidden, args, kwargs = tree_map(_wider, (hidden, args, kwargs))
            parameters = {**self._widened, **parameters}
        output = tree_leaves(functional_call(self._layer.module, parameters, (hidden, *args), kwargs))[0]
        target = target.float()
        size = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        return (output.float() - target).square().sum(-1) / size

    def _write(self, masters: dict[str, _Master]) -> None:
        parameters = dict(self._layer.module.named_parameters())
        with torch.no_grad():
            for name, master in masters.items():
                parameters[name].copy_(master.rounded())
                self._layer.replaced.add(name)


def _masters(
    layer: ResidentLayer, pruned: Collection[str], train: Collection[Trained], among: Callable[[str], bool]
) -> dict[str, _Master]:
    """The parameters to train, by their names in the layer."""
    matrices = {layer.matrices[name].parameter for name in pruned}
    masters = {}
    for name, parameter in trained_parameters(layer, pruned, train):
        if not among(name):
            continue
        stored = layer.stream.source.stored_dtype(layer.index, name)
        values = parameter.detach().float().clone().requires_grad_()
        mask = parameter.detach() != 0 if name in matrices else None
        computed = torch.float32 if parameter.dtype == torch.float16 else parameter.dtype
        masters[name] = _Master(values, mask, computed, stored)
    return masters


def _widened(layer: ResidentLayer, masters: Collection[str]) -> dict[str, Tensor] | None:
    """What is not trained of a layer in float16, in float32; None for other layers."""
    state = [*layer.module.named_parameters(), *layer.module.named_buffers()]
    narrow = {name: tensor for name, tensor in state if tensor.dtype == torch.float16}
    return {name: _wider(tensor.detach()) for name, tensor in narrow.items() if name not in masters} if narrow else None


def _wider(value: Any) -> Any:
    """A tensor in float16 as float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


def trained_parameters(
    layer: ResidentLayer, pruned: Collection[str], train: Collection[Trained]
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters that fitting a layer trains, with their names in it; they may be on the meta device.

    Args:
        layer: the layer.
        pruned: the names of its pruned matrices.
        train: what is trained.
    """
    matrices = {layer.matrices[name].parameter for name in pruned}
    for name, parameter in layer.module.named_parameters():
        last = name.rpartition(".")[2]
        vector = parameter.dim() == 1
        if (
            ("weights" in train and name in matrices)
            or ("norms" in train and vector and last == "weight")
            or ("biases" in train and vector and last == "bias")
        ):
            yield name, parameter


def _factor(step: int, steps: int) -> float:
    """The learning rate's factor in a step, counted from 0."""
    rising = math.ceil(_WARM_UP * steps)
    if step < rising:
        return (step + 1) / rising
    return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * min((step - rising) / max(steps - rising, 1), 1.0))) / 2
