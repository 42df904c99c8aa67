"""The dense product of one token: which one is taken, and that another thread's is not disturbed."""

import threading

import pytest
import torch
from cpu_matrices import needs_kernels
from torch import nn
from torch.nn import functional as F

from llmprune.kernels import configurations, cpu
from llmprune.serving import dense_product

OWN, ONEDNN, LIBRARY = "own", "onednn", "library"


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(dense_product, "_chosen", {})
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


def found(monkeypatch, name):
    monkeypatch.setattr(dense_product, "_fastest", lambda weights: name)


@pytest.mark.parametrize("name", [OWN, ONEDNN])
def test_one_token_takes_the_faster_product_and_more_take_onednn(monkeypatch, products, name):
    found(monkeypatch, name)
    weight, bias = torch.randn(32, 48).bfloat16(), torch.randn(32).bfloat16()
    assert dense_product.choose([weight]) == name
    for shape, tokens in (((1, 48), 1), ((48,), 1), ((1, 1, 48), 1), ((2, 48), 2), ((0, 48), 0)):
        x = torch.randn(shape).bfloat16()
        y = dense_product.linear(x, weight, bias)
        torch.testing.assert_close(y, F.linear(x.float(), weight.float(), bias.float()).bfloat16())
        assert products[-2] == (name if tokens == 1 else "onednn", tokens)
    assert torch._C._get_mkldnn_enabled()


def test_it_is_measured_once_for_a_shape_and_a_number_of_threads(monkeypatch):
    measured = []
    monkeypatch.setattr(dense_product, "_fastest", lambda weights: measured.append(len(weights)) or OWN)
    weights = [torch.randn(32, 48).bfloat16() for _ in range(3)]
    assert dense_product.choose(weights) == OWN
    dense_product._chosen.clear()  # as another process
    assert dense_product.choose(weights[:1]) == OWN
    assert measured == [3]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert dense_product.choose(weights[:2]) == OWN
    finally:
        torch.set_num_threads(before)
    assert measured == [3, 2]


@pytest.mark.parametrize("recorded", [3, -1, "own"])
def test_a_record_that_means_nothing_is_measured_again(monkeypatch, recorded):
    found(monkeypatch, OWN)
    shape = {"out_features": 32, "in_features": 48, "threads": torch.get_num_threads()}
    operation = f"{dense_product.OPERATION}.bfloat16"
    configurations.record(operation, torch.device("cpu"), {"product": recorded}, **shape)
    with pytest.warns(UserWarning, match="no product"):
        assert dense_product.choose([torch.randn(32, 48).bfloat16()]) == OWN


def test_a_cache_that_cannot_be_written_is_no_obstacle(monkeypatch):
    monkeypatch.setenv("LLMPRUNE_CACHE", "/proc/no-folder")
    configurations.forget()
    with pytest.raises(OSError, match="no-folder"):
        configurations.record("an operation", torch.device("cpu"), {"own": 1})
    found(monkeypatch, OWN)
    assert dense_product.choose([torch.randn(32, 48).bfloat16()]) == OWN


def test_only_16_bit_weights_on_a_cpu_have_a_choice():
    for weight in (torch.randn(32, 48), torch.empty(32, 48, dtype=torch.bfloat16, device="meta")):
        assert dense_product.choose([weight]) == ONEDNN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_products_are_timed_and_right(dtype):
    weights = [torch.randn(64, 96).to(dtype) for _ in range(2)]
    assert dense_product.choose(weights) in (OWN, ONEDNN, LIBRARY)
    x, bias = torch.randn(1, 96).to(dtype), torch.randn(64).to(dtype)
    exact = x.double() @ weights[0].double().T + bias.double()
    for product in (dense_product.own_product, *([dense_product.library_product] if cpu.unavailable() is None else [])):
        y = product(x, weights[0], bias)
        assert y.dtype is dtype
        assert (y.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@needs_kernels
def test_the_library_multiplies_where_it_is_the_fastest_and_there(monkeypatch):
    found(monkeypatch, LIBRARY)
    weight, x, called = torch.randn(32, 48).bfloat16(), torch.randn(1, 48).bfloat16(), []
    assert dense_product.choose([weight]) == LIBRARY
    real = dense_product.cpu.halves_linear
    monkeypatch.setattr(dense_product.cpu, "halves_linear", lambda *operands: called.append(1) or real(*operands))
    expected = F.linear(x.float(), weight.float()).bfloat16()
    torch.testing.assert_close(dense_product.linear(x, weight, None), expected)
    assert called
    called.clear()
    with torch.autocast("cpu", torch.float16):
        assert dense_product.linear(x, weight, None).dtype is torch.float16
    with torch.enable_grad():
        assert dense_product.linear(x, weight.requires_grad_(), None).grad_fn is not None
    assert not called
    # Recorded, but compiled no more: what is left is measured again, and not recorded.
    dense_product._chosen.clear()
    with monkeypatch.context() as without:
        without.setattr(dense_product.cpu, "unavailable", lambda: "none here")
        without.setattr(dense_product, "_fastest", lambda weights: OWN)
        assert dense_product.choose([weight]) == OWN
    assert dense_product.choose([weight]) == LIBRARY


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
