"""Layers that read the same input are multiplied together, with the results that each gives alone."""

import copy
from pathlib import Path

import pytest
import torch
from cpu_matrices import needs_kernels
from folders import same, tensors
from packed_models import save_packed
from tiny_models import random_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.serving import fusion
from llmprune.serving.forms import Fragments
from llmprune.serving.fusion import fuse
from llmprune.serving.quantizer import sparse_layers

IDS = random_ids(2, 12)

# Rows of every matrix in whole tiles.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A 2:4 model that is served from fragments, which a CPU multiplies by the kernels' reference."""
    monkeypatch.setattr(Fragments, "refusal", lambda *_: None)
    folder = save_packed(tmp_path, **SIZES, attention_bias=True)
    return AutoModelForCausalLM.from_pretrained(folder / "packed").eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def test_fuses_what_reads_the_same_input(model: PreTrainedModel) -> None:
    before = logits(model)
    assert fuse(model, input_ids=IDS[:1, :1]) == [
        [f"model.layers.{layer}.{block}.{name}_proj" for name in names]
        for layer in (0, 1)
        for block, names in (("self_attn", ("q", "k", "v")), ("mlp", ("gate", "up")))
    ]
    torch.testing.assert_close(logits(model), before, rtol=0.02, atol=0.02)


def test_multiplies_once_for_all(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse(model, input_ids=IDS[:1, :1])
    rows = []
    monkeypatch.setattr(
        fusion,
        "multiply_fragments",
        lambda a, e, x, bias, shape: rows.append(shape[0]) or x.new_zeros(*x.shape[:-1], shape[0]),
    )
    logits(model)
    assert rows == [64 + 32 + 32, 2 * 96] * 2


def test_needs_no_second_copy_of_the_weights(model: PreTrainedModel) -> None:
    fuse(model, input_ids=IDS[:1, :1])
    attention = model.model.layers[0].self_attn
    storages = {layer.held["a"].untyped_storage().data_ptr() for layer in (attention.q_proj, attention.k_proj)}
    assert len(storages) == 1
    assert attention.q_proj.held["a"].untyped_storage().nbytes() == (64 + 32 + 32) * 256 // 2 * 2


def test_saves_what_it_loaded(model: PreTrainedModel, tmp_path: Path) -> None:
    fuse(model, input_ids=IDS[:1, :1])
    model.save_pretrained(tmp_path / "again")
    before, after = tensors(tmp_path / "packed"), tensors(tmp_path / "again")
    assert set(after) == set(before)
    assert all(same(after[key], before[key]) for key in before)


def test_a_layer_asked_twice_or_alone_is_right(model: PreTrainedModel) -> None:
    attention = model.model.layers[0].self_attn
    x = torch.randn(3, 64).bfloat16()
    alone = {name: getattr(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj")}
    fuse(model, input_ids=IDS[:1, :1])
    for name in ("k_proj", "k_proj", "q_proj", "k_proj", "v_proj", "q_proj"):
        assert same(getattr(attention, name)(x), alone[name])
        assert not same(getattr(attention, name)(x + 1), alone[name])


def test_another_x_is_not_answered_with_the_last_product(model: PreTrainedModel) -> None:
    fuse(model, input_ids=IDS[:1, :1])
    attention = model.model.layers[0].self_attn
    one, other = torch.randn(2, 3, 64).bfloat16()
    attention.q_proj(one)
    first = attention.k_proj(other)
    assert same(first, attention.k_proj(other.clone()))


def test_lets_go_of_activations(model: PreTrainedModel) -> None:
    fuse(model, input_ids=IDS[:1, :1])
    logits(model)
    fused = model.model.layers[0].self_attn.q_proj.fusion
    assert fused is not None
    assert (fused._x, fused._waiting) == (None, {})


def test_moving_the_model_parts_the_layers_again(model: PreTrainedModel) -> None:
    before = logits(model)
    fuse(model, input_ids=IDS[:1, :1])
    for _, layer in sparse_layers(model):
        layer.half()
        assert layer.fusion is None
        layer.bfloat16()
    torch.testing.assert_close(logits(model), before, rtol=0.02, atol=0.02)


def test_loading_other_weights_parts_the_layers(model: PreTrainedModel, tmp_path: Path) -> None:
    fuse(model, input_ids=IDS[:1, :1])
    other = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "model.layers.0.self_attn.q_proj.values"
    other[name] = -other[name]
    model.load_state_dict(other)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.fusion is None
    x = torch.randn(3, 64).bfloat16()
    assert same(layer(x), torch.nn.functional.linear(x, layer.unpack(), layer.bias))
    assert same(model.state_dict()[name], other[name])


def test_a_cast_goes_through_the_stored_form(model: PreTrainedModel) -> None:
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.unpack()
    layer.to(torch.float16)
    assert layer.dtype == torch.float16
    assert torch.equal(layer.unpack(), before.to(torch.float16))


def test_moving_to_where_the_model_is_keeps_the_fusion(model: PreTrainedModel) -> None:
    fuse(model, input_ids=IDS[:1, :1])
    for _, layer in sparse_layers(model):
        before = layer.fusion
        layer.to("cpu")
        assert layer.fusion is before


@needs_kernels
@pytest.mark.parametrize(("layout", "pattern"), [("nm", "2:4"), ("bitmask", "0.5")])
def test_a_cpu_multiplies_several_packed_matrices_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, pattern: str
) -> None:
    folder = save_packed(tmp_path, layout, pattern, **SIZES, attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "packed").eval()
    before = logits(model)
    assert len(fuse(model, input_ids=IDS[:1, :1])) == 4
    rows = []
    real = fusion.cpu.linear
    monkeypatch.setattr(
        fusion.cpu, "linear", lambda x, packed, bias, sizes: rows.append(sizes) or real(x, packed, bias, sizes)
    )
    assert same(logits(model), before)
    assert rows[:4] == [[64, 32, 32], [64], [96, 96], [64]]
    layers = [layer for _, layer in sparse_layers(model)][:3]
    twins = copy.deepcopy(layers)
    assert twins[0].fusion is twins[1].fusion is not layers[0].fusion
    assert [id(matrix) for matrix in twins[0].fusion.packed] == [id(twin.held["packed"]) for twin in twins]
    assert same(torch.compile(model, backend="eager", fullgraph=True)(IDS).logits, before)
    saved = tensors(tmp_path / "packed")
    assert all(same(saved[key], tensor) for key, tensor in model.state_dict().items() if key in saved)


@needs_kernels
def test_a_cpu_does_not_multiply_different_layouts_at_once(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_packed(tmp_path / "nm", **SIZES) / "packed").eval()
    other = AutoModelForCausalLM.from_pretrained(save_packed(tmp_path / "b", "bitmask", "0.5", **SIZES) / "packed")
    model.model.layers[0].self_attn.k_proj = other.model.layers[0].self_attn.k_proj
    before = logits(model)
    assert fuse(model, input_ids=IDS[:1, :1])[0] == [f"model.layers.0.self_attn.{name}_proj" for name in "qv"]
    assert same(logits(model), before)


def test_leaves_out_what_does_not_fill_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fragments, "refusal", lambda *_: None)
    folder = save_packed(tmp_path, intermediate_size=56, hidden_size=64)
    model = AutoModelForCausalLM.from_pretrained(folder / "packed").eval()
    assert all("mlp" not in name for names in fuse(model, input_ids=IDS[:1, :1]) for name in names)


def test_compiles_as_one_graph(model: PreTrainedModel) -> None:
    fuse(model, input_ids=IDS[:1, :1])
    before = logits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert same(compiled(IDS).logits, before)
