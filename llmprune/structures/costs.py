"""What a decoder layer costs, and what each structure of it costs once some of its groups have gone.

Three units, each a function of a layer's weights:

* `parameters`: elements of all parameters;
* `flops`: of one token's products with matrices, two for each element; of routed experts only the share that a token
  reaches. Products of activations with each other, as in attention, depend on the context and are left out;
* `Latency`: seconds that the products with matrices take on a device, measured.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from llmprune.decoder import prunable_matrices
from llmprune.errors import PatternError, RecipeError
from llmprune.repeats import Effort, time_calls
from llmprune.structures.discovery import Structure
from llmprune.structures.removal import Cut, removed_indices

# Widths that are measured; the ones between are interpolated.
_POINTS = 6


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of a decoder layer, as far as its cost depends on it.

    Attributes:
        shape: of the parameter.
        matrices: how many matrices lie in it, one for each routed expert; 1 for ordinary ones.
        share: the fraction of all tokens that each of them multiplies, in (0, 1].
    """

    shape: tuple[int, ...]
    matrices: int = 1
    share: float = 1.0

    @property
    def elements(self) -> int:
        """Numbers in the parameter."""
        return math.prod(self.shape)

    @property
    def product(self) -> tuple[int, int] | None:
        """The sizes of one of its matrices; None for biases, gains and convolutions."""
        if len(self.shape) == 2:
            return self.shape[0] // self.matrices, self.shape[1]
        return (self.shape[1], self.shape[2]) if len(self.shape) == 3 and self.matrices > 1 else None


Cost = Callable[[Iterable[Weight]], float]


def parameters(weights: Iterable[Weight]) -> float:
    """Count the elements of the parameters."""
    return float(sum(weight.elements for weight in weights))


def flops(weights: Iterable[Weight]) -> float:
    """Count the floating-point operations of one token's products with the matrices."""
    return sum(2.0 * weight.share * weight.elements for weight in weights if len(weight.shape) > 1)


@dataclass(slots=True)
class Latency:
    """Seconds of one device's products, each shape measured once: the median of repeats on random numbers.

    The copies of a matrix that are multiplied in turn are together larger than the last cache, as a model's layers are.

    Attributes:
        device: where the products run.
        dtype: of weights and activations.
        tokens: rows of the activations: 1 for decode, a prompt's length for prefill.
        seconds: how long each shape is repeated, at least.
        measured: (rows, outputs, inputs) -> seconds.

    Raises:
        RecipeError: tokens or seconds are not positive.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: int = 1
    seconds: float = 0.1
    measured: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokens < 1 or not self.seconds > 0:
            raise RecipeError(
                f"latency of {self.tokens} tokens, measured for {self.seconds} seconds",
                expected="at least one token, and seconds > 0",
            )

    def __call__(self, weights: Iterable[Weight]) -> float:
        """Add up the seconds of the products; an expert's with the rows that come to it on average."""
        total = 0.0
        for weight in weights:
            if weight.product is not None:
                rows = weight.share * self.tokens
                used = weight.matrices * min(rows, 1.0)
                total += used * self._product(max(round(rows), 1), *weight.product)
        return total

    def _product(self, rows: int, outputs: int, inputs: int) -> float:
        key = rows, outputs, inputs
        if key not in self.measured:
            self.measured[key] = self._measure(*key)
        return self.measured[key]

    def _measure(self, rows: int, outputs: int, inputs: int) -> float:
        x = torch.randn(rows, inputs, device=self.device).to(self.dtype)
        matrix = torch.randn(outputs, inputs, device=self.device).to(self.dtype)
        copies = [matrix.clone() for _ in range(Effort().copies(matrix.nbytes, self.device))]
        calls = [lambda copy=copy: F.linear(x, copy) for copy in copies]
        return time_calls(calls, self.device, self.seconds).median


COUNTS: dict[str, Cost] = {"parameters": parameters, "flops": flops}


