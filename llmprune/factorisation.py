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
        with float32_products("ieee"):
            # With rows and columns reversed, R is an ordinary lower factor.
            lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            return Factor(lower.flip(0, 1), fraction, tuple(tried))
        del lower
    raise NumericsError(
        f"a Gram matrix of width {len(gram)} from {tokens} tokens is not positive definite at damping {tried} "
        f"(diagonal from {float(diagonal.min()):.3e} to {float(diagonal.max()):.3e}, mean {mean:.3e})",
        expected="a finite, symmetric Gram matrix",
        fix="check the calibration text and the model's activations, or give this matrix another method by a rule",
    )
