"""What calibration collects about one matrix's inputs: raw sums and a token count, so that shards merge exactly.

A damped Gram matrix is also factorised here, for solvers that process columns from left to right.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from llmprune.errors import NumericsError
from llmprune.precision import add_gram, add_product, float32_products, mirror_lower

# The larger dampings to try when a factorisation fails.
_LADDER = (0.01, 0.1, 1.0)


def damping_ladder(damping: float) -> tuple[float, ...]:
    """Every damping to try, in order: the requested one, then those of 0.01, 0.1 and 1 that are higher.

    Args:
        damping: fraction of the Gram matrix's mean diagonal, >= 0.
    """
    return damping, *(step for step in _LADDER if step > damping)


@dataclass(frozen=True, slots=True)
class Factor:
    """Upper triangular R with R R^T = the damped Gram matrix: the inverse of the usual Cholesky factor of its inverse.

    Attributes:
        upper: R, [width, width], the dtype of the Gram matrix.
        damping: the damping that succeeded, as a fraction of the mean diagonal.
        tried: every damping tried, in order.
    """

    upper: Float[Tensor, "width width"]
    damping: float
    tried: tuple[float, ...]


@runtime_checkable  # so that annotations that name it can be executed in the tests
class Statistics(Protocol):
    """Sums over calibration tokens of one matrix's inputs."""

    tokens: int

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> "Statistics":
        """Sums over no tokens, for inputs of `width` features."""

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        """Add the rows of x."""

    def merge(self, other: Any) -> None:
        """Add another shard's sums, of the same kind; exact up to rounding, whatever the order."""

    def tensors(self) -> list[Tensor]:
        """All sums; whoever adds those of other shards to them, in place, calls `summed`."""

    def summed(self, tokens: int) -> None:
        """Take note of sums that `tensors` gave and that have been replaced, and of the tokens of all shards."""

    def add_prior(self, tokens: int, variance: float) -> None:
        """Add `tokens` imaginary tokens with uncorrelated features of this mean square."""

    @property
    def squares(self) -> Float[Tensor, " width"]:
        """Sum over tokens of each feature's square."""


@dataclass(slots=True)
class ColumnNorm:
    """The sum of squares of every input feature; enough for Wanda.

    Attributes:
        squares: [width], float32.
        tokens: rows seen.
    """

    squares: Float[Tensor, " width"]
    tokens: int = 0

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> "ColumnNorm":
        return cls(torch.zeros(width, device=device))

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        self.squares += x.to(self.squares.dtype).square().sum(0)
        self.tokens += len(x)

    def merge(self, other: "ColumnNorm") -> None:
        self.squares += other.squares
        self.tokens += other.tokens

    def tensors(self) -> list[Tensor]:
        return [self.squares]

    def summed(self, tokens: int) -> None:
        self.tokens = tokens

    def add_prior(self, tokens: int, variance: float) -> None:
        self.squares += tokens * variance
        self.tokens += tokens


@dataclass(slots=True)
class Moments(ColumnNorm):
    """What channel scores need: sums of the values, and how often they are above zero.

    Attributes:
        totals: [width], float32, sum over tokens of each feature.
        active: [width], float32, tokens where it is above zero.
    """

    totals: Float[Tensor, " width"] = field(kw_only=True)
    active: Float[Tensor, " width"] = field(kw_only=True)

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> "Moments":
        squares, totals, active = (torch.zeros(width, device=device) for _ in range(3))
        return cls(squares, totals=totals, active=active)

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        ColumnNorm.update(self, x)
        self.totals += x.sum(0, dtype=self.totals.dtype)
        self.active += (x > 0).sum(0)

    def merge(self, other: ColumnNorm) -> None:
        assert isinstance(other, Moments)
        ColumnNorm.merge(self, other)
        self.totals += other.totals
        self.active += other.active

    def tensors(self) -> list[Tensor]:
        return [self.squares, self.totals, self.active]


