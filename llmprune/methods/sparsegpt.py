"""SparseGPT: one sweep over the columns, each error passed on to the columns still to come (arXiv 2301.00774).

The paper inverts the damped Gram G and updates the remaining columns by rows of U, the upper Cholesky factor of G^-1. With
G = R R^T, R upper triangular, U is R^-1, so the same sweep reads off R itself and nothing has to be inverted. Writing
E = W - Q for the error made so far, F for the columns done and B for the next ones,

    S_B = E_F R_FB                        what the columns done ask of the next ones,
    W'_B = W_B + S_B R_BB^-1              their present values, from which the mask is chosen,
    w'_k = w_k + (S_k + E_B R_Bk) / R_kk  the value of column k when its turn comes, at a cost of R_kk^2 (w'_k - q_k)^2.

(GPTQ and LDLQ are related in the same way: QuIP, arXiv 2307.13304, theorem 6.) That is a third of the factorisation's
arithmetic, and the error never passes through an ill-conditioned inverse.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from llmprune.errors import RecipeError
from llmprune.methods.method import Pruned
from llmprune.patterns import Pattern, Scope
from llmprune.precision import float32_products
from llmprune.statistics import ColumnNorm, Gram

# Columns that are updated one by one; all longer-range updates are matrix products.
_STRIP = 16


@dataclass(frozen=True)
class SparseGPT:
    """Prune by the optimal-brain-surgeon score and update the weights that remain.

    Attributes:
        damping: added to the Gram's diagonal, as a fraction of its mean, >= 0; raised to 0.01, 0.1, 1 where the
            factorisation fails, which the report shows.
        block_size: columns whose unstructured mask is chosen together, >= 1 (the paper's 128). N:M groups are decided one
            by one, from columns that are up to date.
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
        factor = statistics.factor(self.damping)
        sweep = _Sweep(weight, factor.lower.to(weight.dtype), statistics.squares == 0, pattern.compared(self.scope))
        multiple = pattern.column_multiple
        block = -(-self.block_size // multiple) * multiple
        with float32_products("ieee"):
            for start in range(0, width, block):
                sweep.decide(start, min(start + block, width))
        return Pruned(sweep.result(), sweep.mask, factor.damping, factor.tried)


class _Sweep:
    """The state of one sweep, transposed ([in, out]: a column of W is a contiguous row) and in reversed column order."""

    def __init__(self, weight: Tensor, lower: Tensor, dead: Tensor, pattern: Pattern) -> None:
        self.width = weight.shape[1]
        self.columns = weight.T.flip(0)
        self.errors = torch.empty_like(self.columns)
        self.mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        self.lower, self.pattern = lower, pattern
        # A dead input contributes nothing, so its weights go first.
        self.importance = lower.diagonal().square().masked_fill(dead.flip(0), 0)

    def decide(self, start: int, stop: int) -> None:
        """Decide the columns start:stop (in natural order) as one block."""
        low, high = self.width - stop, self.width - start
        asked = self._asked(low, high, since=high, until=self.width)
        unit = self.pattern.column_multiple
        if unit == 1:
            self._choose(asked, low, high)
        strip = max(_STRIP // unit, 1) * unit
        for top in range(high, low, -strip):
            bottom = max(low, top - strip)
            asked_strip = asked[bottom - low : top - low]
            if top < high:
                asked_strip = asked_strip + self._asked(bottom, top, since=top, until=high)
            if unit == 1:
                self._update(asked_strip, bottom, top)
            else:
                self._decide_groups(asked_strip, bottom, top)

    def result(self) -> Tensor:
        """The pruned matrix [out, in]."""
        weight = (self.columns - self.errors).flip(0).T
        return weight.where(self.mask, weight.new_zeros(())).contiguous()

    def _asked(self, low: int, high: int, *, since: int, until: int) -> Tensor:
        """S of the columns low:high, for the errors made in the columns since:until."""
        return self.lower[since:until, low:high].T @ self.errors[since:until]

    def _choose(self, asked: Tensor, low: int, high: int) -> None:
        """Fix the mask of the columns low:high, from their present values."""
        adjustment = torch.linalg.solve_triangular(self.lower[low:high, low:high].T, asked, upper=True)
        scores = (self.columns[low:high] + adjustment).square_() * self.importance[low:high, None]
        start, stop = self.width - high, self.width - low
        self.mask[:, start:stop] = self.pattern.mask(scores.flip(0).T, start=start, width=self.width)

    def _decide_groups(self, asked: Tensor, bottom: int, top: int) -> None:
        unit = self.pattern.column_multiple
        for high in range(top, bottom, -unit):
            low = high - unit
            group = asked[low - bottom : high - bottom]
            if high < top:
                group = group + self._asked(low, high, since=high, until=top)
            self._choose(group, low, high)
            self._update(group, low, high)

    def _update(self, asked: Tensor, low: int, high: int) -> None:
        """Record the errors of the columns low:high, one after another."""
        errors = self.errors[low:high]
        keep = self.mask[:, self.width - high : self.width - low].T.flip(0)
        coefficients = self.lower[low:high, low:high].T.contiguous()
        scale = -1 / self.lower.diagonal()[low:high]
        for k in range(high - low - 1, -1, -1):
            absorbed = torch.addmv(asked[k], errors[k + 1 :].T, coefficients[k, k + 1 :]).mul_(scale[k])
            torch.where(keep[k], absorbed, self.columns[low + k], out=errors[k])
