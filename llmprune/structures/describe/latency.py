"""The cost of each structure of a decoder layer after removing some of its groups, in one of three units.

Parameters and FLOPs are counted (`models.sizes`); `Latency` is measured on a device.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from llmprune.errors import PatternError, RecipeError
from llmprune.models.sizes import Cost, Weight, layer_weights
from llmprune.structures.find.discovery import Structure
from llmprune.structures.remove.cuts import Cut, removed_indices
from llmprune.timing import Effort, time_calls

# Number of widths that are measured; those in between are interpolated.
_POINTS = 6


@dataclass(slots=True)
class Latency:
    """Latency of matmuls on one device; each shape is measured once, as the median of repeats on random numbers.

    The calls rotate through copies of the matrix that together exceed the last-level cache, as a model's layers do.

    Attributes:
        device: where the matmuls run.
        dtype: of weights and activations.
        tokens: rows of the activations: 1 for decode, the prompt length for prefill.
        seconds: minimum time for which each shape is repeated.
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
        """Sum the seconds of the matmuls; each expert is measured with its average number of rows."""
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


def level_sizes(
    layer: nn.Module, structure: Structure, levels: Sequence[int], cost: Cost, active: float = 1.0
) -> list[float]:
    """The cost, at each level, of the weights that shrink with a structure.

    These weights are counted whole, so the difference between two levels is what the layer saves. Saved buffers are not
    parameters and cost nothing.

    Args:
        layer: the layer at full size; meta tensors suffice.
        structure: one of its structures that is not refused.
        levels: numbers of removed groups, each in [0, structure.groups).
        cost: `parameters`, `flops` or a `Latency`, which is measured at no more than six levels and interpolated
            linearly in between.
        active: the fraction of the routed experts that a token reaches, in (0, 1].

    Raises:
        ModelError: the structure is refused.
        PatternError: a level is out of range.
    """
    if not levels or not 0 <= min(levels) <= max(levels) < structure.groups:
        raise PatternError(
            f"levels {list(levels)[:8]} of {structure.consumer}", expected=f"numbers below {structure.groups}"
        )
    weights = layer_weights(layer, active)
    if not isinstance(cost, Latency):
        return [cost(_at_level(weights, structure, level)) for level in levels]
    ranked = sorted(set(levels))
    chosen = {ranked[round(place * (len(ranked) - 1) / (_POINTS - 1))] for place in range(_POINTS)}
    known = {level: cost(_at_level(weights, structure, level)) for level in sorted(chosen)}
    return [_interpolated(known, level) for level in levels]


def _at_level(weights: dict[str, Weight], structure: Structure, level: int) -> list[Weight]:
    """The weights that shrink with the structure, without `level` of its groups."""
    # Groups are disjoint and equally large, so the size of one gives the size of all.
    gone = removed_indices([Cut(structure, (0,))])
    shapes = {name: list(weights[name].shape) for name, _ in gone if name in weights}
    for (name, dim), indices in gone.items():
        if name in shapes:
            shapes[name][dim] -= level * len(indices)
    smaller = [replace(weights[name], shape=tuple(shape)) for name, shape in shapes.items()]
    return [_fewer_experts(weight, level) for weight in smaller] if structure.kind == "experts" else smaller


def _fewer_experts(weight: Weight, level: int) -> Weight:
    """The number of experts per token is unchanged, so each kept expert receives more tokens."""
    if weight.matrices == 1:
        return weight
    kept = weight.matrices - level
    return replace(weight, matrices=kept, share=min(weight.share * weight.matrices / kept, 1.0))


def _interpolated(known: dict[int, float], level: int) -> float:
    below = max(point for point in known if point <= level)
    above = min(point for point in known if point >= level)
    part = (level - below) / (above - below) if above > below else 0.0
    return known[below] + part * (known[above] - known[below])
