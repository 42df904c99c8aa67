"""Plain, slow references, written from the papers' formulas; they share no code with the package."""

from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import floor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmprune.patterns import NM, Block, Pattern, Unstructured


def textbook_sparsegpt(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv 2301.00774, with an explicit inverse and one column at a time.

    Args:
        weight: [out, in].
        gram: [in, in], the inputs' X X^T.
        pattern: an `Unstructured` mask is chosen for `block_size` columns at once, over all rows or inside each; N:M
            groups are decided one after another, from columns that are up to date; blocks (not in the paper) all at
            once, before the first column.
        damping: fraction of the mean diagonal that is added to the diagonal.
        block_size: columns between two long-range updates; rounded up to whole groups.
        dtype: in which everything is computed.

    Returns:
        The pruned weight [out, in] in `dtype` and its mask, True where a weight stays.
    """
    remaining, upper = weight.to(dtype, copy=True), inverse_cholesky(gram, damping, dtype)
    rows, width = remaining.shape
    remaining[:, gram.diagonal() == 0] = 0
    mask = torch.ones(rows, width, dtype=torch.bool)
    together = 1 if isinstance(pattern, Unstructured) else group_width(pattern)
    block_size = -(-block_size // together) * together
    if isinstance(pattern, Block):
        scores = remaining**2 / upper.diagonal() ** 2
        mask = torch.from_numpy(slow_mask(scores.numpy(), pattern))
    for first in range(0, width, block_size):
        last = min(first + block_size, width)
        errors = torch.zeros(rows, last - first, dtype=dtype)
        for column in range(first, last):
            decided = last - first if isinstance(pattern, Unstructured) else together
            if (column - first) % decided == 0 and not isinstance(pattern, Block):
                chosen = slice(column, column + decided)
                scores = remaining[:, chosen] ** 2 / upper.diagonal()[chosen] ** 2
                scores[:, gram.diagonal()[chosen] == 0] = 0
                mask[:, chosen] = torch.from_numpy(slow_mask(scores.numpy(), pattern, start=column))
            kept = remaining[:, column] * mask[:, column]
            errors[:, column - first] = (remaining[:, column] - kept) / upper[column, column]
            remaining[:, column:last] -= torch.outer(errors[:, column - first], upper[column, column:last])
            remaining[:, column] = kept
        remaining[:, last:] -= errors @ upper[first:last, last:]
    return remaining, mask


def inverse_cholesky(gram: Tensor, damping: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """U, upper triangular, with U^T U the inverse of the damped Gram; dead inputs have a diagonal of 1."""
    damped = gram.to(dtype, copy=True)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    damped.diagonal()[gram.diagonal() == 0] = 1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def slow_mask(scores: NDArray[np.floating], pattern: Pattern, start: int = 0) -> NDArray[np.bool_]:
    """Keep the highest scores by sorting; a tie goes against the lower index. For slices, see `Pattern.mask`."""
    rows, columns = scores.shape
    if isinstance(pattern, NM):
        groups = scores.reshape(-1, pattern.of)
        return np.stack([_drop_lowest(group, pattern.of - pattern.keep) for group in groups]).reshape(rows, columns)
    if isinstance(pattern, Block):
        height, breadth = pattern.size
        tiles = scores.reshape(rows // height, height, columns // breadth, breadth).sum(axis=(1, 3))
        kept = slow_mask(tiles, Unstructured(pattern.sparsity, pattern.over), start // breadth)
        return np.kron(kept, np.ones(pattern.size, dtype=bool))
    assert isinstance(pattern, Unstructured)
    unit = 1 if pattern.over == "row" else rows
    count = rounded(pattern.sparsity, unit * (start + columns)) - rounded(pattern.sparsity, unit * start)
    if pattern.over == "row":
        return np.stack([_drop_lowest(row, count) for row in scores])
    return _drop_lowest(scores.reshape(-1), count).reshape(rows, columns)


def violations(mask: Tensor, pattern: Pattern) -> list[str]:
    """Everything that is wrong with a mask [out, in] under a pattern; empty if it is legal."""
    keep = mask.tolist()
    rows, columns = mask.shape
    if isinstance(pattern, NM):
        return [
            f"row {row}, columns from {first}: {sum(keep[row][first : first + pattern.of])} kept"
            for row, first in product(range(rows), range(0, columns, pattern.of))
            if sum(keep[row][first : first + pattern.of]) != pattern.keep
        ]
    if isinstance(pattern, Block):
        return _block_violations(keep, pattern)
    assert isinstance(pattern, Unstructured)
    zeros = [row.count(False) for row in keep]
    if pattern.over == "row":
        return [f"row {row}: {count} zeros" for row, count in enumerate(zeros) if not _near(count, pattern, columns)]
    return [] if _near(sum(zeros), pattern, rows * columns) else [f"{sum(zeros)} zeros of {rows * columns}"]


def _block_violations(keep: list[list[bool]], pattern: Block) -> list[str]:
    height, breadth = pattern.size
    found, zeros = [], []
    for top in range(0, len(keep), height):
        zeros.append(0)
        for left in range(0, len(keep[0]), breadth):
            block = [keep[top + i][left + j] for i, j in product(range(height), range(breadth))]
            zeros[-1] += not any(block)
            if any(block) and not all(block):
                found.append(f"the block at row {top}, column {left} is broken")
    in_row = len(keep[0]) // breadth
    if pattern.over == "row":
        return found + [f"block row {row}: {n} zero" for row, n in enumerate(zeros) if not _near(n, pattern, in_row)]
    return found if _near(sum(zeros), pattern, len(zeros) * in_row) else [*found, f"{sum(zeros)} zero blocks"]


def group_width(pattern: Pattern) -> int:
    """Columns that a pattern decides together."""
    if isinstance(pattern, NM):
        return pattern.of
    return pattern.size[1] if isinstance(pattern, Block) else 1


def rounded(sparsity: float, total: int) -> int:
    """The number nearest to sparsity * total, halves up, with the sparsity read as it is printed."""
    return floor(Fraction(str(float(sparsity))) * total + Fraction(1, 2))


def wanda_scores(weight: Tensor, inputs: Tensor) -> Tensor:
    """|W_ij| * sqrt(mean_t X_jt^2) in float64, for inputs [tokens, in]."""
    scores = torch.empty(weight.shape, dtype=torch.float64)
    for column, values in enumerate(inputs.double().unbind(1)):
        mean_square = sum(float(value) ** 2 for value in values) / len(values)
        scores[:, column] = weight[:, column].double().abs() * mean_square**0.5
    return scores


def ria_scores(weight: Tensor, inputs: Tensor, power: float = 0.5) -> Tensor:
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||^power (Zhang et al., ICLR 2024), for [tokens, in].

    ||X_j|| is the root mean square over the tokens, which leaves the order of all scores as it is.
    """
    size, scores = weight.double().abs(), torch.empty(weight.shape, dtype=torch.float64)
    for i, j in product(range(weight.shape[0]), range(weight.shape[1])):
        column, row = sum(float(value) for value in size[:, j]), sum(float(value) for value in size[i])
        norm = (sum(float(value) ** 2 for value in inputs[:, j].double()) / len(inputs)) ** 0.5
        scores[i, j] = (float(size[i, j]) / column + float(size[i, j]) / row) * norm**power
    return scores


def textbook_admm(weight: Tensor, inputs: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Boza 2024 (arXiv 2401.02938) with its cubic ramp: 20 iterations, 15 of them on the ramp, rho 1.

    Weights [out, in] and mask, for inputs [tokens, in]; float64, row by row, with an explicit inverse. On the ramp, N:M
    (not in the paper) removes the nearest whole number a group, and blocks are judged by their sums of squares.
    """
    scale, hessian, target = _unit_diagonal(weight, inputs, 0.1)
    inverse = np.linalg.inv(hessian + np.eye(len(hessian)))
    found, multipliers = target.copy(), np.zeros_like(target)
    for step in range(20):
        if step < 15:
            share = 1 - (1 - (step + 1) / 15) ** 3
            mask = slow_mask((found + multipliers) ** 2, _part(pattern, share))
        kept = (found + multipliers) * mask
        multipliers = multipliers + found - kept
        for row in range(len(target)):
            found[row] = inverse @ (hessian @ target[row] + kept[row] - multipliers[row])
    return torch.from_numpy(kept / scale), torch.from_numpy(mask)


def textbook_alps(weight: Tensor, inputs: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """ALPS (arXiv 2406.07831): rho from 0.1, looked at every third iteration, until the support stands.

    Weights [out, in] and mask, for inputs [tokens, in]; float64, row by row, with explicit inverses. The second stage
    is solved exactly rather than by conjugate gradient. It begins with the largest scaled weights; blocks are judged by
    their sums of squares.
    """
    scale, hessian, target = _unit_diagonal(weight, inputs, 0.01)
    penalty, seen = 0.1, slow_mask(target**2, pattern)
    kept, multipliers, found = target * seen, np.zeros_like(target), np.zeros_like(target)
    for step in range(1, 301):
        inverse = np.linalg.inv(hessian + penalty * np.eye(len(hessian)))
        for row in range(len(target)):
            found[row] = inverse @ (hessian @ target[row] - multipliers[row] + penalty * kept[row])
        mask = slow_mask((found + multipliers / penalty) ** 2, pattern)
        kept = (found + multipliers / penalty) * mask
        multipliers = multipliers + penalty * (found - kept)
        if step % 3 == 0:
            entered = np.sum(mask & ~seen) / np.sum(mask)
            if entered == 0:
                break
            penalty *= 1.3 if entered > 0.1 else 1.2 if entered > 0.005 else 1.1
            seen = mask
    for row, keep in enumerate(mask):
        kept[row, keep] = np.linalg.inv(hessian[np.ix_(keep, keep)]) @ (hessian @ target[row])[keep]
    return torch.from_numpy(kept / scale), torch.from_numpy(mask)


def _unit_diagonal(
    weight: Tensor, inputs: Tensor, damping: float
) -> tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]:
    """s, the roots of the Gram's diagonal; the Gram of the inputs divided by it, damped; and the weights times it."""
    gram = inputs.double().numpy().T @ inputs.double().numpy()
    scale = np.sqrt(np.diag(gram))
    return scale, gram / np.outer(scale, scale) + damping * np.eye(len(gram)), weight.double().numpy() * scale


def _part(pattern: Pattern, share: float) -> Pattern:
    """The pattern with this share of its zeros."""
    if isinstance(pattern, NM):
        return NM(pattern.of - round((pattern.of - pattern.keep) * share), pattern.of)
    assert isinstance(pattern, Unstructured | Block)
    return replace(pattern, sparsity=pattern.sparsity * share)


def output_error(weight: Tensor, pruned: Tensor, inputs: Tensor) -> float:
    """||(W - V) X||^2 in float64, for inputs [tokens, in]."""
    return float((inputs.double() @ (weight.double() - pruned.double()).T).square().sum())


def least_squares(weight: Tensor, mask: Tensor, inputs: Tensor) -> Tensor:
    """The weights [out, in], zero outside the mask, with the lowest output error; float64, row by row."""
    X, best = inputs.double().numpy(), torch.zeros(weight.shape, dtype=torch.float64)
    for row in range(len(weight)):
        support = mask[row].nonzero().view(-1)
        if len(support):
            target = X @ weight[row].double().numpy()
            best[row, support] = torch.from_numpy(np.linalg.lstsq(X[:, support.numpy()], target, rcond=None)[0])
    return best


def correlated_inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs [tokens, width], float32, as in a transformer: few strong directions, and features of unequal scale."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)[:, None]
    scales = torch.exp(torch.randn(width, generator=generator))
    return torch.randn(tokens, width, generator=generator) @ directions * scales


def _drop_lowest(scores: NDArray[np.floating], count: int) -> NDArray[np.bool_]:
    keep = np.ones(len(scores), dtype=bool)
    keep[sorted(range(len(scores)), key=lambda index: (scores[index], index))[:count]] = False
    return keep


def _near(zeros: int, pattern: Unstructured | Block, total: int) -> bool:
    """Whether a count is the requested fraction, rounded either way where it lies halfway."""
    return abs(zeros - Fraction(str(float(pattern.sparsity))) * total) <= Fraction(1, 2)
