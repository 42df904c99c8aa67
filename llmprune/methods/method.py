"""The contract of a pruning method."""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

from jaxtyping import Bool, Float
from torch import Tensor

from llmprune.patterns import Pattern, Scope
from llmprune.statistics import ColumnNorm, Gram, check_finite


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned matrix.

    Attributes:
        weight: [out, in], the dtype of the input; zero wherever `mask` is False.
        mask: [out, in], True where the weight stays.
        damping: the damping used, where the method inverts or factorises something.
        tried: every damping tried, in order; more than one means that the ladder was climbed.
    """

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    damping: float | None = None
    tried: tuple[float, ...] = ()


class Method(Protocol):
    """Which weights go, and what the rest become: a pure function of one matrix, with its knobs as fields."""

    @property
    def needs(self) -> type[ColumnNorm] | type[Gram] | None:
        """The statistics it reads; None if the weights alone are enough."""

    @property
    def scope(self) -> Scope:
        """Where an unstructured pattern compares scores if the pattern does not say."""

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """How much each weight matters, in the same units for all matrices of a layer."""

    def __call__(
        self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None, pattern: Pattern
    ) -> Pruned:
        """Prune one matrix.

        Args:
            weight: [out, in], float32 or float64; not changed.
            statistics: what `needs` names, collected on this matrix's inputs; not changed.
            pattern: the legal zeros.

        Raises:
            PatternError: the pattern does not fit the shape.
            NumericsError: a value is not finite, or a factorisation fails at every damping.
        """

    def work(self, shape: tuple[int, int]) -> float:
        """What one matrix of this shape (out, in) costs beyond `shared_work`, in floating-point operations.

        Counted are products and factorisations of matrices. A method made of several, one after the other, costs their
        sum.
        """

    def shared_work(self, width: int) -> float:
        """What all matrices that read one input of this width cost together: the factorisation of their Gram."""

    def workspace(self, shape: tuple[int, int]) -> int:
        """Bytes that exist at once while a matrix of this shape (out, in) is pruned, statistics left out.

        The matrix itself and what becomes of it are among them. A method made of several, one after the other, takes
        the maximum of theirs.
        """


class Selection(ABC):
    """A method that keeps the weights with the highest scores as they are; what it has to say is the scores."""

    scope: ClassVar[Scope]

    @abstractmethod
    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """How much each weight matters."""

    def __call__(
        self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None, pattern: Pattern
    ) -> Pruned:
        """Zero the weights with the lowest scores; the rest stay as they are."""
        return select(weight, self.scores(weight, statistics), pattern.compared(self.scope))

    def work(self, shape: tuple[int, int]) -> float:
        """None: scoring and selecting multiply no matrices."""
        return 0.0

    def shared_work(self, width: int) -> float:
        """None: nothing is factorised."""
        return 0.0

    def workspace(self, shape: tuple[int, int]) -> int:
        """Bytes of the matrix and of what has its shape."""
        return matrix_workspace(shape)


def matrix_workspace(shape: tuple[int, int]) -> int:
    """Bytes of what has a matrix's own shape: the original, what becomes of it, two workspaces in float32, the mask."""
    rows, width = shape
    return 20 * rows * width


def select(weight: Tensor, scores: Tensor, pattern: Pattern) -> Pruned:
    """Keep the weights with the highest scores, unchanged."""
    check_finite(weight, "the weight")
    mask = pattern.mask(scores)
    return Pruned(weight.where(mask, weight.new_zeros(())), mask)
