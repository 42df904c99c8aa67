"""Dense weights that are served in the 16 bits of their file, computed in float32."""

import copy

import pytest
import torch
from cpu_matrices import needs_kernels
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune.serving import halves, loader
from llmprune.serving.halves import HalvesEmbedding, HalvesLinear
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
    return {name for name, layer in model.named_modules() if isinstance(layer, HalvesLinear | HalvesEmbedding)}


@torch.no_grad()
def test_it_computes_what_float32_does_in_half_of_the_memory(folder):
    model, wide = load(folder, device="cpu"), load(folder, device="cpu", dtype="float32")
    assert not halved(wide)
    # Keys and values of one head are smaller.
    assert {name.rpartition(".")[2] for name in halved(model)} == {
        "embed_tokens", "lm_head", "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert model.dtype == torch.float32
    assert model.get_memory_footprint() < 0.6 * wide.get_memory_footprint()
    for tokens in (1, 20):
        torch.testing.assert_close(model(IDS[:, :tokens]).logits, wide(IDS[:, :tokens]).logits)
    generated = [one.generate(IDS, max_new_tokens=5, do_sample=False) for one in (model, wide, copy.deepcopy(model))]
    assert torch.equal(generated[0], generated[1])
    assert torch.equal(generated[0], generated[2])
    assert model.lm_head.weight.equal(wide.lm_head.weight)


def test_it_is_saved_and_loaded_as_float32(folder, tmp_path):
    model, wide = load(folder, device="cpu"), load(folder, device="cpu", dtype="float32")
    state = wide.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    doubled = {name: 2 * tensor for name, tensor in state.items()}
    model.load_state_dict(doubled)
    assert all(tensor.equal(doubled[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_cast_or_under_autocast_it_is_an_ordinary_model(folder):
    model, wide = load(folder, device="cpu"), load(folder, device="cpu", dtype="float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(IDS).logits, wide(IDS).logits)
    assert halved(model.to("cpu"))
    model, wide = model.to(torch.bfloat16), wide.to(torch.bfloat16)
    assert not halved(model)
    torch.testing.assert_close(model(IDS).logits, wide(IDS).logits)


def test_weights_that_the_model_reads_itself_or_that_lose_digits_stay(folder):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    up, down = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj
    up.weight.data[0, 0] = 1 + 2.0**-20
    handle = down.register_forward_pre_hook(lambda layer, given: (given[0].to(layer.weight.dtype),))
    halves.narrow(model, torch.bfloat16, input_ids=IDS)
    handle.remove()
    assert not isinstance(up, HalvesLinear)
    assert not isinstance(down, HalvesLinear)
    assert isinstance(down.weight, nn.Parameter)
    assert isinstance(model.model.layers[1].mlp.up_proj, HalvesLinear)


def test_without_kernels_it_is_loaded_in_float32(folder, monkeypatch):
    monkeypatch.setattr(loader.cpu, "unavailable", lambda: "no compiler")
    assert not halved(load(folder, device="cpu"))
