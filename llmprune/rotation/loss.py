"""What pruning would take from a matrix after a rotation.

The residual stream can be rotated by an orthogonal R without changing what a model computes: a matrix that reads it
becomes W R, and one that writes to it R^T W. The values of each KV head can be rotated by a further R2. The score of a
weight is that of SparseGPT, w_ij^2 / (G^-1)_jj, with G the Gram matrix of the inputs: the error of the output if this
weight alone is removed, and the others compensate for it. What a pattern takes is the sum of the scores that it drops.
Its logarithm, over all matrices, is the loss: each is compared with itself, whatever the size of its outputs.

DenoiseRotator (Gu et al. 2025, arXiv 2505.23049) minimises the entropy of these scores, which knows no pattern, and
leaves its rotations in the network, a pair in each layer; one rotation for all layers can be absorbed into the weights.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmprune.patterns import Pattern


@dataclass(frozen=True, slots=True, eq=False)
class HeadIndex:
    """Which outputs of a matrix, or which inputs, are the values of each KV head.

    Attributes:
        index: int64 [heads, copies, size]: copies is 1 for the outputs of V, and the number of query heads of each KV
            head for the inputs of O. Every element occurs once.
    """

    index: Int[Tensor, "heads copies size"]

    def rotate(self, matrix: Tensor, heads: Tensor, dim: int) -> Tensor:
        """Rotate along one dimension.

        Args:
            matrix: any shape; the elements of `dim` that are no values stay as they are.
            heads: R2 of each head, [heads, size, size].
            dim: the dimension that `index` refers to.

        Returns:
            A new tensor: every vector v of values along `dim` has become R2^T v.
        """
        last = matrix.movedim(dim, -1)
        flat = self.index.flatten().to(matrix.device)
        values = last.index_select(-1, flat).unflatten(-1, self.index.shape)
        turned = torch.einsum("...hcd,hde->...hce", values, heads)
        return last.index_copy(-1, flat, turned.flatten(-3)).movedim(-1, dim)


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """Matrices that read the residual stream.

    Attributes:
        weight: [rows, hidden]; several matrices with the same input may lie below each other.
        values: which rows are the values of attention; None: none of them.
    """

    weight: Float[Tensor, "rows hidden"]
    values: HeadIndex | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Writer:
    """Matrices that write to the residual stream, for example those of all experts.

    Attributes:
        weight: [matrices, hidden, in].
        diagonal: of the inverse of the damped Gram matrix of each one's inputs, [matrices, in]; with `values`, instead
            of it, the blocks [heads, copies, size, size] of that inverse that belong to one head.
        values: which inputs are the values of attention; None: none of them.
    """

    weight: Float[Tensor, "matrices hidden width"]
    diagonal: Float[Tensor, "..."]
    values: HeadIndex | None = None


def input_scales(
    inverse: Float[Tensor, "hidden hidden"], rotation: Float[Tensor, "hidden hidden"]
) -> Float[Tensor, " hidden"]:
    """(R^T G^-1 R)_jj: what the scores of all matrices that read a rotated input are divided by."""
    return ((inverse @ rotation) * rotation).sum(0)


def reader_scores(
    reader: Reader,
    scales: Float[Tensor, " hidden"],
    rotation: Float[Tensor, "hidden hidden"],
    heads: Float[Tensor, "heads size size"] | None = None,
) -> Float[Tensor, "rows hidden"]:
    """Scores of W R.

    Args:
        reader: the matrices.
        scales: of their input, by `input_scales`.
        rotation: R.
        heads: R2 of each KV head; None: the values are not rotated.
    """
    turned = reader.weight @ rotation
    if reader.values is not None and heads is not None:
        turned = reader.values.rotate(turned, heads, 0)
    return turned.square() / scales


def writer_scores(
    writer: Writer, rotation: Float[Tensor, "hidden hidden"], heads: Float[Tensor, "heads size size"] | None = None
) -> Float[Tensor, "matrices hidden width"]:
    """Scores of R^T W, whose inputs have (G^-1)_jj, or those rotated by R2.

    Args:
        writer: the matrices.
        rotation: R.
        heads: R2 of each KV head; None: the values are not rotated.
    """
    turned = rotation.mT @ writer.weight
    if writer.values is None:
        return turned.square() / writer.diagonal[:, None]
    if heads is None:
        blocks = writer.diagonal.diagonal(dim1=-2, dim2=-1)
    else:
        turned = writer.values.rotate(turned, heads, -1)
        blocks = torch.einsum("hde,hcdf,hfe->hce", heads, writer.diagonal, heads)
    order = writer.values.index.flatten().to(turned.device)
    scales = torch.ones(turned.shape[-1], device=turned.device, dtype=turned.dtype)
    return turned.square() / scales.index_copy(0, order, blocks.flatten())


def log_dropped(scores: Float[Tensor, "*matrices out columns"], pattern: Pattern) -> Float[Tensor, ""]:
    """The logarithm of the sum of the scores that a pattern drops, differentiable.

    Args:
        scores: of one matrix, or of several that are compared together.
        pattern: with a scope of comparison.

    Raises:
        PatternError: the pattern does not divide the shape.
        NumericsError: a score is NaN.
    """
    rows = scores.flatten(0, -2)
    dropped = (rows * ~pattern.mask(rows.detach())).sum()
    # Nothing is dropped from a matrix of zeros, or at a sparsity of 0: a constant, without a gradient.
    return dropped.clamp_min(torch.finfo(scores.dtype).tiny).log()
