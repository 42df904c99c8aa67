"""Refit the kept weights by least squares, the zeros fixed: masked conjugate gradient, all rows at once.

Each row v minimises (w - v) G (w - v)^T over the weights that its mask keeps. That is one linear system a row, with a
different submatrix of G each; conjugate gradient needs only products with the whole G, whose masked results are those
of the submatrices (the second stage of ALPS, Meng et al. 2024, arXiv 2406.07831).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from llmprune.errors import RecipeError
from llmprune.methods.method import Pruned, matrix_workspace
from llmprune.patterns import Pattern
from llmprune.precision import float32_products
from llmprune.statistics import Gram, damped

# Rows whose residual has fallen below this share of their first one are finished.
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Refit:
    """Fit the kept weights to the dense output.

    Attributes:
        damping: added to the Gram's diagonal, as a fraction of its mean, >= 0; keeps weights near their dense values
            where the calibration text says little.
        iterations: at most, >= 1.
    """

    damping: float = 0.01
    iterations: int = 30

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise RecipeError(f"refit.damping is {self.damping}", expected="a fraction of the mean diagonal, >= 0")
        if self.iterations < 1:
            raise RecipeError(f"refit.iterations is {self.iterations}", expected="a number of iterations, >= 1")

    def __call__(self, weight: Float[Tensor, "out in"], gram: Gram, pattern: Pattern, pruned: Pruned) -> Pruned:
        """Keep the mask; start from the pruned weights."""
        matrix = damped(gram, self.damping).to(weight.dtype)
        # Weights of dead inputs stay as they are: their diagonal of 1 must not decide when a row is finished.
        target = pruned.weight.where(gram.squares == 0, weight)
        return replace(pruned, weight=least_squares(target, pruned.weight, pruned.mask, matrix, self.iterations))

    def refuses(self, pattern: Pattern) -> str:
        """Every pattern will do."""
        return ""

    def work(self, shape: tuple[int, int]) -> float:
        """2 out in^2 an iteration."""
        rows, width = shape
        return 2.0 * rows * width**2 * (self.iterations + 1)

    def workspace(self, shape: tuple[int, int]) -> int:
        """The matrices, four more float32 ones of their shape, and the damped Gram."""
        rows, width = shape
        return matrix_workspace(shape) + 16 * rows * width + 4 * width**2


def least_squares(
    weight: Float[Tensor, "out in"],
    start: Float[Tensor, "out in"],
    mask: Tensor,
    gram: Float[Tensor, "in in"],
    iterations: int,
) -> Float[Tensor, "out in"]:
    """The V with this mask that minimises tr((W - V) G (W - V)^T), by conjugate gradient with a Jacobi preconditioner.

    Args:
        weight: W.
        start: the first V; zero wherever the mask is False.
        mask: [out, in], True where a weight is kept.
        gram: G, symmetric, positive definite, in the dtype of the weight.
        iterations: at most.
    """
    scale = gram.diagonal().reciprocal()
    values = start.clone()
    with float32_products("ieee"):
        residual = ((weight - values) @ gram).mul_(mask)
        direction = residual * scale
        size = (residual * direction).sum(1, keepdim=True)
        enough = size * _TOLERANCE**2
        for _ in range(iterations):
            product = (direction @ gram).mul_(mask)
            curvature = (direction * product).sum(1, keepdim=True)
            step = torch.where(curvature > 0, size / curvature, 0)
            values.addcmul_(direction, step)
            residual.addcmul_(product, step, value=-1)
            scaled = residual * scale
            next_size = (residual * scaled).sum(1, keepdim=True)
            direction = scaled.addcmul_(direction, torch.where(size > 0, next_size / size, 0))
            size = next_size
            if bool((size <= enough).all()):
                break
    return values
