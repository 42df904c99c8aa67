"""The dense product of one token: which one is taken, and that another thread's is not disturbed."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmprune.kernels import configurations
from llmprune.serving import dense_product

OWN, ONEDNN = True, False


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(dense_product, "_own", set())
    configurations.forget()
    yield
    configurations.forget()


@pytest.fixture
def products(monkeypatch):
    """The rows of x that each product was given."""
    called = []
    real = F.linear

    def noted(x, weight, bias=None):
        name = "onednn" if torch._C._get_mkldnn_enabled() else "own"
        called.append((name, x.numel() // x.shape[-1]))
        return real(x, weight, bias)

    monkeypatch.setattr(dense_product.F, "linear", noted)
    return called


def found(monkeypatch, own):
    monkeypatch.setattr(dense_product, "_is_own_faster", lambda weights: own)


@pytest.mark.parametrize("own", [OWN, ONEDNN])
def test_one_token_takes_the_faster_product_and_more_take_onednn(monkeypatch, products, own):
    found(monkeypatch, own)
    weight, bias = torch.randn(32, 48).bfloat16(), torch.randn(32).bfloat16()
    assert dense_product.choose([weight]) is own
    for shape, tokens in (((1, 48), 1), ((48,), 1), ((1, 1, 48), 1), ((2, 48), 2), ((0, 48), 0)):
        x = torch.randn(shape).bfloat16()
        y = dense_product.linear(x, weight, bias)
        torch.testing.assert_close(y, F.linear(x.float(), weight.float(), bias.float()).bfloat16())
        assert products[-2] == ("own" if own and tokens == 1 else "onednn", tokens)
    assert torch._C._get_mkldnn_enabled()


def test_it_is_measured_once_for_a_shape_and_a_number_of_threads(monkeypatch):
    measured = []
    monkeypatch.setattr(dense_product, "_is_own_faster", lambda weights: bool(measured.append(len(weights))) or True)
    weights = [torch.randn(32, 48).bfloat16() for _ in range(3)]
    assert dense_product.choose(weights)
    dense_product._own.clear()  # as another process
    assert dense_product.choose(weights[:1])
    assert measured == [3]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert dense_product.choose(weights[:2])
    finally:
        torch.set_num_threads(before)
    assert measured == [3, 2]


def test_a_cache_that_cannot_be_written_is_no_obstacle(monkeypatch):
    monkeypatch.setenv("LLMPRUNE_CACHE", "/proc/no-folder")
    configurations.forget()
    with pytest.raises(OSError, match="no-folder"):
        configurations.record("an operation", torch.device("cpu"), {"own": 1})
    found(monkeypatch, OWN)
    assert dense_product.choose([torch.randn(32, 48).bfloat16()])


def test_only_16_bit_weights_on_a_cpu_have_a_choice():
    assert not dense_product.choose([torch.randn(32, 48)])
    assert not dense_product.choose([torch.empty(32, 48, dtype=torch.bfloat16, device="meta")])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_products_are_timed_and_right(dtype):
    weights = [torch.randn(64, 96).to(dtype) for _ in range(2)]
    assert dense_product.choose(weights) in (True, False)
    x = torch.randn(1, 96).to(dtype)
    exact = x.double() @ weights[0].double().T
    error = (dense_product.own_product(x, weights[0], None).double() - exact).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_the_switch_is_restored_after_errors_and_by_the_last_of_several_threads():
    with pytest.raises(RuntimeError):
        dense_product.own_product(torch.ones(1, 3).bfloat16(), torch.ones(2, 4).bfloat16(), None)
    assert torch._C._get_mkldnn_enabled()
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with dense_product._onednn_disabled():
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    inside.wait(10)
    with dense_product._onednn_disabled():
        assert not torch._C._get_mkldnn_enabled()
    assert not torch._C._get_mkldnn_enabled()
    leave.set()
    other.join()
    assert torch._C._get_mkldnn_enabled()


def test_a_layer_of_a_loaded_model_is_compiled_without_a_break(monkeypatch):
    found(monkeypatch, OWN)
    layer = nn.Linear(48, 32).bfloat16()
    layer.__class__ = dense_product.DenseLinear
    dense_product.choose([layer.weight])
    x = torch.randn(1, 48).bfloat16()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