def layer_size(layer: nn.Module, cost: Cost, active: float = 1.0) -> float:
    """What a whole decoder layer costs.

    Args:
        layer: the layer; meta tensors suffice.
        cost: `parameters`, `flops` or a `Latency`.
        active: the fraction of the routed experts that a token reaches, in (0, 1].
    """
    return cost(_weights(layer, active).values())


def level_sizes(
    layer: nn.Module, structure: Structure, levels: Sequence[int], cost: Cost, active: float = 1.0
) -> list[float]:
    """What the weights that a structure has a part in cost at each level.

    Weights that shrink with the structure are counted whole, so that the difference of two levels is what a layer
    saves. Saved buffers are no parameters and cost nothing.

    Args:
        layer: the layer at full size; meta tensors suffice.
        structure: one of its structures that is not refused.
        levels: numbers of groups that go, each in [0, structure.groups).
        cost: `parameters`, `flops` or a `Latency`, which is measured at six of the levels at most; those between are
            interpolated linearly.
        active: the fraction of the routed experts that a token reaches, in (0, 1].

    Raises:
        ModelError: the structure is refused.
        PatternError: a level is out of range.
    """
    if not levels or not 0 <= min(levels) <= max(levels) < structure.groups:
        raise PatternError(
            f"levels {list(levels)[:8]} of {structure.consumer}", expected=f"numbers below its {structure.groups}"
        )
    weights = _weights(layer, active)
    if not isinstance(cost, Latency):
        return [cost(_at_level(weights, structure, level)) for level in levels]
    ranked = sorted(set(levels))
    chosen = {ranked[round(place * (len(ranked) - 1) / (_POINTS - 1))] for place in range(_POINTS)}
    known = {level: cost(_at_level(weights, structure, level)) for level in sorted(chosen)}
    return [_interpolated(known, level) for level in levels]


def _weights(layer: nn.Module, active: float) -> dict[str, Weight]:
    """The parameters of a layer."""
    if not 0 < active <= 1:
        raise RecipeError(f"active is {active}", expected="the fraction of the experts that a token reaches, in (0, 1]")
    weights = {name: Weight(tuple(parameter.shape)) for name, parameter in layer.named_parameters()}
    for matrix in prunable_matrices(layer, ""):
        # Blocks of a block-diagonal matrix lie in one parameter too, but meet every token.
        owner = layer.get_submodule(matrix.parameter.rpartition(".")[0])
        routed = matrix.kind is not None and "expert" in f"{matrix.name} {type(owner).__name__}".lower()
        weight = weights[matrix.parameter]
        weights[matrix.parameter] = replace(weight, matrices=matrix.experts, share=active if routed else 1.0)
    return weights


def _at_level(weights: dict[str, Weight], structure: Structure, level: int) -> list[Weight]:
    """The weights that the structure has a part in, without so many of its groups."""
    # Groups are disjoint and have equal shares, so one of them tells the size of all.
    gone = removed_indices([Cut(structure, (0,))])
    shapes = {name: list(weights[name].shape) for name, _ in gone if name in weights}
    for (name, dim), indices in gone.items():
        if name in shapes:
            shapes[name][dim] -= level * len(indices)
    smaller = [replace(weights[name], shape=tuple(shape)) for name, shape in shapes.items()]
    return [_fewer_experts(weight, level) for weight in smaller] if structure.kind == "experts" else smaller


def _fewer_experts(weight: Weight, level: int) -> Weight:
    """A token reaches as many experts as before, so each of those that stay gets more tokens."""
    if weight.matrices == 1:
        return weight
    kept = weight.matrices - level
    return replace(weight, matrices=kept, share=min(weight.share * weight.matrices / kept, 1.0))


def _interpolated(known: dict[int, float], level: int) -> float:
    below = max(point for point in known if point <= level)
    above = min(point for point in known if point >= level)
    part = (level - below) / (above - below) if above > below else 0.0
    return known[below] + part * (known[above] - known[below])
