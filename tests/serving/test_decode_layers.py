"""Decoder layers that take single tokens in two calls of the CPU library."""

import copy
import gc
import inspect
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpu_matrices import needs_kernels
from decoding import IDS, decoding, next_logits, plain
from packed_models import save_packed
from tiny_models import build, save
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmprune.kernels.cpu import CorruptMatrixError
from llmprune.serving import halves
from llmprune.serving.loader import load

pytestmark = [needs_kernels, pytest.mark.usefixtures("computed_in_float32")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(build("llama"), tmp_path_factory.mktemp("llama"))


def assert_equal(model, other, ids=IDS):
    torch.testing.assert_close(next_logits(model, ids), next_logits(other, ids), rtol=2e-4, atol=2e-4)
    tokens = [one.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False) for one in (model, other)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
def test_they_compute_what_the_ordinary_layers_do(family, tmp_path, counted):
    """Also behind the window of a layer that has one (8)."""
    folder = save(build(family, torch.bfloat16), tmp_path)
    model = load(folder, device="cpu", dtype="float32")
    layers = model.config.num_hidden_layers
    assert len(decoding(model)) == layers
    counted.clear()
    wanted = load(folder, device="cpu", dtype="float32", fused=False)
    assert_equal(model, wanted)
    assert len(counted) == 12 * layers  # the first of 12 is the prompt's


@pytest.mark.parametrize("layout", ["nm", "bitmask", "int8-bitmask", "dense"])
def test_every_form_of_weights_stays_as_it_is(layout, tmp_path, counted, monkeypatch):
    monkeypatch.setattr(halves, "MEASURED_WEIGHTS", 32 * 32)
    is_dense = layout == "dense"
    folder = save_packed(tmp_path, "bitmask" if is_dense else layout, "2:4" if layout == "nm" else "0.7")
    folder /= "dense" if is_dense else "packed"
    model, wanted = load(folder, device="cpu"), plain(folder)
    kinds = {weight.dtype for weight in model.parameters()}
    assert torch.bfloat16 in kinds if is_dense else any("packed" in name for name, _ in model.named_parameters())
    assert len(decoding(model)) == 2
    counted.clear()
    assert_equal(model, wanted)
    assert len(counted) == 24


def other_attention(module, query, key, value, mask, **options):
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, 2 * query, key, value, mask, **options)


def with_hook(kind):
    def change(model, monkeypatch):
        hook = {"register_forward_hook": lambda *_: None, "register_full_backward_hook": lambda *_: None}
        getattr(model.model.layers[1].mlp.act_fn, kind)(hook.get(kind, lambda *_: None))

    return change


def with_adapter(model, monkeypatch):
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Sequential(attention.q_proj)


def with_own_forward(model, monkeypatch):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x)


def with_patched_class(model, monkeypatch):
    kind = type(model.model.layers[1].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x))


def with_other_attention(model, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "other", other_attention)
    model.set_attn_implementation("other")


def with_another_sdpa(model, monkeypatch):
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def twice(module, query, *operands, **options):
        return sdpa(module, 2 * query, *operands, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", twice)


def with_patched_layer(model, monkeypatch):
    kind = type(model.model.layers[0])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, **options: forward(self, 2 * x, **options))


def with_part(model, monkeypatch):
    model.model.layers[1].mlp.register_module("adapter", torch.nn.Identity())


def with_other_eps(model, monkeypatch):
    model.model.layers[1].post_attention_layernorm.variance_epsilon = 1.0


CHANGES = {
    "bfloat16, never compared": (lambda model, _: model.bfloat16(), 0),
    "eager attention": (lambda model, _: model.set_attn_implementation("eager"), 0),
    "other attention": (with_other_attention, 0),
    "another sdpa": (with_another_sdpa, 0),
    "training": (lambda model, _: model.train(), 0),
    "double": (lambda model, _: model.double(), 0),
    "hook": (with_hook("register_forward_hook"), 1),
    "pre-hook": (with_hook("register_forward_pre_hook"), 1),
    "backward hook": (with_hook("register_full_backward_hook"), 1),
    "adapter": (with_adapter, 1),
    "own forward": (with_own_forward, 1),
    "patched class": (with_patched_class, 0),
    "patched layer": (with_patched_layer, 0),
    "another part": (with_part, 1),
    "another eps": (with_other_eps, 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_since_is_left_to_the_ordinary_layer(change, folder, counted, monkeypatch):
    model, wanted = load(folder, device="cpu"), plain(folder)
    for one in (model, wanted):
        CHANGES[change][0](one, monkeypatch)
    counted.clear()
    torch.testing.assert_close(next_logits(model), next_logits(wanted))
    assert len(counted) == CHANGES[change][1]


@torch.no_grad()
def test_calls_for_more_than_a_token_are_left_to_the_ordinary_layer(folder, counted, monkeypatch):
    model, token = load(folder, device="cpu"), IDS[:, :1]
    counted.clear()
    with torch.enable_grad():
        model(token).logits.sum().backward()
    model(IDS)
    model(token.repeat(2, 1))
    with torch.autocast("cpu", torch.bfloat16):
        model(token)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's attention has no rule for vmap
        torch.func.vmap(lambda ids: model(ids).logits)(token[None])
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    model(token)
    hook.remove()
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        model(token)
    assert not counted
    model(token, use_cache=False)
    assert len(counted) == 2


def test_hooks_of_the_layer_itself_see_what_the_library_makes(folder, counted):
    model, wanted, seen = load(folder, device="cpu"), plain(folder), []
    model.model.layers[0].register_forward_hook(lambda layer, args, output: seen.append(output))
    counted.clear()
    next_logits(model)
    assert (len(seen), len(counted)) == (2, 2)
    with torch.no_grad():
        states = [one(IDS[:, :1], output_hidden_states=True).hidden_states for one in (model, wanted)]
    torch.testing.assert_close(*states)


def test_a_mask_and_a_cache_of_fixed_length_are_obeyed(folder, counted):
    model, wanted = load(folder, device="cpu"), plain(folder)
    counted.clear()
    masked = {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])}
    torch.testing.assert_close(next_logits(model, **masked), next_logits(wanted, **masked))
    assert not torch.allclose(next_logits(model, **masked), next_logits(model), atol=1e-2)
    tokens = [
        one.generate(IDS, max_new_tokens=5, do_sample=False, past_key_values=StaticCache(one.config, 20))
        for one in (model, wanted)
    ]
    assert torch.equal(*tokens)
    assert len(counted) == 3 * 2 + 4 * 2


