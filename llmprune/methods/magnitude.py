"""Magnitude pruning: the smallest weights go."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from llmprune.methods.method import Pruned, select
from llmprune.patterns import Pattern, Scope
from llmprune.statistics import ColumnNorm, Gram


@dataclass(frozen=True)
class Magnitude:
    """Score |w|, compared over the whole matrix; needs no calibration (Han et al. 2015)."""

    needs: ClassVar[None] = None
    scope: ClassVar[Scope] = "matrix"

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """|w|."""
        return weight.abs()

    def __call__(
        self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None, pattern: Pattern
    ) -> Pruned:
        """Zero the smallest weights; the rest stay as they are."""
        return select(weight, self.scores(weight, statistics), pattern.compared(self.scope))
