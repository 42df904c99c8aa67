"""The column loop as one Triton kernel: each program takes a tile of rows through all columns of the block.

The pending sums [columns, rows] of the tile stay in registers. Column k is extracted by a masked reduction (registers
cannot be indexed dynamically), its error is computed, and its contribution R[k, k+1:] outer e_k is added to all columns
after k. This takes 4 columns^2 FLOP per block and row, far less than the cost of the launches that it replaces.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32
_WARPS = 8


@triton.jit
def _sweep_kernel(
    sums, original, upper, importance, keep,
    rows, columns, stride,
    N: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, COLUMNS)
    tile = column[:, None] * stride + row[None, :]
    present = (column < columns)[:, None] & inside[None, :]
    pending = tl.load(sums + tile, mask=present, other=0.0)
    group = tl.zeros([ROWS], tl.int32)
    for k in range(columns):
        if M > 0:  # noqa: SIM102 - M is a compile-time constant, k is not
            if k % M == 0:
                group = _choose(pending, original, upper, importance, row, inside, column, k, columns, stride, N, M)
        here = tl.sum(tl.where((column == k)[:, None], pending, 0.0), axis=0)
        weight = tl.load(original + k * stride + row, mask=inside, other=0.0)
        if M > 0:
            stays = ((group >> (k % M)) & 1) != 0
            tl.store(keep + k * stride + row, stays.to(tl.int8), mask=inside)
        else:
            stays = tl.load(keep + k * stride + row, mask=inside, other=0) != 0
        error = tl.where(stays, -here / tl.load(upper + k * columns + k), weight)
        tl.store(sums + k * stride + row, error, mask=inside)
        share = tl.load(upper + k * columns + column, mask=(column > k) & (column < columns), other=0.0)
        pending += share[:, None] * error[None, :]


@triton.jit
def _choose(
    pending, original, upper, importance, row, inside, column, first, columns, stride, N: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Which of the columns first, first + 1, ... first + M - 1 are kept: bit i for column first + i."""
    relaxed = pending
    for i in tl.static_range(M):
        k = first + i
        here = tl.sum(tl.where((column == k)[:, None], relaxed, 0.0), axis=0)
        moved = -here / tl.load(upper + k * columns + k)
        share = tl.load(upper + k * columns + column, mask=(column > k) & (column < first + M), other=0.0)
        relaxed += share[:, None] * moved[None, :]
    scores = ()
    for i in tl.static_range(M):
        scores = scores + (  # noqa: RUF005 - Triton does not unpack
            _score(relaxed, original, upper, importance, row, inside, column, first + i, columns, stride),
        )
    stays = tl.zeros_like(row)
    for i in tl.static_range(M):
        beaten_by = tl.zeros_like(row)
        for j in tl.static_range(M):
            if j != i:
                # Among ties the lower column index is pruned first.
                wins = (scores[j] >= scores[i]) if j > i else (scores[j] > scores[i])
                beaten_by += wins.to(tl.int32)
        stays += (beaten_by < N).to(tl.int32) << i
    return stays


@triton.jit
def _score(relaxed, original, upper, importance, row, inside, column, k, columns, stride):
    here = tl.sum(tl.where((column == k)[:, None], relaxed, 0.0), axis=0)
    value = tl.load(original + k * stride + row, mask=inside, other=0.0) + here / tl.load(upper + k * columns + k)
    return value * value * tl.load(importance + k)


def sweep_block_triton(
    sums: Tensor, original: Tensor, upper: Tensor, importance: Tensor, keep: Tensor, group: tuple[int, int] | None
) -> None:
    """See `sweep_block`."""
    assert sums.is_contiguous(), "it is filled in place"
    assert keep.is_contiguous(), "it is filled in place"
    columns, rows = sums.shape
    n, m = group or (0, 0)
    _sweep_kernel[(triton.cdiv(rows, _ROWS),)](
        sums, original.contiguous(), upper.contiguous(), importance.contiguous(), keep.view(torch.int8),
        rows, columns, rows,
        N=n, M=m, COLUMNS=max(triton.next_power_of_2(columns), 16), ROWS=_ROWS, num_warps=_WARPS,
    )  # fmt: skip
