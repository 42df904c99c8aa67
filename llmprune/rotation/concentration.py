"""How concentrated the pruning scores of a matrix are after a rotation, as an entropy.

The residual stream can be rotated by an orthogonal R without changing what a model computes: a matrix that reads it
becomes W R, and one that writes to it R^T W. The values of each KV head can be rotated by a further R2. The score of a
weight is that of SparseGPT, w_ij^2 / (G^-1)_jj, with G the Gram matrix of the inputs. Normalised to a sum of 1 over a
row or a column, the scores are a distribution p; the lower its entropy, sum of -p log p, the fewer weights matter, and
the less is lost with the others. After DenoiseRotator (Gu et al. 2025, arXiv 2505.23049), which leaves its rotations in
the network, one pair in each layer; one rotation for all layers can be absorbed into the weights.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Far below any share of a row that matters; keeps the logarithm and its gradient finite where a weight is zero.
_SMALLEST = 1e-20


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
        inverse: inverse of the damped Gram matrix of their input, [hidden, hidden].
        values: which rows are the values of attention; None: none of them.
    """

    weight: Float[Tensor, "rows hidden"]
    inverse: Float[Tensor, "hidden hidden"]
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


def entropy(scores: Float[Tensor, "..."], dim: int) -> Float[Tensor, ""]:
    """The sum over all rows (dim -1) or columns (dim -2) of sum -p log p, p = scores / their sum, in nats.

    Args:
        scores: at least 0.
        dim: along which they are compared.
    """
    shares = scores / scores.sum(dim, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    return torch.special.entr(shares.clamp_min(_SMALLEST)).sum()


def reader_entropy(
    reader: Reader, rotation: Float[Tensor, "hidden hidden"], heads: Float[Tensor, "heads size size"] | None = None
) -> Float[Tensor, ""]:
    """Entropy of every row of W R, scored by (R^T G^-1 R)_jj; of the values' columns, too, if those are rotated.

    Args:
        reader: the matrices.
        rotation: R.
        heads: R2 of each KV head.
    """
    turned = reader.weight @ rotation
    scales = ((reader.inverse @ rotation) * rotation).sum(0)
    if reader.values is None or heads is None:
        return entropy(turned.square() / scales, -1)
    turned = reader.values.rotate(turned, heads, 0)
    scores = turned.square() / scales
    return entropy(scores, -1) + entropy(scores[reader.values.index.flatten().to(scores.device)], -2)


def writer_entropy(
    writer: Writer, rotation: Float[Tensor, "hidden hidden"], heads: Float[Tensor, "heads size size"] | None = None
) -> Float[Tensor, ""]:
    """Entropy of every column of R^T W, scored by (G^-1)_jj; of the rows, too, if the inputs are rotated by R2.

    Args:
        writer: the matrices.
        rotation: R.
        heads: R2 of each KV head.
    """
    turned = rotation.mT @ writer.weight
    if writer.values is None or heads is None:
        return entropy(turned.square() / writer.diagonal[:, None], -2)
    turned = writer.values.rotate(turned, heads, -1)
    blocks = torch.einsum("hde,hcdf,hfe->hce", heads, writer.diagonal, heads)
    order = writer.values.index.flatten().to(turned.device)
    scales = torch.ones(turned.shape[-1], device=turned.device, dtype=turned.dtype)
    scores = turned.square() / scales.index_copy(0, order, blocks.flatten())
    return entropy(scores, -2) + entropy(scores, -1)
