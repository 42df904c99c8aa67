"""Matmuls of known precision: exact products of the inputs, float32 sums, fast where the hardware allows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llmprune.kernels.cpu import add_gram_compiled


@contextmanager
def float32_products(mode: str) -> Iterator[None]:
    """Set how float32 matmuls are computed, on CPU and CUDA, and restore it afterwards.

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


def computed_in(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which to compute a model that is stored in this dtype.

    The same dtype, or float32 on a CPU without instructions for it: there PyTorch multiplies 16-bit numbers one at a
    time (0.9 GFLOP/s in bfloat16 compared with 133 in float32, two cores with AVX2).
    """
    # Decided by a property of the processor, not by a measurement: results must not depend on a noisy moment.
    native = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(stored)
    if device.type != "cpu" or native is None:
        return stored
    supported = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, native)()
    return stored if supported else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name as recipes and reports write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


# Columns of a Gram matrix that one matmul computes.
_PANEL = 1024


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add the lower triangle of x^T x to `total` in place, with exact products and sums in the dtype of `total`.

    bfloat16 inputs multiply in bfloat16: on CUDA with float32 output, on a CPU by the compiled kernels, or by a float32
    product that may round its inputs to bfloat16, which changes nothing because they are bfloat16 already. Everything
    above the diagonal is left unspecified: `mirror_lower` completes it.

    Args:
        total: [in, in], float32 or float64.
        x: [tokens, in], any floating dtype.
    """
    if add_gram_compiled(total, x):
        return
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


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to `total` in place, computed as `add_gram` does.

    Args:
        total: [in, in], float32 or float64.
        left: [tokens, in], any floating dtype.
        right: [tokens, in], of the same dtype.
    """
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16) and total.dtype == torch.float32:
        total += torch.mm(left.T, right, out_dtype=torch.float32)
        return
    with float32_products("bf16" if left.dtype == torch.bfloat16 and not left.is_cuda else "ieee"):
        total.addmm_(left.to(total.dtype).T, right.to(total.dtype))


def mirror_lower(total: Tensor) -> None:
    """Make a matrix whose lower triangle was summed by `add_gram` exactly symmetric, in place."""
    for start in range(0, len(total), _PANEL):
        stop = min(start + _PANEL, len(total))
        corner = total[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        total[start:stop, stop:] = total[stop:, start:stop].T
