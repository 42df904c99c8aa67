"""The contract of a pruning method."""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from llmprune.errors import PatternError
from llmprune.losses import StepLoss
from llmprune.patterns import Pattern, Scope
from llmprune.statistics import ColumnNorm, Gram, check_finite


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned matrix.

    Attributes:
        weight: [out, in], the dtype of the input; zero wherever `mask` is False.
        mask: [out, in], True where the weight is kept.
        damping: the damping used; None if the method factorises nothing.
        tried: every damping tried, in order; more than one means that the factorisation failed with the first.
        losses: after each part of a chain; empty for a method by itself.
        by_magnitude: whether magnitudes decided, because the method's scores were zero throughout.
    """

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    damping: float | None = None
    tried: tuple[float, ...] = ()
    losses: tuple[StepLoss, ...] = ()
    by_magnitude: bool = False


@runtime_checkable  # so that annotations that name it can be executed in the tests
class Method(Protocol):
    """Which weights are removed, and the values of the rest: a pure function of one matrix, its settings as fields."""

    @property
    def needs(self) -> type[ColumnNorm] | type[Gram] | None:
        """The statistics that it reads; None if it needs only the weights."""

    @property
    def scope(self) -> Scope:
        """The weights among which an unstructured pattern compares scores, unless the pattern specifies it."""

    def refuses(self, pattern: Pattern) -> str:
        """Why it cannot work with a pattern; empty if it can."""

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """The importance of each weight, in the same units for all matrices of a layer."""

    def __call__(
        self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None, pattern: Pattern
    ) -> Pruned:
        """Prune one matrix.

        Args:
            weight: [out, in], float32 or float64; not changed.
            statistics: of the type that `needs` names, collected on this matrix's inputs; not changed.
            pattern: which zeros are legal.

        Raises:
            PatternError: the pattern does not fit the shape, or is one that the method refuses.
            NumericsError: a value is not finite, or the factorisation fails with every damping.
        """

    def work(self, shape: tuple[int, int], pattern: Pattern) -> float:
        """Floating-point operations for one matrix of this shape (out, in), excluding `shared_work`.

        Only matmuls and factorisations are counted. A method that runs several others in sequence returns their sum.
        """

    def shared_work(self, width: int) -> float:
        """Operations shared by all matrices that read the same input of this width: the factorisation of its Gram."""

    def workspace(self, shape: tuple[int, int]) -> int:
        """Peak bytes while a matrix of this shape (out, in) is pruned, excluding the statistics.

        Includes the matrix itself and the result. A method that runs several others in sequence returns their maximum.
        """


class Selection(ABC):
    """A method that keeps the weights with the highest scores unchanged; subclasses define only the scores."""

    scope: ClassVar[Scope]

    @abstractmethod
    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """The importance of each weight."""

    def __call__(
        self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None, pattern: Pattern
    ) -> Pruned:
        """Zero the weights with the lowest scores; the rest are unchanged."""
        return select(weight, self.scores(weight, statistics), pattern.compared(self.scope))

    def refuses(self, pattern: Pattern) -> str:
        """Nothing: scores can be compared under any pattern."""
        return ""

    def work(self, shape: tuple[int, int], pattern: Pattern) -> float:
        """Zero: scoring and selecting involve no matmuls."""
        return 0.0

    def shared_work(self, width: int) -> float:
        """Zero: nothing is factorised."""
        return 0.0

    def workspace(self, shape: tuple[int, int]) -> int:
        """Bytes of the matrix and of everything that has its shape."""
        return matrix_workspace(shape)


def check_pattern(method: Method, pattern: Pattern) -> None:
    """Raise `PatternError` if a method cannot work with a pattern."""
    if reason := method.refuses(pattern):
        raise PatternError(
            f"the pattern {pattern} cannot be reached by this method: {reason}",
            fix="change the method or the pattern, or give these matrices another one with a rule",
        )


def matrix_workspace(shape: tuple[int, int]) -> int:
    """Bytes of everything that has the matrix's shape: the original, the result, two float32 workspaces, the mask."""
    rows, width = shape
    return 20 * rows * width


def select(weight: Tensor, scores: Tensor, pattern: Pattern) -> Pruned:
    """Keep the weights with the highest scores, unchanged."""
    check_finite(weight, "the weight")
    mask = pattern.mask(scores)
    return Pruned(weight.where(mask, weight.new_zeros(())), mask)
