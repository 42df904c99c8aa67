"""Products of dense 16-bit weights and float32 activations against float64."""

import pytest
import torch
from cpu_matrices import needs_kernels
from torch.nn import functional as F

from llmprune.kernels import cpu
from llmprune.kernels.cpu import halves

pytestmark = needs_kernels

SHAPES = ((1, 1), (3, 7), (4, 8), (5, 16), (6, 33), (259, 130))


def exact(x, weight, bias=None):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def allowed(x, weight):
    return 2e-7 * weight.shape[1] ** 0.5 * (x.double().abs() @ weight.double().abs().T).amax().clamp_min(1)


@pytest.mark.parametrize("dtype", cpu.HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_multiplies_every_shape(shape, dtype, monkeypatch):
    monkeypatch.setattr(halves, "_PIECE", 4096)  # several pieces of the largest
    weight = torch.randn(shape).to(dtype)
    for bias in (None, torch.randn(shape[0])):
        for tokens in (0, 1, 2, 3, halves.MOST_TOKENS, halves.MOST_TOKENS + 1):
            x = torch.randn(2, tokens, shape[1])
            y = cpu.halves_linear(x, weight, bias)
            assert y.shape == (2, tokens, shape[0])
            assert y.dtype == torch.float32
            if tokens:
                assert (y - exact(x, weight, bias)).abs().max() <= allowed(x.flatten(0, 1), weight)


def test_subnormal_and_special_weights_are_what_they_are():
    for dtype in cpu.HALVES:
        info = torch.finfo(dtype)
        values = [info.tiny, info.tiny * info.eps, -info.max, info.max, 0.0, -0.0, 1.0, torch.inf, torch.nan]
        weight = torch.tensor(values).to(dtype)[:, None]
        y = cpu.halves_linear(torch.ones(1, 1), weight, None)
        torch.testing.assert_close(y[0], weight[:, 0].float(), rtol=0, atol=0, equal_nan=True)


def test_neither_threads_nor_other_tokens_change_a_result():
    weight, x = torch.randn(1027, 600).bfloat16(), torch.randn(halves.MOST_TOKENS, 600)
    wanted, before = cpu.halves_linear(x, weight, None), torch.get_num_threads()
    try:
        for threads in range(1, 5):
            torch.set_num_threads(threads)
            assert torch.equal(cpu.halves_linear(x, weight, None), wanted)
            assert torch.equal(cpu.halves_linear(x[3:4], weight, None), wanted[3:4])
    finally:
        torch.set_num_threads(before)


def test_gradients_transforms_and_other_dtypes_are_those_of_torch():
    weight, bias = torch.randn(6, 16).bfloat16(), torch.randn(6)
    x = torch.randn(3, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(cpu.halves_linear(x, weight, bias).square().sum(), x)
    (wanted,) = torch.autograd.grad(F.linear(x, weight.float(), bias).square().sum(), x)
    torch.testing.assert_close(gradient, wanted)
    plain = x.detach()
    mapped = torch.vmap(lambda row: cpu.halves_linear(row, weight, bias))(plain)
    torch.testing.assert_close(mapped, F.linear(plain, weight.float(), bias))
    for dtype in (torch.bfloat16, torch.float64):
        y = cpu.halves_linear(plain.to(dtype), weight, bias.to(dtype))
        torch.testing.assert_close(y, F.linear(plain.to(dtype), weight.to(dtype), bias.to(dtype)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cpu.halves_linear(torch.randn(1, 15), weight, bias)


def test_the_library_refuses_what_is_not_as_described():
    weight, x, y = torch.randn(4, 8).bfloat16(), torch.randn(1, 8), torch.empty(1, 4)
    rows = cpu.library()._rows
    pointers = weight.data_ptr(), x.data_ptr(), y.data_ptr()
    for kind, address, out, columns in ((2, 0, 4, 8), (0, 1, 4, 8), (0, 0, -1, 8), (0, 0, 4, -8)):
        result = rows(pointers[0] + address, kind, out, columns, pointers[1], 1, None, pointers[2], 1)
        with pytest.raises(ValueError, match=r"does not go together|aligned"):
            cpu.library()._require(result)
