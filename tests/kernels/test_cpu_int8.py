"""The CPU kernels for 8-bit weights, against float64."""

import pytest
import torch
from cpu_matrices import SHAPES, needs_kernels
from torch import Tensor

from llmprune.kernels import cpu
from llmprune.patterns import NM, Unstructured
from llmprune.storage.formats import Int8BitmaskLayout, Int8NMLayout, quantise

pytestmark = needs_kernels

KINDS = {"bitmask": (Int8BitmaskLayout, "mask"), "nm": (Int8NMLayout, "meta")}
LEVELS = range(1, cpu.library().level + 1) if cpu.unavailable() is None else ()
ROW = 1 << 20


class Matrix:
    """A quantised weight, what is on disk, and what the kernels read."""

    def __init__(self, kind: str, weight: Tensor, group: int = 128):
        layout_of, bits = KINDS[kind]
        self.kind, self.weight = kind, quantise(weight, group)
        self.layout = layout_of.fit(self.weight, NM(2, 4) if kind == "nm" else Unstructured(0.5), group)
        stored = self.layout.pack(self.weight)
        self.stored = stored[bits], stored["values"], stored["peaks"]
        self.packed = cpu.pack(kind, self.layout.shape, *self.stored, self.layout.group)

    @classmethod
    def random(cls, kind: str, shape: tuple[int, int], dtype: torch.dtype, group: int = 128) -> "Matrix":
        pattern = NM(2, 4) if kind == "nm" else Unstructured(0.5)
        return cls(kind, (torch.randn(shape) * pattern.mask(torch.rand(shape))).to(dtype), group)


def excess(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """The largest error, as a share of what is allowed: three eps of the absolute products, and the 16 bits of x."""
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    steps = sum(
        part.double().abs().amax(1, keepdim=True) * columns.double().abs().sum(1)
        for part, columns in zip(x.split(128, 1), weight.split(128, 1), strict=True)
    )
    allowed = 3 * torch.finfo(y.dtype).eps * size + 1.1 * steps / 65534
    return float(((y.double() - exact).abs() / allowed.clamp_min(1e-300)).nan_to_num(nan=torch.inf).amax())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", cpu.TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_right(kind, dtype, level):
    for shape in (*SHAPES[kind], (40, 264)):
        for group in (128, 256, ROW):
            matrix = Matrix.random(kind, shape, dtype, group)
            for tokens in (1, 2, 3, 8, 17):
                x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
                y = torch.full((tokens, shape[0]), torch.nan, dtype=dtype)
                cpu.library().multiply([matrix.packed], x, bias, y, level)
                assert excess(y, x, matrix.weight, bias) <= 1, (shape, group, tokens)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_large_numbers_of_a_fold_do_not_overflow(kind, level):
    weight = torch.ones(16, 256)
    if kind == "nm":
        weight[:, ::2] = 0
    matrix, y = Matrix(kind, weight), torch.empty(2, 16)
    x = torch.full((2, 256), 3e4)
    cpu.library().multiply([matrix.packed], x, None, y, level)
    assert excess(y, x, matrix.weight) <= 1


@pytest.mark.parametrize("dtype", cpu.TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_weight_comes_back_bit_for_bit(kind, dtype):
    for shape in (*SHAPES[kind], (40, 264)):
        for group in (128, ROW):
            matrix = Matrix.random(kind, shape, dtype, group)
            assert all(map(torch.equal, cpu.unpack(matrix.packed), matrix.stored))
            for level in LEVELS:
                dense = torch.empty(shape, dtype=dtype)
                cpu.library().expand(matrix.packed, range(shape[0]), dense, level)
                assert torch.equal(dense, matrix.weight)


def test_empty_rows_and_matrices_without_zeros():
    x = torch.randn(3, 200).bfloat16()
    weight = torch.randn(40, 200).bfloat16()
    weight[5:24] = 0
    for matrix in (Matrix("bitmask", weight), Matrix("bitmask", weight * 0), Matrix("nm", weight * 0)):
        assert excess(cpu.linear(x, [matrix.packed], None, [40]), x, matrix.weight) <= 1
    assert Matrix("bitmask", weight * 0).stored[1].numel() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit_and_matrices_go_together(kind):
    parts = [Matrix.random(kind, (2000 + 8 * number, 512), torch.bfloat16, 128 * number or ROW) for number in range(3)]
    packed, sizes = [part.packed for part in parts], [len(part.weight) for part in parts]
    x, products, before = torch.randn(5, 512).bfloat16(), [], torch.get_num_threads()
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        products.append(cpu.linear(x, packed, None, sizes))
    torch.set_num_threads(before)
    assert all(torch.equal(product, products[0]) for product in products)
    assert excess(products[0], x, torch.cat([part.weight for part in parts])) <= 1


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_x_that_is_not_finite_gives_nan(kind, wrong):
    matrix = Matrix.random(kind, (20, 300), torch.bfloat16)
    x = torch.randn(2, 300).bfloat16()
    x[1, 290] = wrong
    y = cpu.linear(x, [matrix.packed], None, [20])
    assert torch.isfinite(y[0]).all()
    assert torch.isnan(y[1]).all()


def test_what_does_not_go_together_is_refused():
    matrix = Matrix.random("bitmask", (17, 300), torch.bfloat16)
    mask, values, peaks = matrix.stored
    with pytest.raises(ValueError, match="no bitmask matrix"):
        cpu.pack("bitmask", (17, 300), mask, values, peaks, 100)
    with pytest.raises(ValueError, match="34 peaks for a bitmask matrix"):
        cpu.pack("bitmask", (17, 300), mask, values, peaks[:, :2], 128)
    with pytest.raises(cpu.CorruptMatrixError):
        cpu.pack("bitmask", (17, 300), mask ^ 1, values, peaks, 128)
    other = Matrix.random("nm", (17, 300), torch.bfloat16)
    with pytest.raises(ValueError, match="does not go together"):
        cpu.linear(torch.ones(1, 300).bfloat16(), [matrix.packed, other.packed], None, [17, 17])