@dataclass(slots=True)
class Gram:
    """The Gram matrix X X^T of the inputs; enough for every regression-based solver.

    Attributes:
        sums: [width, width], float32 (exact products, float32 sums) or float64 in references; between updates only its
            lower triangle counts, so read `products`.
        tokens: rows seen.
        errors: D, sum of (x - x') x'^T over rows x' of the inputs and x of what the dense model has in their place; of
            the shape of `sums`. None: not collected.
    """

    sums: Float[Tensor, "width width"]
    tokens: int = 0
    errors: Float[Tensor, "width width"] | None = None
    _symmetric: bool = field(default=True, repr=False)
    _factors: dict[float, Factor] = field(default_factory=dict, repr=False)

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> "Gram":
        return cls(torch.zeros(width, width, device=device))

    @property
    def products(self) -> Float[Tensor, "width width"]:
        """X X^T, [width, width], exactly symmetric."""
        if not self._symmetric:
            mirror_lower(self.sums)
            self._symmetric = True
        return self.sums

    @property
    def squares(self) -> Float[Tensor, " width"]:
        return self.sums.diagonal()

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        self._factors.clear()
        add_gram(self.sums, x)
        self.tokens += len(x)
        self._symmetric = False

    def add_errors(self, error: Float[Tensor, "tokens width"], x: Float[Tensor, "tokens width"]) -> None:
        """Add rows to `errors`; the first call begins them.

        Args:
            error: what the dense model has in place of x, minus x.
            x: rows of the inputs, in the same dtype.
        """
        if self.errors is None:
            self.errors = torch.zeros_like(self.sums)
        add_product(self.errors, error, x)

    def merge(self, other: "Gram") -> None:
        self._factors.clear()
        self.sums += other.sums
        if other.errors is not None:
            self.errors = other.errors.clone() if self.errors is None else self.errors + other.errors
        self.tokens += other.tokens
        self._symmetric = self._symmetric and other._symmetric

    def tensors(self) -> list[Tensor]:
        return [self.sums, *([] if self.errors is None else [self.errors])]

    def summed(self, tokens: int) -> None:
        self._factors.clear()
        self.tokens, self._symmetric = tokens, False

    def add_prior(self, tokens: int, variance: float) -> None:
        self._factors.clear()
        self.sums.diagonal().add_(tokens * variance)
        self.tokens += tokens

    def factor(self, damping: float) -> Factor:
        """Factorise G + damping * mean(diag G) * I, increasing the damping if that fails.

        A dead input (zero diagonal) gets a diagonal of 1. After a failure 0.01, 0.1 and 1 are tried (those above
        `damping`); the factor says which one succeeded. Matrices that share an input share the factor.

        Args:
            damping: fraction of the mean diagonal, >= 0.

        Raises:
            NumericsError: the Gram matrix is not finite, or no damping up to 1 makes it positive definite.
        """
        if damping not in self._factors:
            check_finite(self.squares, "the Gram matrix of the inputs")
            self._factors[damping] = factorise(self.products, damping, self.tokens)
        return self._factors[damping]


@dataclass(slots=True)
class ChannelGram(Gram):
    """A Gram matrix with the moments that channel scores need.

    Attributes:
        moments: of the same tokens.
    """

    moments: Moments = field(kw_only=True)

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> "ChannelGram":
        return cls(torch.zeros(width, width, device=device), moments=Moments.empty(width, device))

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        Gram.update(self, x)
        self.moments.update(x)

    def merge(self, other: Gram) -> None:
        assert isinstance(other, ChannelGram)
        Gram.merge(self, other)
        self.moments.merge(other.moments)

    def tensors(self) -> list[Tensor]:
        return [*Gram.tensors(self), *self.moments.tensors()]

    def summed(self, tokens: int) -> None:
        Gram.summed(self, tokens)
        self.moments.summed(tokens)

    def add_prior(self, tokens: int, variance: float) -> None:
        Gram.add_prior(self, tokens, variance)
        self.moments.add_prior(tokens, variance)


def mix(plain: ColumnNorm | Gram, weighted: ColumnNorm | Gram, share: float = 0.5) -> None:
    """Replace sums by a mixture with weighted sums of the same tokens, both divided by their traces first.

    The mixture has the trace of the plain sums, so that counts of tokens keep their meaning.

    Args:
        plain: changed in place.
        weighted: of the same kind; left out if it is all zeros.
        share: of the weighted sums, in [0, 1].
    """
    own, other = (float(statistics.squares.sum(dtype=torch.float64)) for statistics in (plain, weighted))
    if other <= 0:
        return
    if isinstance(plain, Gram):
        assert isinstance(weighted, Gram)
        plain._factors.clear()
        plain.sums.mul_(1 - share).add_(weighted.sums, alpha=share * own / other)
        if plain.errors is not None and weighted.errors is not None:
            plain.errors.mul_(1 - share).add_(weighted.errors, alpha=share * own / other)
        plain._symmetric = plain._symmetric and weighted._symmetric
    else:
        plain.squares.mul_(1 - share).add_(weighted.squares, alpha=share * own / other)


