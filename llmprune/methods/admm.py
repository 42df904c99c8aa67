"""ADMM with a sparsity ramp: mask and weights found together (Boza 2024, arXiv 2401.02938).

Inputs are scaled to a unit diagonal, so that one penalty fits every matrix. The constraint is enforced by the
alternating direction method of multipliers: B solves the regression with a pull towards Z, Z is B's projection on
what the pattern allows, and U adds up the differences. Sparsity rises along a cubic ramp; then the mask is frozen.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from llmprune.errors import NumericsError, RecipeError
from llmprune.methods.method import Pruned, matrix_workspace, select
from llmprune.methods.sparsegpt import removal_scores
from llmprune.patterns import NM, Block, Pattern, Scope, Unstructured
from llmprune.precision import float32_products
from llmprune.statistics import ColumnNorm, Gram, check_finite, damped


class Alternating(ABC):
    """A method that alternates between a regression, scaled to a unit diagonal, and the pattern.

    Attributes:
        damping: added to the diagonal of the scaled Gram, >= 0.
    """

    damping: float
    needs: ClassVar[type[Gram]] = Gram
    scope: ClassVar[Scope] = "matrix"

    @abstractmethod
    def solve(self, problem: "Scaled", pattern: Pattern) -> tuple[Tensor, Tensor]:
        """The scaled weights and their mask, both [out, in]; the pattern removes at least one weight."""

    def refuses(self, pattern: Pattern) -> str:
        """Nothing: every pattern will do."""
        return ""

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """SparseGPT's: the error of removing one weight."""
        assert isinstance(statistics, Gram), "ADMM needs the inputs' Gram matrix"
        return removal_scores(weight, statistics, 0.01)

    def __call__(
        self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None, pattern: Pattern
    ) -> Pruned:
        """Scale, solve, and scale back; a pattern without zeros changes nothing."""
        assert isinstance(statistics, Gram), "ADMM needs the inputs' Gram matrix"
        shape = (weight.shape[0], weight.shape[1])
        pattern.check(shape)
        check_finite(weight, "the weight")
        pattern = pattern.compared(self.scope)
        problem = Scaled.of(weight, statistics, self.damping)
        if not pattern.zeros(shape):
            return select(weight, weight, pattern)
        values, mask = self.solve(problem, pattern)
        # A kept block may have dead inputs, whose weights stay.
        values = weight.where(problem.dead & mask, problem.unscaled(values, mask)).contiguous()
        return Pruned(values, mask, self.damping, (self.damping,))

    def shared_work(self, width: int) -> float:
        """One factorisation, for the scores."""
        return width**3 / 3


@dataclass(frozen=True)
class ADMM(Alternating):
    """Prune and update by the alternating direction method of multipliers.

    Attributes:
        damping: added to the diagonal of the scaled Gram, >= 0 (the paper's 0.1).
        iterations: in all, >= 1.
        ramp: iterations in which the sparsity rises, 1 <= ramp <= iterations.
    """

    damping: float = 0.1
    iterations: int = 20
    ramp: int = 15

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise RecipeError(f"admm.damping is {self.damping}", expected="a fraction of the diagonal, >= 0")
        if not 1 <= self.ramp <= self.iterations:
            raise RecipeError(
                f"admm.ramp is {self.ramp} and admm.iterations {self.iterations}",
                expected="at least one iteration, and a ramp within them",
            )

    def solve(self, problem: "Scaled", pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Alternate between the regression and the projection; the mask is frozen once the ramp has ended."""
        solve = problem.inverse(1.0)
        weights, target = problem.weight, problem.target
        multipliers = torch.zeros_like(weights)
        mask = torch.ones_like(weights, dtype=torch.bool)
        current = weights
        with float32_products("ieee"):
            for step in range(self.iterations):
                shifted = current + multipliers
                if step < self.ramp:
                    share = 1 - (1 - (step + 1) / self.ramp) ** 3
                    mask = partial(pattern, share).mask(shifted.square())
                projected = shifted * mask
                multipliers = shifted - projected
                current = (target + projected - multipliers) @ solve
        return projected, mask

    def work(self, shape: tuple[int, int], pattern: Pattern) -> float:
        """2 out in^2 an iteration, and one inverse."""
        rows, width = shape
        return 2.0 * rows * width**2 * (self.iterations + 1) + width**3

    def workspace(self, shape: tuple[int, int]) -> int:
        """The matrices, five more of their shape, and three square ones: the scaled Gram, its factor and inverse."""
        rows, width = shape
        return matrix_workspace(shape) + 20 * rows * width + 12 * width**2


@dataclass(frozen=True, slots=True)
class Scaled:
    """A regression whose inputs are scaled to a unit diagonal.

    Attributes:
        weight: W s, [out, in]; zero, and thus ranked last, where the input is dead.
        gram: G / (s s^T) plus the damping, [in, in].
        scale: s, [in], root of the diagonal of G.
        dead: [in], True for inputs that were always zero.
    """

    weight: Float[Tensor, "out in"]
    gram: Float[Tensor, "in in"]
    scale: Float[Tensor, " in"]
    dead: Tensor

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], statistics: Gram, damping: float) -> "Scaled":
        """Scale W and G. The damping is added afterwards, so that it is the same share of every input."""
        matrix = damped(statistics, 0.0).to(weight.dtype)
        scale = matrix.diagonal().sqrt()
        matrix /= scale[:, None] * scale
        matrix.diagonal().add_(damping)
        dead = statistics.squares == 0
        return cls((weight * scale).masked_fill_(dead, 0), matrix, scale, dead)

    @property
    def target(self) -> Float[Tensor, "out in"]:
        """W G, scaled: the right-hand side of the regression."""
        with float32_products("ieee"):
            return self.weight @ self.gram

    def inverse(self, penalty: float) -> Float[Tensor, "in in"]:
        """(G + penalty I)^-1.

        Raises:
            NumericsError: the sum is not positive definite.
        """
        matrix = self.gram.clone()
        matrix.diagonal().add_(penalty)
        with float32_products("ieee"):
            factor, info = torch.linalg.cholesky_ex(matrix)
            if int(info) or not bool(torch.isfinite(factor.diagonal()).all()):
                raise NumericsError(
                    f"a scaled Gram matrix of width {len(matrix)} is not positive definite with a penalty of {penalty}",
                    expected="a finite, symmetric Gram matrix",
                    fix="increase damping, or give this matrix another method with a rule",
                )
            return torch.cholesky_inverse(factor)

    def unscaled(self, values: Float[Tensor, "out in"], mask: Tensor) -> Float[Tensor, "out in"]:
        """Weights for the inputs as they are; zero outside the mask."""
        return (values / self.scale).where(mask, values.new_zeros(()))


def partial(pattern: Pattern, share: float) -> Pattern:
    """A pattern with this share, in [0, 1], of the zeros of another; of N:M, the nearest whole number a group."""
    match pattern:
        case NM():
            return replace(pattern, keep=pattern.of - round((pattern.of - pattern.keep) * share))
        case Unstructured() | Block():
            return replace(pattern, sparsity=pattern.sparsity * share)
    raise AssertionError(f"no partial form of {pattern}")
