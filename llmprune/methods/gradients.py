"""Scores by gradients of the dense model's loss. The run makes one backward pass and hands each matrix its own.

An expert that no calibration token reached has no gradient. Scores that are zero throughout a matrix say nothing, and
of equal ones those with the lowest indices would go, half of its neurons: there, magnitudes decide.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from llmprune.methods.method import Method, Pruned, Selection, matrix_workspace, select
from llmprune.methods.step import Chain
from llmprune.patterns import Pattern, Scope
from llmprune.statistics import ColumnNorm, Gram, check_finite

# Over calibration samples, of the gradient of each sample's mean loss.
GradientKind = Literal["mean", "mean_square"]


class GradientScore(Selection):
    """A score of a weight and of the gradient of the loss with respect to it; see `with_gradient`."""

    needs: ClassVar[None] = None
    scope: ClassVar[Scope] = "matrix"
    gradient: ClassVar[GradientKind]

    @abstractmethod
    def rate(self, weight: Float[Tensor, "out in"], gradient: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The importance of each weight; `gradient` is of the kind that the class names."""

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """Only known once there is a gradient."""
        raise AssertionError(f"{type(self).__name__} was called without the gradients of a matrix")

    def workspace(self, shape: tuple[int, int]) -> int:
        """That of a selection, and the gradient in float32."""
        return matrix_workspace(shape) + 4 * shape[0] * shape[1]


@dataclass(frozen=True)
class Gradient(GradientScore):
    """Score |g|, g the mean gradient of the loss; the size of the weight does not count."""

    gradient: ClassVar[GradientKind] = "mean"

    def rate(self, weight: Float[Tensor, "out in"], gradient: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """|g|."""
        return gradient.abs()


@dataclass(frozen=True)
class Taylor(GradientScore):
    """Score |g w|: the change of the loss to first order (Molchanov et al. 2019, arXiv 1906.10771)."""

    gradient: ClassVar[GradientKind] = "mean"

    def rate(self, weight: Float[Tensor, "out in"], gradient: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """|g w|."""
        return (gradient * weight).abs()


@dataclass(frozen=True)
class Fisher(GradientScore):
    """Score w^2 F / 2, F the mean over samples of g^2: optimal brain damage (LeCun et al. 1989), with F as Hessian."""

    gradient: ClassVar[GradientKind] = "mean_square"

    def rate(self, weight: Float[Tensor, "out in"], gradient: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """w^2 F / 2."""
        return weight.square() * gradient / 2


@dataclass(frozen=True)
class _Given(Selection):
    """A score with the gradient of one matrix; equal to others of the same score."""

    score: GradientScore
    read: Callable[[], Tensor] = field(compare=False, repr=False)
    needs: ClassVar[None] = None

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        """The score's."""
        return self.score.scope

    def rated(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The score's."""
        check_finite(weight, "the weight")
        return self.score.rate(weight, self.read().to(weight))

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """The score's; where they are zero throughout, magnitudes."""
        scores = self.rated(weight)
        return scores if bool(scores.any()) else weight.abs()

    def __call__(
        self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None, pattern: Pattern
    ) -> Pruned:
        """As every selection; the result says whether magnitudes decided."""
        scores = self.rated(weight)
        zero = not bool(scores.any())
        pruned = select(weight, weight.abs() if zero else scores, pattern.compared(self.scope))
        return replace(pruned, by_magnitude=zero)

    def workspace(self, shape: tuple[int, int]) -> int:
        """The score's."""
        return self.score.workspace(shape)


def gradient_kind(method: Method) -> GradientKind | None:
    """The kind of gradient that a method, or the first one of a chain, reads; None if it reads none."""
    if isinstance(method, Chain):
        return gradient_kind(method.method)
    return method.gradient if isinstance(method, GradientScore) else None


def lacks_gradient(method: Method, weight: Float[Tensor, "out in"]) -> bool:
    """Whether the scores by which a method, or the first one of a chain, would choose are zero throughout a matrix."""
    if isinstance(method, Chain):
        return lacks_gradient(method.method, weight)
    return isinstance(method, _Given) and not bool(method.rated(weight).any())


def with_gradient(method: Method, read: Callable[[], Tensor]) -> Method:
    """The same method for one matrix, whose gradient is read where it is needed.

    Args:
        method: one for which `gradient_kind` is not None.
        read: returns the gradient, [out, in], of that kind.
    """
    if isinstance(method, Chain):
        return replace(method, method=with_gradient(method.method, read))
    assert isinstance(method, GradientScore)
    return _Given(method, read)
