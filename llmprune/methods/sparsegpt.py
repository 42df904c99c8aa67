"""SparseGPT: one sweep over the columns, each error passed on to the columns still to come (arXiv 2301.00774).

The paper inverts the damped Gram G and updates the remaining columns by rows of U, the upper Cholesky factor of G^-1.
With G = R R^T, R upper triangular, U is R^-1, so the same sweep reads off R itself and nothing has to be inverted.
Writing E = W - Q for the error made so far, F for the columns done and B for the next ones,

    S_B = E_F R_FB                        what the columns done ask of the next ones,
    W'_B = W_B + S_B R_BB^-1              their present values, from which the mask is chosen,
    w'_k = w_k + (S_k + E_B R_Bk) / R_kk  the value of column k when its turn comes, at a cost of R_kk^2 (w'_k - q_k)^2.

(GPTQ and LDLQ are related in the same way: QuIP, arXiv 2307.13304, theorem 6.) That is a third of the factorisation's
arithmetic, and the error never passes through an ill-conditioned inverse.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from llmprune.errors import RecipeError
from llmprune.kernels.obs_sweep import sweep_block
from llmprune.methods.method import Pruned
from llmprune.patterns import NM, Pattern, Scope
from llmprune.precision import float32_products
from llmprune.statistics import ColumnNorm, Gram, check_finite


@dataclass(frozen=True)
class SparseGPT:
    """Prune by the optimal-brain-surgeon score and update the weights that remain.

    Attributes:
        damping: added to the Gram's diagonal, as a fraction of its mean, >= 0; raised to 0.01, 0.1, 1 where the
            factorisation fails, which the report shows.
        block_size: columns whose unstructured mask is chosen together, >= 1 (the paper's 128). N:M groups are decided
            one by one, from columns that are up to date.
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

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """w^2 R_kk^2: the error of removing one weight, all later columns adjusting (the paper's w^2 / U_kk^2)."""
        assert isinstance(statistics, Gram), "SparseGPT needs the inputs' Gram matrix"
        importance = statistics.factor(self.damping).lower.diagonal().square().flip(0)
        return weight.square() * importance.masked_fill(statistics.squares == 0, 0).to(weight.dtype)

    def __call__(
        self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None, pattern: Pattern
    ) -> Pruned:
        """Sweep the columns from left to right; rows are independent given the mask."""
        assert isinstance(statistics, Gram), "SparseGPT needs the inputs' Gram matrix"
        rows, width = weight.shape
        pattern.check((rows, width))
        check_finite(weight, "the weight")
        factor = statistics.factor(self.damping)
        sweep = _Sweep(weight, factor.lower.to(weight.dtype), statistics.squares == 0, pattern.compared(self.scope))
        with float32_products("ieee"):
            for start, stop in _blocks(pattern, self.block_size, width):
                sweep.decide(start, stop)
        return Pruned(sweep.result(), sweep.mask, factor.damping, factor.tried)


class _Sweep:
    """The state of one sweep: transposed ([in, out], so that a column of W is contiguous), columns in reverse order."""

    def __init__(self, weight: Tensor, lower: Tensor, dead: Tensor, pattern: Pattern) -> None:
        self.width = weight.shape[1]
        self.columns = weight.T.flip(0).contiguous()
        self.errors = torch.empty_like(self.columns)
        self.mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        self.lower, self.pattern = lower, pattern
        # A dead input contributes nothing, so its weights go first.
        self.importance = lower.diagonal().square().masked_fill(dead.flip(0), 0)

    def decide(self, start: int, stop: int) -> None:
        """Decide the columns start:stop (in natural order) as one block."""
        low, high = self.width - stop, self.width - start
        asked = self.lower[high:, low:high].T @ self.errors[high:]
        factor, original = self.lower[low:high, low:high], self.columns[low:high]
        group = (self.pattern.keep, self.pattern.of) if isinstance(self.pattern, NM) else None
        if group is None:
            self.mask[:, start:stop] = self._choose(asked, low, high)
        keep = self.mask[:, start:stop].T.flip(0)
        errors, keep = sweep_block(asked, original, factor, self.importance[low:high], keep, group)
        self.errors[low:high] = errors
        self.mask[:, start:stop] = keep.flip(0).T

    def result(self) -> Tensor:
        """The pruned matrix [out, in]."""
        weight = (self.columns - self.errors).flip(0).T
        return weight.where(self.mask, weight.new_zeros(())).contiguous()

    def _choose(self, asked: Tensor, low: int, high: int) -> Tensor:
        """The mask [out, columns] of the columns low:high, from their present values W'_B."""
        adjustment = torch.linalg.solve_triangular(self.lower[low:high, low:high].T, asked, upper=True)
        scores = (self.columns[low:high] + adjustment).square_() * self.importance[low:high, None]
        return self.pattern.mask(scores.flip(0).T, start=self.width - high, width=self.width)


def _blocks(pattern: Pattern, block_size: int, width: int) -> Iterator[tuple[int, int]]:
    """The column blocks of a sweep: of whole N:M groups, or of one column of blocks for block patterns."""
    multiple = pattern.column_multiple
    step = multiple if multiple > 1 and not isinstance(pattern, NM) else -(-block_size // multiple) * multiple
    return ((start, min(start + step, width)) for start in range(0, width, step))
