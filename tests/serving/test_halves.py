"""Dense weights that are served in the 16 bits of their file, computed in float32."""

import copy

import pytest
import torch
from cpu_matrices import needs_kernels
from packed_models import save_packed
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune.serving import halves, loader
from llmprune.serving.cpu_forms import measure_products
from llmprune.serving.halves import computed_dtype, keep_halves
from llmprune.serving.loader import load

pytestmark = needs_kernels

IDS = torch.arange(20)[None]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path, monkeypatch):
    """A bfloat16 checkpoint, on a processor without instructions for bfloat16."""
    monkeypatch.setattr(halves, "MEASURED_WEIGHTS", 32 * 32)
    monkeypatch.setattr(loader, "computed_in", lambda stored, device: torch.float32)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=100, tie_word_embeddings=request.param, attention_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    return tmp_path


def halved(model):
    return {name.rpartition(".")[0] for name, weight in model.named_parameters() if weight.dtype == torch.bfloat16}


@torch.no_grad()
def test_it_computes_what_float32_does_in_half_of_the_memory(folder):
    model, wide = load(folder, device="cpu"), load(folder, device="cpu", dtype="float32")
    assert not halved(wide)
    # Keys and values of one head are smaller; a tied head has the name of the embeddings.
    assert {name.rpartition(".")[2] for name in halved(model)} | {"lm_head"} == {
        "embed_tokens", "lm_head", "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert computed_dtype(model) == computed_dtype(wide) == torch.float32
    assert model.get_memory_footprint() < 0.6 * wide.get_memory_footprint()
    for tokens in (1, 20):
        logits = model(IDS[:, :tokens]).logits
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, wide(IDS[:, :tokens]).logits)
    generated = [one.generate(IDS, max_new_tokens=5, do_sample=False) for one in (model, wide, copy.deepcopy(model))]
    assert torch.equal(generated[0], generated[1])
    assert torch.equal(generated[0], generated[2])


def test_its_weights_are_ordinary_ones(folder, tmp_path):
    model = load(folder, device="cpu")
    tied = model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", device="cpu", dtype="float32")
    assert all(weight.equal(again.state_dict()[name]) for name, weight in model.state_dict().items())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not model(IDS).logits.any()
    assert bool(model.get_input_embeddings().weight.any()) is not tied


def test_gradients_flow_as_in_float32(folder):
    model, wide = load(folder, device="cpu"), load(folder, device="cpu", dtype="float32")
    for one in (model, wide):
        one(IDS, labels=IDS).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=0.02, atol=2e-3, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float32])
def test_cast_or_under_autocast_it_is_an_ordinary_model(folder, dtype):
    model, wide = load(folder, device="cpu"), load(folder, device="cpu", dtype="float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(IDS).logits, wide(IDS).logits)
    model, wide = model.to("cpu").to(dtype), wide.to(dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    torch.testing.assert_close(model(IDS).logits, wide(IDS).logits)


def made(folder):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    measure_products(model)
    return model


def test_weights_that_lose_digits_or_that_inputs_are_cast_to_stay(folder):
    model = made(folder)
    up, down = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj
    up.weight.data[0, 0] = 1 + 2.0**-20
    down.register_forward_pre_hook(lambda layer, given: (given[0].to(layer.weight.dtype),))
    keep_halves(model, torch.bfloat16, input_ids=IDS)
    assert {up.weight.dtype, down.weight.dtype} == {torch.float32}
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16


def test_a_model_that_cannot_be_tried_stays_in_float32(folder):
    model = made(folder)
    keep_halves(model, torch.bfloat16, wrong=IDS)
    assert not halved(model)
    assert model(IDS).logits.isfinite().all()


@torch.no_grad()
def test_packed_layers_that_are_served_dense(tmp_path, monkeypatch):
    monkeypatch.setattr(halves, "MEASURED_WEIGHTS", 32 * 32)
    monkeypatch.setattr(loader, "computed_in", lambda stored, device: torch.float32)
    folder = save_packed(tmp_path, "bitmask", "0.5", hidden_size=32, intermediate_size=48) / "packed"
    model, wide = (load(folder, device="cpu", served="dense", dtype=dtype) for dtype in ("auto", "float32"))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model(IDS).logits, wide(IDS).logits)
    state = wide.state_dict()
    assert all(tensor.to(state[name].dtype).equal(state[name]) for name, tensor in model.state_dict().items())


def test_without_kernels_it_is_loaded_in_float32(folder, monkeypatch):
    monkeypatch.setattr(loader.cpu, "unavailable", lambda: "no compiler")
    assert not halved(load(folder, device="cpu"))
