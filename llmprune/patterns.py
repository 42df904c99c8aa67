"""Sparsity patterns: frozen values that know exactly how many weights to zero, and choose them by their scores.

A pattern is parsed from a string and prints back to it:

    0.5          half of the weights, compared as the method's paper compares them
    0.5/row      compared inside each output row (also /matrix, /layer)
    2:4          two of every four consecutive input weights are kept
    0.5@64x64    half of the 64 x 64 blocks are zero (also /row: the same number of blocks in each block row)

All top-k selection of the project happens here: the count is exact, and among ties the lower index is pruned first.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from llmprune.errors import NumericsError, PatternError
from llmprune.kernels.cpu import keep_in_groups_compiled

Scope = Literal["row", "matrix", "layer"]

_SYNTAX = "a sparsity such as 0.5, 0.5/row, 0.5/matrix or 0.5/layer, N:M such as 2:4, or blocks such as 0.5@64x64"


@runtime_checkable  # so that annotations that name it can be executed in the tests
class Pattern(Protocol):
    """What a method needs to know about the zeros it may create."""

    @property
    def column_multiple(self) -> int:
        """Columns that must be decided together; a slice passed to `mask` starts and ends on a multiple."""

    @property
    def sparsity(self) -> float:
        """The fraction of weights set to zero, in [0, 1]."""

    def check(self, shape: tuple[int, int]) -> None:
        """Raise `PatternError` if the pattern does not fit a matrix of this shape [out, in]."""

    def zeros(self, shape: tuple[int, int]) -> int:
        """The exact number of zeros in a matrix of this shape."""

    def compared(self, over: Scope) -> "Pattern":
        """The same pattern, with the comparison scope filled in where it was left to the method."""

    def mask(self, scores: Shaped[Tensor, "out columns"], *, start: int = 0) -> Bool[Tensor, "out columns"]:
        """Keep the highest scores.

        Args:
            scores: [out, columns], any real dtype, no NaN. Among ties the lower index is dropped first.
            start: first column of the slice, where `scores` is a slice of a wider matrix.

        Returns:
            True where the weight is kept. The zeros of consecutive slices add up to `zeros` of the whole matrix.

        Raises:
            PatternError: the pattern does not divide the shape.
            NumericsError: a score is NaN.
        """


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Any weight may be zero.

    Attributes:
        sparsity: fraction set to zero, in [0, 1].
        over: the scope in which scores are compared; None leaves it to the method (Wanda: row, magnitude: matrix).
    """

    sparsity: float
    over: Scope | None = None

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)

    def __str__(self) -> str:
        return f"{float(self.sparsity)!r}" + (f"/{self.over}" if self.over else "")

    @property
    def column_multiple(self) -> int:
        return 1

    def check(self, shape: tuple[int, int]) -> None:
        pass

    def zeros(self, shape: tuple[int, int]) -> int:
        rows, columns = shape
        return rows * _count(self.sparsity, columns) if self.over == "row" else _count(self.sparsity, rows * columns)

    def compared(self, over: Scope) -> "Unstructured":
        return self if self.over else replace(self, over=over)

    def mask(self, scores: Shaped[Tensor, "out columns"], *, start: int = 0) -> Bool[Tensor, "out columns"]:
        rows, columns = scores.shape
        unit = 1 if self.over == "row" else rows
        count = _count(self.sparsity, unit * (start + columns)) - _count(self.sparsity, unit * start)
        return keep_highest(scores, count) if self.over == "row" else _keep_highest_of_all(scores, count)


