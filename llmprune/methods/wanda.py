"""Wanda: weights times activations (Sun et al. 2023, arXiv 2306.11695)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from llmprune.methods.method import Selection
from llmprune.patterns import Scope
from llmprune.statistics import ColumnNorm, Gram, check_finite


@dataclass(frozen=True)
class Wanda(Selection):
    """Score |W_ij| * sqrt(mean_t X_jt^2), compared within each output row (equation 1); no weight update."""

    needs: ClassVar[type[ColumnNorm]] = ColumnNorm
    scope: ClassVar[Scope] = "row"

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """|W_ij| times the root mean square of input j."""
        assert statistics is not None, "Wanda needs the inputs' column norms"
        check_finite(statistics.squares, "the inputs' sum of squares")
        mean_square = statistics.squares.to(weight.dtype) / max(statistics.tokens, 1)
        return weight.abs() * mean_square.sqrt()
