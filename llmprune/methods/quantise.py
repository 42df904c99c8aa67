"""Quantise the kept weights of a pruned matrix, each error compensated by the columns that follow.

The column loop of `sparsegpt` with a fixed mask: column k's present value w'_k = w_k + S_k / R_kk is rounded to a grid
instead of being kept, and its error E_k = w_k - q_k moves on (GPTQ, arXiv 2210.17323, in the factor that `sparsegpt`
uses). S is linear in E, so that quantising what SparseGPT returned is the same as rounding inside its own loop, the
joint sparsification and quantisation of SparseGPT (arXiv 2301.00774, section 3.5); and any other solver can come first.

A weight is q * t / m, with t the peak of its row in a group of columns and m = 127 or 7: the form of the int8 layouts
(`storage.formats.int8`). One weight of each group has |q| = m, so that the peak can be found from the weights.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmprune.errors import RecipeError
from llmprune.kernels.obs_sweep import run_columns
from llmprune.methods.method import matrix_workspace
from llmprune.precision import float32_products
from llmprune.statistics import Gram

Bits = Literal[8, 4]

# Columns whose peaks are chosen together, from values that have all earlier errors in them.
_STEP = 128

# Peaks of 4-bit weights, as shares of a group's largest magnitude: clipping a few weights rounds all others less.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@dataclass(frozen=True)
class Quantiser:
    """Rounds the kept weights of a pruned matrix.

    Attributes:
        bits: 8 (-127 to 127) or 4 (-7 to 7) for each weight.
        group: consecutive columns that share a peak in a row, >= 1; None: all of them.
        damping: added to the Gram's diagonal, as a fraction of its mean, >= 0.
    """

    bits: Bits = 8
    group: int | None = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise RecipeError(f"quantise.group is {self.group}", expected="a number of columns, >= 1, or row")

    @property
    def highest(self) -> int:
        """m, the largest integer."""
        return 127 if self.bits == 8 else 7

    def __call__(
        self, weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], gram: Gram, stored: torch.dtype
    ) -> Float[Tensor, "out in"]:
        """Quantise one matrix.

        Args:
            weight: [out, in], float32 or float64, pruned; not changed.
            mask: True where weights are kept.
            gram: collected on the matrix's inputs; not changed.
            stored: the dtype in which the matrix is stored; its peaks are exact in it.

        Returns:
            [out, in], the dtype of `weight`; values of the form above, exact in `stored`; zeros of the mask stay.

        Raises:
            NumericsError: the factorisation fails with every damping.
        """
        upper = gram.factor(self.damping).upper.to(weight.dtype)
        with float32_products("ieee"):
            return _Columns(weight, mask, upper, gram.squares == 0, self, stored).run().T.contiguous()

    def work(self, shape: tuple[int, int]) -> float:
        """2 out in^2, for the matmuls of the column updates."""
        rows, width = shape
        return 2.0 * rows * width**2

    def shared_work(self, width: int) -> float:
        """in^3 / 3, for one Cholesky factorisation."""
        return width**3 / 3

    def workspace(self, shape: tuple[int, int]) -> int:
        """The matrices, the sums, and the factor with temporary copies."""
        rows, width = shape
        return matrix_workspace(shape) + 8 * rows * width + 6 * width**2


class _Columns:
    """The operands of one pass over the columns, transposed: a column of W is contiguous."""

    def __init__(
        self, weight: Tensor, mask: Tensor, upper: Tensor, dead: Tensor, quantiser: Quantiser, stored: torch.dtype
    ) -> None:
        width = weight.shape[1]
        self._quantiser, self._stored, self._upper = quantiser, stored, upper
        # Dead inputs have a diagonal of 1, which no peak may be chosen for.
        self._importance = upper.diagonal().square().masked_fill(dead, 0)
        self._group = min(quantiser.group or width, max(width, 1))
        self._values, self._keep = weight.T.contiguous(), mask.T.contiguous()
        self._sums = torch.zeros_like(self._values)
        self._result = torch.empty_like(self._values)
        # Rows whose group is longer than a step get their peaks from the weights as they are.
        whole = self._group > 2 * _STEP
        self._fixed = self._peaks(0, width, self._values * self._keep) if whole else None

    def run(self) -> Tensor:
        """The quantised weights, [in, out]."""
        step = _STEP if self._fixed else max(1, _STEP // self._group) * self._group
        run_columns(self._sums, self._upper, step, self._decide)
        return self._result

    def _decide(self, low: int, high: int) -> None:
        part, values, keep = self._sums[low:high], self._values[low:high], self._keep[low:high]
        factor = self._upper[low:high, low:high]
        if self._fixed:
            peaks, tops = (whole[low:high] for whole in self._fixed)
        else:
            identity = torch.eye(high - low, dtype=factor.dtype, device=factor.device)
            inverse = torch.linalg.solve_triangular(factor, identity, upper=True)
            peaks, tops = self._peaks(low, high, torch.addmm(values, inverse.T, part) * keep)
        scales = (1 / factor.diagonal()).tolist()
        coefficients = factor.T.contiguous()
        for k in range(high - low):
            present = values[k] + torch.addmv(part[k], part[:k].T, coefficients[k, :k]) * scales[k]
            rounded = self._rounded(present, peaks[k], tops[k]) * keep[k]
            self._result[low + k] = rounded
            torch.sub(values[k], rounded, out=part[k])

    def _peaks(self, low: int, high: int, present: Tensor) -> tuple[Tensor, Tensor]:
        """The peak of each weight's group, and the sign of the weight that has it; 0 for all others."""
        peaks, tops = torch.empty_like(present), torch.zeros_like(present)
        for start in range(0, high - low, self._group):
            group = present[start : start + self._group]
            largest, place = group.abs().max(0)
            importance = self._importance[low + start : low + start + len(group)]
            peak = self._clipped(group, largest, importance).to(self._stored).to(present.dtype)
            peaks[start : start + self._group] = peak
            signs = group.gather(0, place[None]).sign()
            tops[start : start + self._group].scatter_(0, place[None], signs)
        return peaks, tops

    def _clipped(self, group: Tensor, largest: Tensor, importance: Tensor) -> Tensor:
        """The share of the largest magnitude that rounds the weights of a group best."""
        if self._quantiser.bits == 8:
            return largest
        best, least = largest, torch.full_like(largest, float("inf"))
        for share in _SHARES:
            peak = largest * share
            errors = (group - _on_grid(group, peak, self._quantiser.highest)).square_().mul_(importance[:, None])
            total = errors.sum(0)
            best, least = torch.where(total < least, peak, best), torch.minimum(total, least)
        return best

    def _rounded(self, values: Tensor, peaks: Tensor, tops: Tensor) -> Tensor:
        highest = self._quantiser.highest
        numbers = torch.where(tops != 0, tops * highest, _numbers(values, peaks, highest))
        exact = (
            numbers.double() * peaks.double() / highest
            if self._stored == torch.float32
            else numbers * (peaks / highest)
        )
        return exact.to(self._stored).to(values.dtype)


def _numbers(values: Tensor, peaks: Tensor, highest: int) -> Tensor:
    shares = values * highest / torch.where(peaks > 0, peaks, 1.0)
    return shares.round_().clamp_(-highest, highest)


def _on_grid(values: Tensor, peaks: Tensor, highest: int) -> Tensor:
    return _numbers(values, peaks, highest) * (peaks / highest)
