"""One matrix from which groups of input columns are removed: validation, damping and refit."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmprune.errors import NumericsError, PatternError, RecipeError
from llmprune.precision import float32_products
from llmprune.statistics import check_finite, damping_ladder
from llmprune.structures.remove.block_matrices import Breakdown, factor, loss


@dataclass(frozen=True, slots=True)
class RemovalSettings:
    """How groups are removed.

    Attributes:
        damping: fraction of the mean diagonal of the Hessian (Gram matrix) added to its diagonal, >= 0; increased to
            0.01, 0.1, 1 if the factorisation or a pivot fails, which the result records.
        swaps: the most swaps of a removed and a kept group after the greedy search, >= 0. Each is the best of all pairs
            and lowers the loss; the search ends at a local optimum.
        partitions: number of consecutive runs of groups, of equal length, that lose the same number of groups, >= 1
            (query heads of the same KV head).
        refit: set the kept columns to their least-squares values; otherwise they are unchanged.
    """

    damping: float = 0.01
    swaps: int = 32
    partitions: int = 1
    refit: bool = True

    def __post_init__(self) -> None:
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise RecipeError(f"damping is {self.damping}", expected="a fraction of the mean diagonal, >= 0")
        if self.swaps < 0 or self.partitions < 1:
            raise RecipeError(
                f"swaps: {self.swaps}, partitions: {self.partitions}", expected="swaps >= 0, partitions >= 1"
            )


@dataclass(frozen=True, slots=True)
class GroupRemoval:
    """The result of removing groups from one matrix.

    Attributes:
        removed: [groups removed], int64, ascending.
        weight: [out, in], the dtype of the input; zero in the removed groups.
        error: relative output error tr((W - V) G (W - V)^T) / tr(W G W^T), without damping, >= 0.
        curve: [groups removed + 1], float64: the loss after the first k removals of the greedy search, everything else
            refitted, over tr(W G W^T). Only multiples of `partitions` are complete. It includes the damping but not the
            swaps; empty if the groups were given.
        damping: the damping used.
        tried: every damping tried, in order.
        swaps: number of swaps made.
        seconds: wall-clock time.
    """

    removed: Int[Tensor, " removed"]
    weight: Float[Tensor, "out in"]
    error: float
    curve: Float[Tensor, " levels"]
    damping: float
    tried: tuple[float, ...]
    swaps: int
    seconds: float


class Problem:
    """One validated matrix and its Hessian (Gram matrix), with what every search needs."""

    def __init__(self, weight: Tensor, gram: Tensor, group_size: int, settings: RemovalSettings) -> None:
        width = weight.shape[1]
        if group_size < 1 or width % group_size:
            raise PatternError(
                f"groups of {group_size} columns in a matrix of {weight.shape[0]} x {width} (out x in)",
                expected="a group size that divides the input dimension",
            )
        check_finite(weight, "the weight")
        check_finite(gram, "the Hessian (Gram matrix) of the inputs")
        self.weight, self.gram, self.size, self.settings = weight.to(gram.dtype), gram, group_size, settings
        self.dtype, self.groups, self.started = weight.dtype, width // group_size, time.perf_counter()
        self.dead = gram.diagonal() == 0
        self.energy = loss(self.weight, gram)

    def damped(self, fraction: float) -> Tensor:
        """A copy of the Hessian with damping added to its diagonal; 1 for dead inputs."""
        damped = self.gram.clone()
        damped.diagonal().add_(fraction * float(self.gram.diagonal().mean()))
        damped.diagonal().masked_fill_(self.dead, 1.0)
        return damped

    def columns(self, groups: Tensor) -> Tensor:
        """Column indices of the groups in a mask."""
        return groups.repeat_interleave(self.size).nonzero().view(-1)

    def solve(self, search: Callable[[float], tuple[Tensor, list[float], int]]) -> GroupRemoval:
        """Choose by `search` and refit, at the lowest damping of the ladder that succeeds."""
        tried: list[float] = []
        for fraction in damping_ladder(self.settings.damping):
            tried.append(fraction)
            try:
                with float32_products("ieee"):
                    removed, costs, swaps = search(fraction)
                    return self._result(removed, costs, swaps, tuple(tried))
            except Breakdown:
                continue
        diagonal = self.gram.diagonal()
        raise NumericsError(
            f"a Hessian (Gram matrix) of width {len(diagonal)} is not positive definite at damping {tried} "
            f"(diagonal from {float(diagonal.min()):.3e} to {float(diagonal.max()):.3e})",
            expected="a finite, symmetric matrix",
            fix="check the calibration text and the model's activations, or choose groups by a score instead of obs",
        )

    def _result(self, removed: Tensor, costs: list[float], swaps: int, tried: tuple[float, ...]) -> GroupRemoval:
        kept = self.columns(~removed)
        fitted = torch.zeros_like(self.weight)
        fitted[:, kept] = self._refitted(removed, tried[-1]) if self.settings.refit else self.weight[:, kept]
        scale = 1 / self.energy if self.energy > 0 else 0.0
        steps = torch.tensor([0.0, *costs] if costs or not removed.any() else [], dtype=torch.float64)
        return GroupRemoval(
            removed=removed.nonzero().view(-1),
            weight=fitted.to(self.dtype),
            error=max(loss(self.weight - fitted, self.gram) * scale, 0.0),
            curve=steps.cumsum(0) * scale,
            damping=tried[-1],
            tried=tried,
            swaps=swaps,
            seconds=time.perf_counter() - self.started,
        )

    def _refitted(self, removed: Tensor, fraction: float) -> Tensor:
        """W_S + W_R H_RS (H_SS)^-1: solving for the change alone loses less to rounding."""
        kept, gone = self.columns(~removed), self.columns(removed)
        fitted = self.weight[:, kept]
        if len(kept) and len(gone):
            damped = self.damped(fraction)
            lower = factor(damped[kept][:, kept])
            fitted += self.weight[:, gone] @ torch.cholesky_solve(damped[kept][:, gone], lower).T
        return fitted