@dataclass(frozen=True, slots=True)
class NM:
    """Keep `keep` of every `of` consecutive weights along the input dimension.

    Projects disagree on what N counts (wanda and llm-compressor: the removed weights); the field names say it.
    """

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not (0 <= self.keep <= self.of and self.of >= 1):
            raise PatternError(
                f"pattern {self.keep}:{self.of}",
                expected="0 <= N <= M and M >= 1 in N:M",
                fix="N of every M consecutive weights are kept: 2:4 keeps 2 of every 4",
            )

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def column_multiple(self) -> int:
        return self.of

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.of

    def check(self, shape: tuple[int, int]) -> None:
        if shape[1] % self.of:
            raise PatternError(
                f"pattern {self} on a matrix of {shape[0]} x {shape[1]} (out x in)",
                expected=f"an input dimension that is a multiple of {self.of}",
                fix="give this matrix another pattern with a rule, or exclude it",
            )

    def zeros(self, shape: tuple[int, int]) -> int:
        self.check(shape)
        return shape[0] * (shape[1] // self.of) * (self.of - self.keep)

    def compared(self, over: Scope) -> "NM":
        return self

    def mask(self, scores: Shaped[Tensor, "out columns"], *, start: int = 0) -> Bool[Tensor, "out columns"]:
        rows, columns = scores.shape
        self.check((rows, columns))
        groups = scores.reshape(-1, self.of)
        return _keep_in_groups(groups, self.keep).view(rows, columns)


@dataclass(frozen=True, slots=True)
class Block:
    """Whole blocks are zero; a block's score is the sum of its weights' scores.

    Attributes:
        sparsity: fraction of the blocks set to zero, in [0, 1].
        size: (rows, columns) of a block, along out and in.
        over: "matrix" compares all blocks; "row" removes the same number from each row of blocks.
    """

    sparsity: float
    size: tuple[int, int]
    over: Literal["matrix", "row"] = "matrix"

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        if min(self.size) < 1:
            raise PatternError(f"block size {self.size[0]}x{self.size[1]}", expected="at least 1x1")

    def __str__(self) -> str:
        return f"{float(self.sparsity)!r}@{self.size[0]}x{self.size[1]}" + ("/row" if self.over == "row" else "")

    @property
    def column_multiple(self) -> int:
        return self.size[1]

    def check(self, shape: tuple[int, int]) -> None:
        if shape[0] % self.size[0] or shape[1] % self.size[1]:
            raise PatternError(
                f"blocks of {self.size[0]}x{self.size[1]} on a matrix of {shape[0]} x {shape[1]} (out x in)",
                expected="blocks that divide both dimensions",
                fix="choose a smaller block, give this matrix another pattern with a rule, or exclude it",
            )

    def zeros(self, shape: tuple[int, int]) -> int:
        self.check(shape)
        rows, columns = shape[0] // self.size[0], shape[1] // self.size[1]
        return self._blocks.zeros((rows, columns)) * self.size[0] * self.size[1]

    @property
    def _blocks(self) -> Unstructured:
        return Unstructured(self.sparsity, self.over)

    def compared(self, over: Scope) -> "Block":
        return self

    def mask(self, scores: Shaped[Tensor, "out columns"], *, start: int = 0) -> Bool[Tensor, "out columns"]:
        rows, columns = scores.shape
        self.check((rows, columns))
        height, breadth = self.size
        tiles = scores.reshape(rows // height, height, columns // breadth, breadth)
        blocks = self._blocks.mask(tiles.sum(dim=(1, 3)), start=start // breadth)
        return blocks.repeat_interleave(height, 0).repeat_interleave(breadth, 1)


def parse(text: str | float) -> Pattern:
    """Read a pattern; the inverse of `str`.

    Raises:
        PatternError: the text is not a pattern, or a number is out of range.

    Example:
        >>> parse("2:4")
        NM(keep=2, of=4)
    """
    text = str(text).strip()
    if not text.isascii():  # the digits of other scripts are digits to `re` and `int`
        raise PatternError(f"pattern {text!r} cannot be read", expected=_SYNTAX)
    if text == "dense":
        return Unstructured(0.0)
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    number = r"([-+]?[\d.]+(?:e[-+]?\d+)?)(%?)"
    if match := re.fullmatch(number + r"@(\d+)x(\d+)(?:/(row|matrix))?", text):
        over = "row" if match[5] == "row" else "matrix"
        return Block(_number(match[1], match[2], text), (int(match[3]), int(match[4])), over)  # type: ignore[arg-type]
    if match := re.fullmatch(number + r"(?:/(row|matrix|layer))?", text):
        return Unstructured(_number(match[1], match[2], text), match[3])  # type: ignore[arg-type]
    raise PatternError(f"pattern {text!r} cannot be read", expected=_SYNTAX)


def layer_shares(scores: dict[str, Shaped[Tensor, "..."]], sparsity: float) -> dict[str, Unstructured]:
    """Distribute one sparsity over the matrices of a layer by ranking all their scores together.

    Returns:
        For each name the pattern of its matrix (compared within the matrix); the zeros add up exactly.
    """
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    keep = keep_highest(flat.view(1, -1), _count(sparsity, flat.numel())).view(-1)
    parts = keep.split([s.numel() for s in scores.values()])
    return {
        name: Unstructured(1 - int(part.sum()) / max(part.numel(), 1), "matrix")
        for name, part in zip(scores, parts, strict=True)
    }


def keep_highest(scores: Shaped[Tensor, "groups n"], count: int) -> Bool[Tensor, "groups n"]:
    """Drop the `count` lowest scores of each group; True where a score is kept.

    Ties are broken by index: the lower index is dropped first. Linear time (selection, not sorting).

    Raises:
        NumericsError: a score is NaN.
    """
    _refuse_nan(scores)
    if count <= 0 or scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if count >= scores.shape[-1]:
        return torch.zeros_like(scores, dtype=torch.bool)
    scores = _comparable(scores)
    threshold = _kth_smallest(scores, count)
    keep = _compare(operator.gt, scores, threshold)
    missing = scores.shape[-1] - count - _count_each(keep)
    if len(keep) == 1 and int(missing):
        _keep_last(keep[0], _compare(operator.eq, scores[0], threshold[0]), int(missing))
    elif len(groups := missing.nonzero().view(-1)):
        keep[groups] |= _last_tied(_compare(operator.eq, scores, threshold)[groups], missing[groups])
    return keep


def highest(scores: Shaped[Tensor, "rows n"], count: int) -> Shaped[Tensor, "rows count"]:
    """The `count` highest scores of each row, in descending order."""
    return scores.topk(count, dim=-1).values


def lowest(scores: Shaped[Tensor, "rows n"], count: int) -> Shaped[Tensor, "rows count"]:
    """The places of the `count` lowest scores of each row, in no particular order."""
    return scores.topk(count, dim=-1, largest=False, sorted=False).indices


def ranks(scores: Shaped[Tensor, " n"]) -> Shaped[Tensor, " n"]:
    """The place of each score in ascending order, from 0; among ties the lower index comes first."""
    order = scores.sort(stable=True).indices
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places


def kept_first(mask: Bool[Tensor, "rows n"]) -> Shaped[Tensor, "rows n"]:
    """For each row the places where it is True, in ascending order, and then those where it is False."""
    return mask.sort(dim=1, descending=True, stable=True).indices


def _keep_highest_of_all(scores: Tensor, count: int) -> Tensor:
    """`keep_highest` with the whole matrix as one group; a transposed matrix is read in memory order."""
    if scores.is_contiguous():
        return keep_highest(scores.view(1, -1), count).view(scores.shape)
    if not 0 < count < scores.numel():
        return keep_highest(scores, count)
    _refuse_nan(scores)
    scores = _comparable(scores)
    threshold = _kth_smallest(scores.mT.reshape(1, -1), count)
    keep = scores > threshold
    if missing := scores.numel() - count - int(keep.count_nonzero()):
        _keep_last(keep, scores == threshold, missing)
    return keep


def _keep_last(keep: Tensor, tied: Tensor, count: int) -> None:
    """Keep the last `count` of the tied scores, in place."""
    places = tied.nonzero()
    keep[places[len(places) - count :].unbind(1)] = True


def _last_tied(tied: Tensor, counts: Tensor) -> Tensor:
    """Of the tied scores of each group, the last so many: those that fewer than that follow."""
    cpu = tied.is_cpu  # where torch takes five times as long as numpy
    place = torch.from_numpy(np.cumsum(tied.numpy(), -1, np.int32)) if cpu else tied.cumsum(-1, dtype=torch.int32)
    return tied.logical_and_(place > (place[:, -1] - counts).int()[:, None])


def _comparable(scores: Tensor) -> Tensor:
    """The scores in a dtype that numpy knows, if they are on a CPU; 16-bit floats become wider, in the same order."""
    return scores.float() if scores.is_cpu and scores.dtype in (torch.bfloat16, torch.float16) else scores


def _compare(relation: Callable[..., Any], scores: Tensor, threshold: Tensor) -> Tensor:
    """Compare each score with its threshold; numpy does so ten times as fast on a CPU."""
    if scores.is_cpu:
        return torch.from_numpy(relation(scores.detach().numpy(), threshold.numpy()))
    return relation(scores, threshold)


def _count_each(mask: Tensor) -> Tensor:
    """How many are True in each group; torch would add them up one by one."""
    if not mask.is_cpu:
        return mask.sum(-1)
    if len(mask) == 1:  # far faster than along an axis
        return torch.tensor([np.count_nonzero(mask.numpy())])
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=-1))


def _refuse_nan(scores: Tensor) -> None:
    # amax propagates NaN, so that one pass without a mask suffices.
    if scores.numel() and bool(torch.isnan(scores.amax())):
        raise NumericsError(f"{int(torch.isnan(scores).sum())} of {scores.numel()} scores are NaN")


def _kth_smallest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th smallest of each row as [groups, 1]; numpy's vectorised selection is far faster on a CPU."""
    if scores.is_cpu:
        return torch.from_numpy(np.partition(scores.detach().numpy(), count - 1)[:, count - 1 : count].copy())
    return torch.kthvalue(scores, count, dim=-1, keepdim=True).values


def _keep_in_groups(groups: Tensor, keep: int) -> Tensor:
    """Keep the `keep` highest of each group; up to a length of 16, comparing all pairs is cheaper than selection."""
    size = groups.shape[1]
    if (found := keep_in_groups_compiled(groups, keep)) is not None:
        _refuse_nan(groups)
        return found
    if size > 16:
        return keep_highest(groups, size - keep)
    _refuse_nan(groups)
    columns = groups.unbind(1)
    beaten_by = torch.zeros(groups.shape, dtype=torch.uint8, device=groups.device)
    for low in range(size):
        for high in range(low + 1, size):
            later_wins = columns[high] >= columns[low]
            beaten_by[:, low] += later_wins
            beaten_by[:, high] += ~later_wins
    return beaten_by < keep


def _count(sparsity: float, total: int) -> int:
    return math.floor(sparsity * total + 0.5)


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity <= 1:
        fix = "write 0.5 or 50% for half"
        raise PatternError(f"sparsity {sparsity}", expected="the fraction set to zero, in [0, 1]", fix=fix)


def _number(text: str, percent: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise PatternError(f"pattern {whole!r} cannot be read", expected=_SYNTAX) from None
    return value / 100 if percent else value
