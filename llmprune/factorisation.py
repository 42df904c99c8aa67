"""Factorise damped Gram matrices for solvers that go through the columns from left to right."""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llmprune.errors import NumericsError
from llmprune.precision import float32_products

# What is tried, above the damping asked for, when a factorisation fails.
_LADDER = (0.01, 0.1, 1.0)


@dataclass(frozen=True, slots=True)
class Factor:
    """R of the damped Gram matrix R R^T, R upper triangular: the inverse of the usual factor of the Gram's inverse.

    Attributes:
        upper: R, [width, width], the dtype of the Gram.
        damping: the damping that succeeded, as a fraction of the mean diagonal.
        tried: every damping tried, in order.
    """

    upper: Float[Tensor, "width width"]
    damping: float
    tried: tuple[float, ...]


def factorise(gram: Float[Tensor, "width width"], damping: float, tokens: int) -> Factor:
    """Factorise gram + damping * mean(diagonal) * I, raising the damping where that fails.

    A dead input (zero diagonal) gets a diagonal of 1.

    Args:
        gram: [width, width], symmetric, finite; not changed.
        damping: fraction of the mean diagonal, >= 0.
        tokens: rows behind the Gram, for the error.

    Raises:
        NumericsError: no damping up to 1 makes it positive definite.
    """
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    tried: list[float] = []
    for fraction in (damping, *(step for step in _LADDER if step > damping)):
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
        fix="check the calibration text and the model's activations, or give this matrix another method by a rule",
    )


def _factorise_in_place(matrix: Tensor) -> bool:
    """Overwrite a symmetric matrix by the transpose of its lower factor; False if it is not positive definite.

    With rows and columns reversed, R is an ordinary lower factor, and widths of 30,000 leave no room for copies.
    """
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    # The transpose of a symmetric matrix is itself, and in the column-major order that LAPACK works in.
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
