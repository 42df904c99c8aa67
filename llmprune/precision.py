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


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add x^T x to `total` in place, with exact products and sums in the dtype of `total`.

    bfloat16 inputs multiply on the matrix units: on CUDA with float32 output, on a CPU by a float32 product that may
    round its inputs to bfloat16, which changes nothing because they are bfloat16 already.

    Args:
        total: [in, in], float32 or float64.
        x: [tokens, in], any floating dtype.
    """
    if total.dtype == torch.float64:
        total.addmm_(x.T.double(), x.double())
    elif x.dtype in (torch.bfloat16, torch.float16) and x.is_cuda:
        total += torch.mm(x.T, x, out_dtype=torch.float32)
    else:
        wide = x.float()
        with float32_products("bf16" if x.dtype == torch.bfloat16 else "ieee"):
            total.addmm_(wide.T, wide)
