"""Matrices viewed as blocks, one per group of columns."""

import math

import torch
from torch import Tensor

from llmprune.precision import float32_products


class Breakdown(Exception):
    """A pivot is not positive: more damping is needed."""


def factor(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not bool(torch.isfinite(lower.diagonal()).all()):
        raise Breakdown
    return lower


def traces(pivots: Tensor, energies: Tensor) -> Tensor:
    """tr(pivot^-1 energy) of each block [..., size, size], >= 0; -inf where the pivot is not positive definite."""
    if pivots.shape[-1] == 1:
        pivot, energy = pivots[..., 0, 0], energies[..., 0, 0]
        return (energy / pivot).clamp_(min=0).masked_fill_(~(pivot > 0), -math.inf)
    lower, info = torch.linalg.cholesky_ex(pivots)
    traces = torch.cholesky_solve(energies, lower).diagonal(dim1=-2, dim2=-1).sum(-1)
    return traces.clamp_(min=0).masked_fill_(info != 0, -math.inf)


def times(left: Tensor, right: Tensor) -> Tensor:
    """The product of stacks of blocks; millions of 1 x 1 products are far faster as one elementwise product."""
    return left * right if left.shape[-2:] == right.shape[-2:] == (1, 1) else left @ right


def blocks(matrix: Tensor, size: int) -> Tensor:
    """[groups, groups, size, size], a view."""
    return matrix.unflatten(0, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 1, 3)


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """[groups, size, size], float64, a copy."""
    return blocks(matrix, size).diagonal(dim1=0, dim2=1).permute(2, 0, 1).to(torch.float64, copy=True)


def columns_by_group(rows: Tensor, size: int) -> Tensor:
    """[groups, rows, size], float64."""
    return rows.unflatten(1, (-1, size)).permute(1, 0, 2).double()


def loss(change: Tensor, gram: Tensor) -> float:
    """tr(C G C^T) for a change C [out, in] of a weight."""
    with float32_products("ieee"):
        return float(((change @ gram) * change).sum(dtype=torch.float64))
