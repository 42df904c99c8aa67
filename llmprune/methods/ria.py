"""RIA: relative importance and activations (Zhang et al. 2024, "Plug-and-Play", ICLR 2024)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from llmprune.errors import RecipeError
from llmprune.methods.method import Selection
from llmprune.patterns import Scope
from llmprune.statistics import ColumnNorm, Gram, check_finite


@dataclass(frozen=True)
class RIA(Selection):
    """Score (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * rms(X_j)^power; no weight update.

    Relative to its row and its column, no channel disappears as a whole.

    Attributes:
        power: of the inputs' root mean square, >= 0 (the paper's 0.5).
    """

    power: float = 0.5
    needs: ClassVar[type[ColumnNorm]] = ColumnNorm
    scope: ClassVar[Scope] = "matrix"

    def __post_init__(self) -> None:
        if not self.power >= 0:
            raise RecipeError(f"ria.power is {self.power}", expected="an exponent, >= 0")

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """Relative importance, summed over row and column, times the power of the input's root mean square."""
        assert statistics is not None, "RIA needs the inputs' column norms"
        check_finite(statistics.squares, "the inputs' sum of squares")
        check_finite(weight, "the weight")
        size = weight.abs()
        tiny = size.new_tensor(1e-30)
        relative = size / size.sum(0, keepdim=True).maximum(tiny) + size / size.sum(1, keepdim=True).maximum(tiny)
        mean_square = statistics.squares.to(weight.dtype) / max(statistics.tokens, 1)
        return relative * mean_square.sqrt() ** self.power
