"""The second stage of a split sum: partial sums are added in a fixed order, so that the result is deterministic."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
_WARPS = 4


def add_splits(partials: Tensor, bias: Tensor | None, y: Tensor, splits: int) -> None:
    """Write the sum of partial products, and the bias, to y.

    Args:
        partials: float32, contiguous, at least `splits` times the elements of y: one product after another.
        bias: [out], contiguous, or None.
        y: [tokens, out], contiguous; overwritten.
        splits: at least 1.
    """
    grid = (triton.cdiv(y.numel(), BLOCK),)
    add_splits_kernel[grid](partials, bias, y, y.numel(), y.shape[1], splits, BLOCK=BLOCK, num_warps=_WARPS)


@triton.jit
def add_splits_kernel(partials, bias, y, elements, rows, splits, BLOCK: tl.constexpr):
    """One program for BLOCK elements of y."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(partials + element, mask=inside, other=0.0)
        partials += elements
    if bias is not None:
        total += tl.load(bias + element % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + element, total.to(y.dtype.element_ty), mask=inside)
