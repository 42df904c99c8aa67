"""Expand 2:4 weights to the dense matrix, in the caller's memory, for a library's matmul.

It only moves bits, so 16-bit weights of any dtype are exact. Bound by bandwidth: 0.5625 of the dense bytes are read,
all of them written. A group of four weights, two of them stored, is one 64-bit word: (v0 << 16 i0) | (v1 << 16 i1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes of metadata per program; each describes two groups, or 16 dense bytes.
_BLOCK = 512
_WARPS = 4


@triton.jit
def spread(pair, nibble):
    """Put the two values of each group at their indices.

    Args:
        pair: int64, v0 | v1 << 16.
        nibble: int64, i0 | i1 << 2; higher bits do not matter.

    Returns:
        int64: the group's four weights, the first in the lowest bits.
    """
    first = (pair & 0xFFFF) << ((nibble & 3) << 4)
    second = ((pair >> 16) & 0xFFFF) << (((nibble >> 2) & 3) << 4)
    return first | second


@triton.jit
def _expand_kernel(values, meta, out, count, BLOCK: tl.constexpr):
    """All three are flat: byte b of meta describes word b of values and words 2b, 2b + 1 of the output."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    inside = index < count - start
    pairs = tl.load(values + start + index, mask=inside, other=0)
    nibbles = tl.load(meta + start + index, mask=inside, other=0).to(tl.int64)
    words = tl.join(spread(pairs, nibbles), spread(pairs >> 32, nibbles >> 4)).reshape(2 * BLOCK)
    place = tl.arange(0, 2 * BLOCK)
    tl.store(out + 2 * start + place, words, mask=place < 2 * (count - start))


@triton.jit
def _expand_fragments_kernel(a, e, out, rows, groups, slices):
    """One program: 16 rows × 256 columns.

    A word of `a` is the pair of one group. They are stored as [k32, row % 8, group % 4, group // 4 % 2, row // 8]; the
    dense matrix needs [row // 8, row % 8, k32, group // 4 % 2, group % 4].
    """
    part, tile = tl.program_id(0), tl.program_id(1)
    block = (tile * slices + part).to(tl.int64)
    pairs = tl.load(a + block * 1024 + tl.arange(0, 1024)).to(tl.int64).reshape(8, 8, 4, 2, 2)
    # A word of `e`: 16 columns (c) of two rows, r and r + 8; [row, k32 % 2, c, k32 // 2] -> [k32, row, c].
    codes = tl.load(e + block * 128 + tl.arange(0, 128)).reshape(8, 2, 2, 4)
    codes = codes.permute(3, 1, 0, 2).reshape(8, 8, 2)[:, :, None, :, None]
    group = tl.arange(0, 4)[None, None, :, None, None]
    half = tl.arange(0, 2)[None, None, None, None, :]
    nibbles = (codes >> (16 * half + 4 * group)).to(tl.int64)
    words = spread(pairs, nibbles).permute(4, 1, 0, 3, 2).reshape(16, 64)
    row = tile * 16 + tl.arange(0, 16)[:, None]
    column = part * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + row.to(tl.int64) * groups + column, words, mask=(row < rows) & (column < groups))


def expand(values: Tensor, meta: Tensor, out: Tensor) -> None:
    """Write the dense matrix of the disk layout.

    Args:
        values: [out_features, in_features / 2], a 16-bit type, contiguous.
        meta: [out_features, in_features / 8], uint8, contiguous.
        out: [out_features, in_features], of the values' type, contiguous; overwritten.
    """
    count = meta.numel()
    if count:
        words = values.view(torch.int64), meta, out.view(torch.int64)
        _expand_kernel[(triton.cdiv(count, _BLOCK),)](*words, count, BLOCK=_BLOCK, num_warps=_WARPS)


def expand_fragments(a: Tensor, e: Tensor, out: Tensor) -> None:
    """Write the dense matrix of weights in fragment order.

    Args:
        a: [tiles, slices, 8, 32, 4], int32, contiguous: pairs of values; a tile has 16 rows, a slice 256 columns.
        e: [tiles, slices, 32, 4], int32, contiguous: their indices.
        out: [out_features, in_features], a 16-bit type, contiguous; overwritten. Padding rows and columns are omitted.
    """
    rows, columns = out.shape
    tiles, slices = a.shape[:2]
    if out.numel():
        words = out.view(torch.int64)
        _expand_fragments_kernel[(slices, tiles)](a, e, words, rows, columns // 4, slices, num_warps=_WARPS)
