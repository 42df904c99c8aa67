"""Magnitude pruning: remove the weights with the smallest absolute values."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from llmprune.methods.method import Selection
from llmprune.patterns import Scope
from llmprune.statistics import ColumnNorm, Gram


@dataclass(frozen=True)
class Magnitude(Selection):
    """Score |w|, compared over the whole matrix; needs no calibration text (Han et al. 2015)."""

    needs: ClassVar[None] = None
    scope: ClassVar[Scope] = "matrix"

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """|w|."""
        return weight.abs()
