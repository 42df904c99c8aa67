"""Swaps: exchange a kept weight for a removed one while the loss falls, many rows at once.

The exact change of the loss by a swap is known in closed form (SparseSwaps). Here it is extended to
weights that have been updated, and the restored weight gets its best value instead of its dense one: with d = w - v the
error of a row and c = G d, removing weight i and restoring weight j with the value x changes the loss d G d^T by

    2 v_i c_i + v_i^2 G_ii - 2 x (c_j + v_i G_ij) + x^2 G_jj,    smallest for x = (c_j + v_i G_ij) / G_jj.

Weights of inputs that are always zero do nothing: removing one costs nothing, and none is restored.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from llmprune.errors import RecipeError
from llmprune.methods.method import Pruned, matrix_workspace
from llmprune.patterns import NM, Block, Pattern, lowest
from llmprune.precision import float32_products
from llmprune.statistics import Gram, damped

# Weights to remove and to restore that are tried with one another in each row.
_CANDIDATES = 32
# Bytes of workspace for the pairs that are tried at a time.
_CHUNK_BYTES = 2**27
# A swap must lower the loss by more than this share of it: below, rounding decides.
_LEAST_GAIN = 1e-6


@dataclass(frozen=True)
class Swaps:
    """Swap kept and removed weights within each row (N:M: within a group of a row), one swap a row a sweep.

    Attributes:
        sweeps: at most, >= 1; it ends when no row gains.
        damping: added to the Gram's diagonal, as a fraction of its mean, >= 0.
    """

    sweeps: int = 100
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise RecipeError(f"swaps.sweeps is {self.sweeps}", expected="a number of sweeps, >= 1")
        if not self.damping >= 0:
            raise RecipeError(f"swaps.damping is {self.damping}", expected="a fraction of the mean diagonal, >= 0")

    def __call__(self, weight: Float[Tensor, "out in"], gram: Gram, pattern: Pattern, pruned: Pruned) -> Pruned:
        """Swap until no row gains; the number of zeros in each row (N:M: group) stays."""
        matrix = damped(gram, self.damping).to(weight.dtype)
        dead = gram.squares == 0
        mask = pruned.mask.clone(memory_format=torch.contiguous_format)
        # The diagonal of 1 that a dead input has would price its weights; without them, there is nothing to price.
        weight, values = weight.masked_fill(dead, 0), pruned.weight.masked_fill(dead, 0)
        size = pattern.of if isinstance(pattern, NM) else None
        width = weight.shape[1]
        pairs = width * size if size else _CANDIDATES**2
        rows = max(_CHUNK_BYTES // (16 * (pairs + 8 * width)), 1)
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            _improve(weight[part], values[part], mask[part], matrix, dead, size, self.sweeps)
        return replace(pruned, weight=pruned.weight.where(dead & mask, values), mask=mask)

    def refuses(self, pattern: Pattern) -> str:
        """Blocks would have to be swapped as a whole."""
        return "it swaps single weights, and blocks consist of many" if isinstance(pattern, Block) else ""

    def work(self, shape: tuple[int, int]) -> float:
        """One product; the sweeps are elementwise work and selection."""
        rows, width = shape
        return 2.0 * rows * width**2

    def workspace(self, shape: tuple[int, int]) -> int:
        """The matrices, the damped Gram, and the pairs of the rows at hand."""
        return matrix_workspace(shape) + 4 * shape[1] ** 2 + 2 * _CHUNK_BYTES


def _improve(
    weight: Tensor, values: Tensor, mask: Tensor, gram: Tensor, dead: Tensor, size: int | None, sweeps: int
) -> None:
    """Swap in these rows, in place; weights of dead inputs are zero in both."""
    with float32_products("ieee"):
        slopes = (weight - values) @ gram
    diagonal = gram.diagonal()
    active = torch.arange(len(weight), device=weight.device)
    for _ in range(sweeps):
        present, slope, kept = values[active], slopes[active], mask[active]
        costs = (2 * present * slope + present.square() * diagonal).masked_fill(~kept, torch.inf)
        gains = (-slope.square() / diagonal).masked_fill(kept | dead, torch.inf)
        change, out, back = _best_pairs(costs, gains, present, slope, gram, size)
        loss = ((weight[active] - present) * slope).sum(1)
        better = change < -_LEAST_GAIN * loss
        active, out, back = active[better], out[better], back[better]
        if not len(active):
            break
        removed = values[active, out]
        restored = (slopes[active, back] + removed * gram[out, back]) / diagonal[back]
        values[active, out], values[active, back] = 0.0, restored
        mask[active, out], mask[active, back] = False, True
        slopes[active] += removed[:, None] * gram[out] - restored[:, None] * gram[back]


def _best_pairs(
    costs: Tensor, gains: Tensor, values: Tensor, slopes: Tensor, gram: Tensor, size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row: the change of its best swap, the weight that it removes, and the one that it restores."""
    rows, width = costs.shape
    if size is None:
        count = min(_CANDIDATES, width)
        out, back = (lowest(scores, count).view(rows, 1, count) for scores in (costs, gains))
    else:
        out = back = torch.arange(width, device=costs.device).view(1, -1, size).expand(rows, -1, -1)

    def at(whole: Tensor, places: Tensor) -> Tensor:
        return whole.gather(1, places.flatten(1)).view(places.shape)

    both = gram[out[..., :, None], back[..., None, :]]
    cross = at(slopes, back)[..., None, :] + at(values, out)[..., :, None] * both
    cost, gain = at(costs, out)[..., :, None], at(gains, back)[..., None, :]
    changes = cost - cross.square() / gram.diagonal()[back][..., None, :]
    impossible = torch.isinf(cost) | torch.isinf(gain)
    change, place = changes.masked_fill(impossible, torch.inf).view(rows, -1).min(1)
    group, row, column = torch.unravel_index(place, changes.shape[1:])
    own = torch.arange(rows, device=costs.device)
    return change, out[own, group, row], back[own, group, column]
