"""Random packed matrices for the CPU kernels, with their dense weights."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from llmprune.kernels import cpu
from llmprune.patterns import NM, Unstructured
from llmprune.storage.formats import Layout, fit_layout

# Where there is no compiler, only what happens then is tested.
needs_kernels = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

# Odd numbers of rows and columns, less than one tile, and several tiles.
SHAPES = {
    "bitmask": ((1, 1), (17, 35), (63, 124), (33, 1000), (16, 2)),
    "nm": ((1, 4), (17, 36), (63, 124), (48, 1000)),
}


class Matrix(NamedTuple):
    weight: Tensor
    layout: Layout
    bits: Tensor
    values: Tensor
    packed: Tensor


def make(kind: str, shape: tuple[int, int], dtype: torch.dtype, sparsity: float = 0.5) -> Matrix:
    pattern = NM(2, 4) if kind == "nm" else Unstructured(sparsity)
    weight = torch.randn(shape).to(dtype)
    return of(kind, weight * pattern.mask(torch.rand(shape)))


def of(kind: str, weight: Tensor) -> Matrix:
    layout = fit_layout(kind, weight, NM(2, 4) if kind == "nm" else Unstructured(0.5))
    stored = layout.pack(weight)
    bits, values = stored["meta" if kind == "nm" else "mask"], stored["values"]
    return Matrix(weight, layout, bits, values, cpu.pack(kind, layout.shape, bits, values))


def error(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """The largest error of a product, as a share of the sum of the absolute products, in eps of its dtype."""
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    tiny = torch.finfo(torch.float32).tiny
    return (
        float(((y.double() - exact).abs() / size.clamp_min(tiny)).nan_to_num(nan=torch.inf).amax())
        / torch.finfo(y.dtype).eps
    )
