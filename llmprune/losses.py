"""The layer-wise loss that every solver minimises, and its record along a chain of steps."""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llmprune.precision import float32_products
from llmprune.statistics import Gram


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The loss after one part of a chain.

    Attributes:
        step: the step's name; empty for the method that chose the zeros.
        loss: tr((W - V) G (W - V)^T) / tr(W G W^T) afterwards, >= 0, on the rows of the statistics.
        undone: the loss that the step would have led to, if that was higher, so that it was undone; None otherwise.
    """

    step: str
    loss: float
    undone: float | None = None


def relative_loss(weight: Float[Tensor, "out in"], pruned: Float[Tensor, "out in"], gram: Gram) -> float:
    """tr((W - V) G (W - V)^T) / tr(W G W^T) on the rows of the statistics; 0 if the dense output is zero."""
    products = gram.products.to(weight.dtype)
    with float32_products("ieee"):
        total, lost = (_energy(matrix, products) for matrix in (weight, weight - pruned))
    return lost / total if total > 0 else 0.0


def _energy(matrix: Tensor, gram: Tensor) -> float:
    return max(float((matrix @ gram).mul_(matrix).sum(dtype=torch.float64)), 0.0)
