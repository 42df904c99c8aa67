"""Matrix products of known precision: exact products of the inputs, float32 sums, fast where the hardware allows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def float32_products(mode: str) -> Iterator[None]:
    """Set how float32 matrix products are formed, on CPU and CUDA, and restore it afterwards.

    Args:
        mode: "ieee" for full float32, or "bf16" to round the inputs to bfloat16 first (CPU only; sums stay float32).
    """
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    cuda: Any = torch.backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision, cuda.fp32_precision = mode, "ieee"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before


# Columns of a Gram that are formed by one product.
_PANEL = 1024


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add the lower triangle of x^T x to `total` in place, with exact products and sums in the dtype of `total`.

    bfloat16 inputs multiply on the matrix units: on CUDA with float32 output, on a CPU by a float32 product that may
    round its inputs to bfloat16, which changes nothing because they are bfloat16 already. What lies above the diagonal
    is left in an unspecified state: `mirror_lower` completes it.

    Args:
        total: [in, in], float32 or float64.
        x: [tokens, in], any floating dtype.
    """
    on_cuda = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and total.dtype == torch.float32
    rows = x if on_cuda else x.to(total.dtype)
    with float32_products("bf16" if x.dtype == torch.bfloat16 and not x.is_cuda else "ieee"):
        for start in range(0, x.shape[1], _PANEL):
            stop = start + _PANEL
            left, right = rows[:, start:].T, rows[:, start:stop]
            if on_cuda:
                total[start:, start:stop] += torch.mm(left, right, out_dtype=torch.float32)
            else:
                total[start:, start:stop].addmm_(left, right)


def mirror_lower(total: Tensor) -> None:
    """Complete a symmetric matrix whose lower triangle was summed by `add_gram`, in place and to the bit."""
    for start in range(0, len(total), _PANEL):
        stop = min(start + _PANEL, len(total))
        corner = total[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        total[start:stop, stop:] = total[stop:, start:stop].T