def check_finite(values: Tensor, what: str) -> None:
    """Raise `NumericsError`, with the count, if any value is NaN or infinite."""
    # A sum is finite only if all its terms are: the usual case takes one pass and no mask.
    if bool(torch.isfinite(values.sum(dtype=torch.float64 if values.dtype == torch.float64 else torch.float32))):
        return
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        raise NumericsError(
            f"{what} holds {int(bad.sum())} values that are NaN or infinite (of {values.numel()})",
            expected="finite numbers",
            fix="check the source checkpoint; where 16-bit activations overflow, set compute_dtype: float32",
        )


def damped(gram: Gram, damping: float) -> Float[Tensor, "width width"]:
    """G + damping * mean(diag G) * I, a copy; a dead input (zero diagonal) gets a diagonal of 1.

    Args:
        gram: the sums over the inputs.
        damping: fraction of the mean diagonal, >= 0.

    Raises:
        NumericsError: the Gram matrix is not finite.
    """
    check_finite(gram.squares, "the Gram matrix of the inputs")
    matrix = gram.products.clone()
    dead = gram.squares == 0
    matrix.diagonal().add_(damping * float(gram.squares.mean())).masked_fill_(dead, 1.0)
    return matrix


def factorise(gram: Float[Tensor, "width width"], damping: float, tokens: int) -> Factor:
    """Factorise gram + damping * mean(diagonal) * I, increasing the damping if that fails.

    A dead input (zero diagonal) gets a diagonal of 1.

    Args:
        gram: [width, width], symmetric, finite; not changed.
        damping: fraction of the mean diagonal, >= 0.
        tokens: rows that were summed, for the error message.

    Raises:
        NumericsError: no damping up to 1 makes it positive definite.
    """
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    tried: list[float] = []
    for fraction in damping_ladder(damping):
        tried.append(fraction)
        damped = gram.flip(0, 1)
        damped.diagonal().add_(fraction * mean)
        damped.diagonal().masked_fill_(diagonal.flip(0) == 0, 1.0)
        if _factorise_in_place(damped):
            return Factor(_reverse_in_place(damped).mT, fraction, tuple(tried))
        del damped
    raise NumericsError(
        f"a Gram matrix of width {len(gram)} from {tokens} tokens is not positive definite at damping {tried} "
        f"(diagonal from {float(diagonal.min()):.3e} to {float(diagonal.max()):.3e}, mean {mean:.3e})",
        expected="a finite, symmetric Gram matrix",
        fix="check the calibration text and the model's activations, or give this matrix another method with a rule",
    )


def _factorise_in_place(matrix: Tensor) -> bool:
    """Overwrite a symmetric matrix with the transpose of its lower factor; False if it is not positive definite.

    With rows and columns reversed, R is an ordinary lower factor. In place, because a width of 30,000 leaves no room
    for copies.
    """
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    # A symmetric matrix equals its transpose, a view in LAPACK's column-major order: nothing is copied.
    in_order = matrix.mT
    with float32_products("ieee"):
        torch.linalg.cholesky_ex(in_order, out=(in_order, info))
    return int(info) == 0 and bool(torch.isfinite(matrix.diagonal()).all())


def _reverse_in_place(matrix: Tensor, rows: int = 256) -> Tensor:
    """Reverse the order of rows and columns, a few rows at a time."""
    width = len(matrix)
    for start in range(0, width // 2, rows):
        stop = min(start + rows, width // 2)
        first, last = matrix[start:stop], matrix[width - stop : width - start]
        reversed_first = first.flip(0, 1)
        first.copy_(last.flip(0, 1))
        last.copy_(reversed_first)
    if width % 2:
        middle = matrix[width // 2]
        middle.copy_(middle.flip(0))
    return matrix
