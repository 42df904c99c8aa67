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
    monkeypatch.setattr(halves, "PIECE", 4096)  # several pieces of the largest
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


@pytest.mark.parametrize("tokens", [3, 50])
def test_gradients_are_those_of_the_widened_weight(tokens, monkeypatch):
    monkeypatch.setattr(halves, "PIECE", 1024)
    operands = [torch.randn(2, tokens, 16), torch.randn(70, 16).bfloat16(), torch.randn(70)]
    for wanted in ((True, True, True), (True, False, False), (False, True, False)):
        ours = [one.clone().requires_grad_(needs) for one, needs in zip(operands, wanted, strict=True)]
        theirs = [one.detach().float().requires_grad_(one.requires_grad) for one in ours]
        cpu.halves_linear(*ours).square().sum().backward()
        F.linear(*theirs).square().sum().backward()
        for one, other in zip(ours, theirs, strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(
                    one.grad.float(), other.grad, rtol=0.01 if one is ours[1] else 1e-4, atol=1e-3
                )


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_transforms_compiled_and_traced_calls_are_right():
    x, weight, bias = torch.randn(3, 16), torch.randn(6, 16).bfloat16(), torch.randn(6)
    wanted = F.linear(x, weight.float(), bias)
    mapped = torch.vmap(lambda row: cpu.halves_linear(row, weight, bias))(x)
    torch.testing.assert_close(mapped, wanted)
    compiled = torch.compile(lambda given: cpu.halves_linear(given, weight, bias), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
    weight.requires_grad_()
    compiled(x).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(6, 16).bfloat16())
    weight.requires_grad_(False)
    traced = torch.jit.trace(lambda given: cpu.halves_linear(given, weight, bias), (torch.zeros(3, 16),))
    torch.testing.assert_close(traced(x), wanted)


def test_strided_operands_are_right_and_wrong_ones_refused():
    x, weight, bias = torch.randn(3, 16), torch.randn(16, 6).bfloat16().T, torch.randn(6)
    torch.testing.assert_close(
        cpu.halves_linear(x[:, ::2], weight[:, ::2], bias), F.linear(x[:, ::2], weight[:, ::2].float(), bias)
    )
    for wrong in (
        (x[:, :15], weight, bias), (x.double(), weight, bias), (x, weight.float(), bias), (x, weight, bias.bfloat16()),
        (x, weight, bias[:3]), (x, weight, torch.randn(12)[::2]), (x.to("meta"), weight, bias),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="cpu_halves"):
            cpu.halves_linear(*wrong)
    assert cpu.halves_linear(torch.randn(2, 0), torch.randn(4, 0).bfloat16(), None).equal(torch.zeros(2, 4))


def test_the_library_refuses_what_is_not_as_described():
    weight, x, y = torch.randn(4, 8).bfloat16(), torch.randn(1, 8), torch.empty(1, 4)
    rows = cpu.library()._rows
    pointers = weight.data_ptr(), x.data_ptr(), y.data_ptr()
    for kind, address, out, columns in ((3, 0, 4, 8), (0, 1, 4, 8), (0, 0, -1, 8), (0, 0, 4, -8)):
        result = rows(pointers[0] + address, kind, out, columns, pointers[1], 1, None, pointers[2], 1)
        with pytest.raises(ValueError, match=r"does not go together|aligned"):
            cpu.library()._require(result)
