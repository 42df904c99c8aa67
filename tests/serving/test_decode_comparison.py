"""Which decoder layers the CPU library may take tokens of: what is compared when a model is loaded."""

import pytest
import torch
from cpu_matrices import needs_kernels
from decoding import decoding, next_logits, plain
from packed_models import save_packed
from tiny_models import build, save

from llmprune.kernels.cpu import TokenLayer
from llmprune.serving import decode_layers, loader
from llmprune.serving.loader import load

pytestmark = [needs_kernels, pytest.mark.usefixtures("computed_in_float32")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["nm", "int8-bitmask", "dense"])
def test_in_16_bits_they_are_as_near_to_float32_as_the_ordinary_layers(layout, dtype, tmp_path, counted):
    is_dense = layout == "dense"
    folder = save_packed(tmp_path, "bitmask" if is_dense else layout, "2:4" if layout == "nm" else "0.7")
    folder /= "dense" if is_dense else "packed"
    model, ordinary, exact = (
        load(folder, device="cpu", **options)
        for options in ({"dtype": dtype}, {"dtype": dtype, "fused": False}, {"dtype": "float32", "fused": False})
    )
    assert len(decoding(model)) == 2
    counted.clear()
    ours, theirs = ((next_logits(one).float() - next_logits(exact)).norm() for one in (model, ordinary))
    assert len(counted) == 2
    assert ours <= 1.2 * theirs  # what the prompt left in the cache is the same
    if is_dense:  # transformers casts no packed model
        torch.testing.assert_close(next_logits(model.float()), next_logits(exact), rtol=1e-3, atol=1e-3)
        assert len(counted) == 4


@pytest.mark.parametrize("family", ["llama-tied", "mistral", "qwen2", "qwen3"])
def test_layers_of_other_families_are_compared_in_16_bits(family, tmp_path):
    model = load(save(build(family, torch.bfloat16), tmp_path), device="cpu", dtype="bfloat16")
    assert len(decoding(model)) == model.config.num_hidden_layers


def test_a_layer_that_cannot_be_compared_in_float32_stays_as_it_is_with_a_word(folder, monkeypatch):
    def refuse(self, memo):
        raise RuntimeError("not to be copied")

    layer = plain(folder).model.layers[0]
    monkeypatch.setattr(type(layer), "__deepcopy__", refuse, raising=False)
    with pytest.warns(UserWarning, match="LlamaDecoderLayer.*not to be copied"):
        model = load(folder, device="cpu", dtype="bfloat16")
    assert not decoding(model)


@pytest.mark.parametrize("family", ["gemma", "granite", "olmo2", "mixtral", "phi", "gpt2"])
def test_layers_that_compute_something_else_are_left_alone(family, tmp_path):
    model = load(save(build(family), tmp_path), device="cpu")
    assert not decoding(model)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_difference_of_numbers_alone_is_noticed(dtype, folder, monkeypatch):
    """Also one that disappears in the roundings of 16 bits."""
    attend = TokenLayer.attend
    monkeypatch.setattr(TokenLayer, "attend", lambda *operands: attend(*operands) * 1.001)
    assert not decoding(load(folder, device="cpu", dtype=dtype))


def test_what_depends_on_the_position_is_noticed(folder, monkeypatch):
    """A factor of the last position alone: of the two that are compared, 3 and 63, the cosine is below and above 0."""
    begin = TokenLayer.begin

    def scaled(self, x, cos, sin):
        q, k, v = begin(self, x, cos, sin)
        return (2 * q if cos[0, 0, 0] > 0 else q), k, v

    monkeypatch.setattr(TokenLayer, "begin", scaled)
    assert not decoding(load(folder, device="cpu"))


def test_large_features_do_not_hide_a_difference_in_others():
    """A few are thousands of times the others in trained models."""
    x, added = torch.randn(2, 1, 1, 64)
    added[..., 5] = 3e3
    own = x + added
    assert decode_layers._is_near(own + 1e-6 * added, own, x, 1e-4)
    wrong = own.clone()
    wrong[..., 6] += 0.1
    assert not decode_layers._is_near(wrong, own, x, 1e-4)
    assert not decode_layers._is_near(own * torch.nan, own, x, 1e-4)
    assert not decode_layers._is_near(None, own, x, 1e-4)


def test_a_model_that_takes_no_ids_is_left_as_it_is(folder):
    model = plain(folder)
    model.model.rotary_emb.register_forward_pre_hook(lambda *_: 1 / 0)
    assert decode_layers.attach(model) == 0
    assert not any("forward" in layer.__dict__ for layer in model.modules())


def test_modules_with_hooks_are_left_alone_from_the_start(folder, counted):
    model = plain(folder)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert decode_layers.attach(model) == 1
    assert decode_layers.attach(model) == 0


def test_without_kernels_layers_are_ordinary(folder, monkeypatch):
    monkeypatch.setattr(loader.cpu, "unavailable", lambda: "none here")
    assert not decoding(load(folder, device="cpu"))
