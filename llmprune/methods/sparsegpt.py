"""SparseGPT: one pass over the columns, each error compensated by the columns that follow (arXiv 2301.00774).

The paper inverts the damped Gram G and updates the remaining columns by rows of U, the upper Cholesky factor of G^-1.
With G = R R^T, R upper triangular, U is R^-1, so the same column updates can use R directly, without any inverse.
Writing E = W - Q for the error made so far, F for the finished columns and B for the next ones,

    S_B = E_F R_FB                        the correction that the finished columns require of the next ones,
    W'_B = W_B + S_B R_BB^-1              their current values, from which the mask is chosen,
    w'_k = w_k + (S_k + E_B R_Bk) / R_kk  the value of column k when it is reached, at a cost of R_kk^2 (w'_k - q_k)^2.

(GPTQ and LDLQ are related in the same way: QuIP, arXiv 2307.13304, theorem 6.) The factorisation takes a third of
the arithmetic, and the error never passes through an ill-conditioned inverse.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from llmprune.errors import RecipeError
from llmprune.kernels.obs_sweep import run_columns, sweep_block
from llmprune.methods.method import Pruned, matrix_workspace
from llmprune.patterns import NM, Block, Pattern, Scope
from llmprune.precision import float32_products
from llmprune.statistics import ColumnNorm, Gram, check_finite


@dataclass(frozen=True)
class SparseGPT:
    """Prune by the optimal brain surgeon (OBS) score and update the remaining weights.

    Attributes:
        damping: added to the Gram's diagonal, as a fraction of its mean, >= 0; increased to 0.01, 0.1, 1 if the
            factorisation fails, as the report shows.
        block_size: columns whose unstructured mask is chosen together, >= 1 (the paper's 128). N:M groups are chosen
            one by one, from up-to-date columns; blocks are all chosen before the first column update.
    """

    damping: float = 0.01
    block_size: int = 128
    needs: ClassVar[type[Gram]] = Gram
    scope: ClassVar[Scope] = "matrix"

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise RecipeError(f"sparsegpt.damping is {self.damping}", expected="a fraction of the mean diagonal, >= 0")
        if self.block_size < 1:
            raise RecipeError(f"sparsegpt.block_size is {self.block_size}", expected="a number of columns, >= 1")

    def refuses(self, pattern: Pattern) -> str:
        """Nothing: every pattern will do."""
        return ""

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """w^2 R_kk^2: the error of removing one weight when all later columns adjust (the paper's w^2 / U_kk^2)."""
        assert isinstance(statistics, Gram), "SparseGPT needs the inputs' Gram matrix"
        return removal_scores(weight, statistics, self.damping)

    def __call__(
        self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None, pattern: Pattern
    ) -> Pruned:
        """Process the columns from left to right; rows are independent given the mask."""
        assert isinstance(statistics, Gram), "SparseGPT needs the inputs' Gram matrix"
        rows, width = weight.shape
        pattern.check((rows, width))
        check_finite(weight, "the weight")
        pattern = pattern.compared(self.scope)
        factor = statistics.factor(self.damping)
        importance = _importance(statistics, self.damping).to(weight.dtype)
        columns = _Columns(weight, factor.upper.to(weight.dtype), importance, pattern)
        step = -(-self.block_size // pattern.column_multiple) * pattern.column_multiple
        with float32_products("ieee"):
            values, keep = columns.run(step)
        del columns  # frees its sums before the result is transposed
        return Pruned(values.T.contiguous(), keep.T, factor.damping, factor.tried)

    def work(self, shape: tuple[int, int], pattern: Pattern) -> float:
        """2 out in^2, for the matmuls of the column updates."""
        rows, width = shape
        return float(2 * rows * width**2)

    def shared_work(self, width: int) -> float:
        """in^3 / 3, for one Cholesky factorisation."""
        return width**3 / 3

    def workspace(self, shape: tuple[int, int]) -> int:
        """The matrices plus 6 in^2 bytes: the damped Gram, overwritten by its factor, and temporary copies."""
        return matrix_workspace(shape) + 6 * shape[1] ** 2


class _Columns:
    """The operands of one pass over the columns. All are transposed, so that a column of W is contiguous."""

    def __init__(self, weight: Tensor, upper: Tensor, importance: Tensor, pattern: Pattern) -> None:
        self._upper, self._importance, self._pattern = upper, importance, pattern
        self._group = (pattern.keep, pattern.of) if isinstance(pattern, NM) else None
        # The error of removing a block of weights depends on all of its columns, so a block of columns cannot choose.
        self._fixed = isinstance(pattern, Block)
        self._values = weight.T.clone(memory_format=torch.contiguous_format)
        if self._fixed:
            self._keep = pattern.mask(weight.square() * importance).T.contiguous()
        else:
            self._keep = torch.empty_like(self._values, dtype=torch.bool)
        # S; for finished columns, E.
        self._sums = torch.zeros_like(self._values)

    def run(self, step: int) -> tuple[Tensor, Tensor]:
        """Process the columns, `step` at a time; returns the pruned weights and the mask, both [in, out]."""
        run_columns(self._sums, self._upper, step, self._decide)
        return self._values, self._keep

    def _decide(self, start: int, stop: int) -> None:
        """Choose the mask of the columns start:stop, and update them, as one block."""
        factor, importance = self._upper[start:stop, start:stop], self._importance[start:stop]
        sums, values, keep = (whole[start:stop] for whole in (self._sums, self._values, self._keep))
        if self._group is None and not self._fixed:
            # Only the mask depends on this inverse; the weights do not.
            present = torch.addmm(values, _inverse(factor).T, sums)
            scores = present.square_().mul_(importance[:, None]).T
            keep.copy_(self._pattern.mask(scores, start=start).T)
        sweep_block(sums, values, factor, importance, keep, self._group)
        values -= sums


def removal_scores(weight: Float[Tensor, "out in"], statistics: Gram, damping: float) -> Float[Tensor, "out in"]:
    """w^2 R_kk^2: the error of removing one weight when all later columns adjust (the paper's w^2 / U_kk^2)."""
    return weight.square() * _importance(statistics, damping).to(weight.dtype)


def _inverse(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix; multiplying by it is several times faster than a triangular solve."""
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def _importance(statistics: Gram, damping: float) -> Tensor:
    """R_kk^2; zero for a dead input, which contributes nothing, so that its weights are removed first."""
    return statistics.factor(damping).upper.diagonal().square().masked_fill(statistics.squares == 0, 0)