def test_copies_are_ordinary_layers(folder, counted, tmp_path):
    """What was changed in a copy before its first token would be taken for what was compared."""
    model = load(folder, device="cpu")
    names, keys = [name for name, _ in model.named_modules()], list(model.state_dict())
    assert names == [name for name, _ in plain(folder).named_modules()]
    assert keys == list(plain(folder).state_dict())
    wanted = next_logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(copy.deepcopy(model))):
        assert all(layer.forward.__self__ is layer for layer in other.model.layers)
        counted.clear()
        torch.testing.assert_close(next_logits(other), wanted)
        assert not counted
        other.model.layers[1].mlp.act_fn = torch.nn.Tanh()
        assert not torch.allclose(next_logits(other), wanted)
        assert torch.equal(next_logits(model), wanted)
    model.save_pretrained(tmp_path)
    assert torch.equal(next_logits(load(tmp_path, device="cpu")), wanted)


def test_a_model_that_is_dropped_is_gone_at_once(folder):
    model = load(folder, device="cpu")
    next_logits(model)
    layer = weakref.ref(model.model.layers[0])
    gc.collect()
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_layers_show_the_signature_of_their_class(folder):
    layer = load(folder, device="cpu").model.layers[0]
    found = inspect.signature(layer.forward)
    assert found == inspect.signature(plain(folder).model.layers[0].forward)
    del layer.forward
    assert inspect.signature(layer.forward) == found


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_to_the_ordinary_layer(folder, counted):
    layer, x = load(folder, device="cpu").model.layers[0], torch.randn(1, 1, 32)
    angles = torch.randn(2, 1, 1, layer.self_attn.head_dim).unbind()
    counted.clear()
    found = torch.compile(layer, backend="eager", fullgraph=True)(x, position_embeddings=angles)
    assert not counted
    torch.testing.assert_close(found, layer(x, position_embeddings=angles))
    assert counted


def test_other_weights_of_one_call_are_used(folder, counted):
    """`functional_call` puts tensors where parameters were."""
    model = load(folder, device="cpu")
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        ordinary = torch.func.functional_call(plain(folder), {name: torch.zeros(32, 48)}, (IDS[:, :1],)).logits
        counted.clear()
        found = torch.func.functional_call(model, {name: torch.zeros(32, 48)}, (IDS[:, :1],)).logits
        assert len(counted) == 1
        torch.testing.assert_close(found, ordinary)
        assert not torch.allclose(model(IDS[:, :1]).logits, found)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_damaged_matrices_are_refused_as_by_ordinary_layers(name, tmp_path):
    folder, said = save_packed(tmp_path, "bitmask", "0.7") / "packed", []
    for model in (load(folder, device="cpu"), plain(folder)):
        packed = model.model.layers[1].get_submodule(name).packed
        packed.data.view(torch.int64)[:4] = 0
        with pytest.raises(CorruptMatrixError) as refused:
            next_logits(model)
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_weights_that_are_replaced_or_moved_are_read_where_they_are(folder, counted):
    model = load(folder, device="cpu")
    mlp, wanted = model.model.layers[1].mlp, next_logits(model)
    mlp.down_proj.weight.data = mlp.down_proj.weight.data.clone()
    assert torch.equal(next_logits(model), wanted)
    mlp.down_proj.weight = torch.nn.Parameter(torch.zeros_like(mlp.down_proj.weight))
    changed = next_logits(model)
    assert not torch.equal(changed, wanted)
    counted.clear()
    assert torch.equal(next_logits(model.bfloat16().float()), next_logits(model))
    assert len(counted) == 4
    # Another shape is not read: the ordinary layer says what is wrong with it.
    mlp.down_proj.weight.data = torch.zeros(31, 48)
    with pytest.raises(RuntimeError):
        next_logits(model)


def test_threads_of_python_share_a_model(folder):
    model = load(folder, device="cpu")
    prompts = [IDS[:, first : first + 4] for first in range(4)]
    wanted = [model.generate(ids, max_new_tokens=8, do_sample=False) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: model.generate(ids, max_new_tokens=8, do_sample=False), prompts))
    assert all(map(torch.equal, found, wanted))
