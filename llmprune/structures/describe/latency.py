"""What each structure of a decoder layer costs once some of its groups are removed, in any of three units.

Two are counted (`models.sizes`: parameters and FLOPs); the third, `Latency`, is measured on a device.
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

# Widths that are measured; the ones between are interpolated.
_POINTS = 6


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
    weights = layer_weights(layer, active)
    if not isinstance(cost, Latency):
        return [cost(_at_level(weights, structure, level)) for level in levels]
    ranked = sorted(set(levels))
    chosen = {ranked[round(place * (len(ranked) - 1) / (_POINTS - 1))] for place in range(_POINTS)}
    known = {level: cost(_at_level(weights, structure, level)) for level in sorted(chosen)}
    return [_interpolated(known, level) for level in levels]


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
