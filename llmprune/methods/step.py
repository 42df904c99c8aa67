"""Steps that improve a pruned matrix, and chains of a method and steps."""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from llmprune.losses import StepLoss, relative_loss
from llmprune.methods.method import Method, Pruned, check_pattern
from llmprune.patterns import Pattern, Scope
from llmprune.statistics import ColumnNorm, Gram


@runtime_checkable  # so that annotations that name it can be executed in the tests
class Step(Protocol):
    """Improves a matrix that a method has pruned: a pure function, its settings as fields. Reads a Gram matrix."""

    def __call__(self, weight: Float[Tensor, "out in"], gram: Gram, pattern: Pattern, pruned: Pruned) -> Pruned:
        """Lower tr((W - V) G (W - V)^T), W the dense matrix and V the pruned one.

        Args:
            weight: W, [out, in], float32 or float64; not changed.
            gram: collected on the matrix's inputs; not changed.
            pattern: which zeros are legal; the number of zeros stays.
            pruned: V and its mask; not changed.
        """

    def refuses(self, pattern: Pattern) -> str:
        """Why it cannot work with a pattern; empty if it can."""

    def work(self, shape: tuple[int, int]) -> float:
        """Floating-point operations for one matrix of this shape (out, in), at most."""

    def workspace(self, shape: tuple[int, int]) -> int:
        """Peak bytes while a matrix of this shape (out, in) is improved, excluding the statistics."""


@dataclass(frozen=True)
class Chain:
    """A method that chooses, and steps that improve its result one after another.

    A step that would increase the loss is undone: the next one gets what it got.

    Attributes:
        method: chooses the zeros.
        steps: at least one, each with its name in recipes.
    """

    method: Method
    steps: tuple[tuple[str, Step], ...]

    @property
    def needs(self) -> type[Gram]:
        """Every step reads a Gram matrix."""
        return Gram

    @property
    def scope(self) -> Scope:
        """The method's."""
        return self.method.scope

    def refuses(self, pattern: Pattern) -> str:
        """Why the method or one of the steps cannot work with a pattern; empty if all can."""
        reasons = ((f"the step {name}", step.refuses(pattern)) for name, step in self.steps)
        refused = (f"{part}: {reason}" for part, reason in reasons if reason)
        return self.method.refuses(pattern) or next(refused, "")

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """The method's."""
        return self.method.scores(weight, statistics)

    def __call__(
        self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None, pattern: Pattern
    ) -> Pruned:
        """Choose, then improve; the losses after each step are in the result."""
        assert isinstance(statistics, Gram), "the steps of a chain need the inputs' Gram matrix"
        check_pattern(self, pattern)
        pattern = pattern.compared(self.scope)
        pruned = self.method(weight, statistics, pattern)
        losses = [StepLoss("", relative_loss(weight, pruned.weight, statistics))]
        for name, step in self.steps:
            improved = step(weight, statistics, pattern, pruned)
            loss = relative_loss(weight, improved.weight, statistics)
            kept = loss <= losses[-1].loss
            losses.append(StepLoss(name, loss if kept else losses[-1].loss, None if kept else loss))
            if kept:
                pruned = replace(pruned, weight=improved.weight, mask=improved.mask)
        return replace(pruned, losses=tuple(losses))

    def work(self, shape: tuple[int, int], pattern: Pattern) -> float:
        """The sum of its parts, and of the losses between them."""
        rows, width = shape
        measuring = 2.0 * rows * width**2 * (len(self.steps) + 2)
        return self.method.work(shape, pattern) + sum(step.work(shape) for _, step in self.steps) + measuring

    def shared_work(self, width: int) -> float:
        """The method's."""
        return self.method.shared_work(width)

    def workspace(self, shape: tuple[int, int]) -> int:
        """The largest of its parts."""
        return max(self.method.workspace(shape), *(step.workspace(shape) for _, step in self.steps))
