"""Attention or MLP of a layer removed: found, exact for every family, described by a config, and with a cache."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from shrinking import logits
from tiny_models import FAMILIES, build, known, random_ids
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, StaticCache

from llmprune.errors import ModelError
from llmprune.models.decoder import Decoder
from llmprune.models.skeleton import build_skeleton
from llmprune.models.uneven import RemovedBlock, build_decoder, read_per_layer, remove_blocks
from llmprune.structures.describe.audit import audit
from llmprune.structures.describe.configuration import smaller_config, uneven_config
from llmprune.structures.describe.depth import drop_layers, without_blocks
from llmprune.structures.find.discovery import Structure, find_structures
from llmprune.structures.find.subblocks import PARTS, Part, SubBlock, SubBlocks, find_subblocks, without
from llmprune.structures.remove.cuts import Cut, shrink

NO_ATTENTION = "has no separate attention"
NO_MLP = "has no separate mlp"
# family -> part -> why no layer, or its first one, can do without.
REFUSED: dict[str, dict[Part, str]] = {
    "bloom": {"attention": "adds the residual itself", "mlp": "adds the residual itself"},
    "mpt": {"mlp": "adds the residual itself"},
    "openai-gpt": {"attention": "attn returns a list"},
    "rwkv": {"attention": NO_ATTENTION, "mlp": "passes a state from token to token"},
    "mamba": {"attention": NO_ATTENTION, "mlp": NO_MLP},
    "mamba2": {"attention": NO_ATTENTION, "mlp": NO_MLP},
    "falcon_mamba": {"attention": NO_ATTENTION, "mlp": NO_MLP},
    "gemma3n": {"attention": "later layers read what self_attn computes"},
    "gemma4": {"attention": "later layers read what self_attn computes"},
    "zaya": {"mlp": "later layers read what mlp computes"},
    "granitemoehybrid": {"attention": NO_ATTENTION},
    "jamba": {"attention": NO_ATTENTION},
    "bamba": {"attention": NO_ATTENTION},
    "nemotron_h": {"attention": NO_ATTENTION, "mlp": NO_MLP},
    "qwen3_next": {"attention": NO_ATTENTION},
    "lfm2": {"attention": NO_ATTENTION},
    "recurrent_gemma": {"attention": NO_ATTENTION},
}

Removed = dict[int, Mapping[str, int]]


def smaller(model: PreTrainedModel, removed: Removed, config: Any = None) -> PreTrainedModel:
    """The model that a config without blocks describes, with the weights of the full one."""
    config = AutoConfig.for_model(**without_blocks(config or model.config, removed).to_dict())
    small = build_decoder(config).model
    state = {name: tensor for name, tensor in model.state_dict().items() if name in small.state_dict()}
    small.load_state_dict(state, assign=True)
    small.tie_weights()
    return small


def silence(layer: nn.Module, structures: list[Structure], block: SubBlock) -> None:
    """Zero the matrices that give a block's output, and all its biases, some of which are added to that."""
    state = dict(layer.named_parameters())
    inside = tuple(f"{name}." for name in block.modules)
    consumers = {structure.consumer for structure in structures}
    with torch.no_grad():
        for name in block.tensors:
            if name in consumers or (name in state and "bias" in name and name.startswith(inside)):
                state[name].zero_()


def first_or_all(blocks: list[SubBlocks], part: Part) -> list[int]:
    """The layers to do without: the first attention only, so that the cache has something to hold, but all MLPs."""
    able = [layer for layer, own in enumerate(blocks) if own[part].refusal is None]
    return able[:1] if part == "attention" else able


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_without_attention_or_mlp(family: str) -> None:
    if not known(family):
        pytest.skip(f"transformers has no {family}")
    model = build(family)
    found = find_structures(Decoder.find(model))
    blocks = find_subblocks(Decoder.find(model), found=found)
    refusals = {part: own.refusal for part, own in blocks[0].items() if own.refusal}
    expected = REFUSED.get(family, {})
    assert set(refusals) == set(expected)
    for part, refusal in refusals.items():
        assert expected[part] in str(refusal)
    for part in PARTS:
        if layers := first_or_all(blocks, part):
            check_exactness(family, found, blocks, part, layers)


def check_exactness(
    family: str, found: list[list[Structure]], blocks: list[SubBlocks], part: Part, layers: list[int]
) -> None:
    model = build(family)
    removed: Removed = {layer: blocks[layer][part].modules for layer in layers}
    if family == "gemma4":
        with pytest.raises(ModelError, match="already defines per_layer_config"):
            without_blocks(model.config, removed)
        return
    if family == "glm_moe_dsa" and part == "attention":
        with pytest.raises(ModelError, match=r"without self_attn of layer 0, the model does not run: .*top-k indices"):
            without_blocks(model.config, removed)
        return
    small = smaller(model, removed)
    decoder = Decoder.find(model)
    path, own = decoder.path, decoder.layers
    gone = {f"{path}.{layer}.{name}" for layer in layers for name in blocks[layer][part].tensors}
    assert model.state_dict().keys() - small.state_dict().keys() == gone
    assert gone
    ids = random_ids(2, 10)
    dense = logits(model, ids)
    for layer in layers:
        silence(own[layer], found[layer], blocks[layer][part])
    silenced = logits(model, ids)
    scale = float(dense.abs().max())
    assert float((logits(small, ids) - silenced).abs().max()) < 2e-6 * scale
    assert float((dense - silenced).abs().max()) > 1e-3 * scale, "what was removed had no effect"
    if part == "attention":
        assert torch.equal(generated(small, ids), generated(small, ids, use_cache=False))


def generated(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    result = model.generate(
        ids, **{"attention_mask": torch.ones_like(ids), "do_sample": False, "min_new_tokens": 4, **options},
        max_new_tokens=4, disable_compile=True,
    )  # fmt: skip
    assert isinstance(result, Tensor)
    return result


def without_first_attention(family: str = "llama") -> PreTrainedModel:
    model = build(family)
    return smaller(model, {0: find_subblocks(Decoder.find(model))[0]["attention"].modules})


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon-7b"])
@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"num_beams": 2}])
def test_other_ways_to_generate(family: str, options: dict[str, Any]) -> None:
    model = without_first_attention(family)
    ids = random_ids(3, 12)
    beams = {key: value for key, value in options.items() if key == "num_beams"}
    assert torch.equal(generated(model, ids, **options), generated(model, ids, use_cache=False, **beams))


def test_samples_of_different_lengths() -> None:
    model = without_first_attention()
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    assert torch.equal(
        generated(model, ids, attention_mask=mask), generated(model, ids, attention_mask=mask, use_cache=False)
    )
    assert torch.equal(generated(model, ids, attention_mask=mask)[:1, 4:], generated(model, ids[:1, 4:]))


def test_a_static_cache_with_memory_for_the_heads_that_were_there() -> None:
    model = without_first_attention()
    ids = random_ids(2, 9)
    cache = StaticCache(model.config, max_cache_len=16)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        outputs = [model(input_ids=part, past_key_values=cache).logits for part in (ids[:, :6], ids[:, 6:])]
    assert cache.get_seq_length() == 9
    assert torch.allclose(torch.cat(outputs, 1), logits(model, ids), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [
        ("llama", {"self_attn": 2}, {"mlp": 1}),
        ("gpt_neox", {"attention": 2}, {"mlp": 1}),
        ("opt", {"self_attn": 2}, {"fc1": 1, "fc2": 1}),
        ("gpt_oss", {"self_attn": 2}, {"mlp": 2}),
        ("dbrx", {"norm_attn_norm.attn": 2}, {"ffn": 1}),
        ("jetmoe", {"self_attention": 3}, {"mlp": 1}),
        ("granitemoehybrid", {"self_attn": 2}, {"block_sparse_moe": 1, "shared_mlp": 1}),
        ("llama4", {"self_attn": 2}, {"feed_forward.experts": 1, "feed_forward.shared_expert": 1}),
    ],
)
def test_which_modules_they_are(family: str, attention: dict[str, int], mlp: dict[str, int]) -> None:
    blocks = find_subblocks(Decoder.find(build_skeleton(build(family).config)))[1]
    assert blocks["attention"].modules == attention
    assert blocks["mlp"].modules == mlp


def test_a_later_layer_can_do_without_what_the_first_cannot() -> None:
    """Only the first two layers of this Gemma 3n give others their keys; the router of Zaya's last layer feeds none."""
    gemma, zaya = (find_subblocks(Decoder.find(build(family))) for family in ("gemma3n", "zaya"))
    assert [own["attention"].refusal is None for own in gemma] == [False, False, True, True]
    assert [own["mlp"].refusal is None for own in zaya] == [False, True]


def test_the_search_leaves_the_model_as_it_was() -> None:
    model = build("mixtral")
    ids = random_ids(2, 8)
    before, modules = logits(model, ids), list(model.modules())
    find_subblocks(Decoder.find(model))
    assert list(model.modules()) == modules
    assert not any("forward" in vars(module) for module in modules)
    assert torch.equal(logits(model, ids), before)


def test_a_block_is_missing_for_a_while() -> None:
    model = build("llama")
    layer, block = model.model.layers[1], find_subblocks(Decoder.find(model))[1]["mlp"]
    ids = random_ids(2, 8)
    before, module = logits(model, ids), layer.mlp
    with without(layer, 1, [block]):
        assert torch.equal(logits(model, ids), logits(smaller(model, {1: block.modules}), ids))
    with pytest.raises(KeyError), without(layer, 1, [block]):
        raise KeyError
    assert layer.mlp is module
    assert torch.equal(logits(model, ids), before)


def test_the_config_reads_back_and_grows() -> None:
    config = build("llama", num_hidden_layers=12).config
    once = without_blocks(config, {1: {"self_attn": 2}, 10: {"mlp": 1}})
    assert read_per_layer(once) == {1: {"removed_blocks": {"self_attn": 2}}, 10: {"removed_blocks": {"mlp": 1}}}
    twice = without_blocks(AutoConfig.for_model(**json.loads(once.to_json_string())), {1: {"mlp": 1}, 3: {}})
    assert read_per_layer(twice)[1] == {"removed_blocks": {"self_attn": 2, "mlp": 1}}
    assert set(read_per_layer(twice)) == {1, 10}
    assert read_per_layer(config) == {}
    layers = build_decoder(twice).model.model.layers
    removed = [
        (n, name) for n, layer in enumerate(layers) for name, m in layer.named_modules() if type(m) is RemovedBlock
    ]
    assert removed == [(1, "self_attn"), (1, "mlp"), (10, "mlp")]


@pytest.mark.parametrize("name", ["attention", "self_attn.nothing"])
def test_a_module_that_does_not_exist(name: str) -> None:
    model = build("llama")
    with pytest.raises(ModelError, match=f"'{name}' in layer 1, a LlamaDecoderLayer"):
        without_blocks(model.config, {1: {name: 1}})
    with pytest.raises(ModelError, match="self_attn, mlp, input_layernorm"):
        remove_blocks(model.model.layers[1], 1, {name: 1})


def test_together_with_smaller_widths_and_fewer_layers() -> None:
    model = build("llama", num_hidden_layers=4)
    decoder = Decoder.find(model)
    found, path, layers = find_structures(decoder), decoder.path, decoder.layers
    cuts = {1: [Cut(found[1][1], (3, 5))], 2: [Cut(found[2][0], (0,))]}
    blocks = find_subblocks(Decoder.find(model), found=found)
    config = uneven_config(model.config, cuts)
    config = without_blocks(config, {1: blocks[1]["attention"].modules, 3: blocks[3]["mlp"].modules})
    config, numbers = drop_layers(config, [1, 2, 3])
    assert read_per_layer(config)[0] == {"intermediate_size": 46, "removed_blocks": {"self_attn": 2}}
    assert read_per_layer(config)[2] == {"removed_blocks": {"mlp": 1}}
    small = build_decoder(config).model
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(path)}
    for old, new in numbers.items():
        state |= {f"{path}.{new}.{name}": t for name, t in shrink(layers[old].state_dict(), cuts.get(old, [])).items()}
    kept = {name: tensor for name, tensor in state.items() if name in small.state_dict()}
    assert len(state) - len(kept) == len(blocks[1]["attention"].tensors) + len(blocks[3]["mlp"].tensors)
    small.load_state_dict(kept, assign=True)
    assert audit(config, {name: tensor.shape for name, tensor in kept.items()}) == []
    del layers[0]
    for index, modules in ((0, {"self_attn": 2}), (2, {"mlp": 1})):
        remove_blocks(layers[index], index, modules)
    narrow = dict(small.named_parameters())
    with torch.no_grad():  # the same zeros at full size
        layers[0].mlp.down_proj.weight[:, [3, 5]] = 0
        layers[1].self_attn.o_proj.weight[:, :16] = 0
    ids = random_ids(2, 12)
    assert narrow[f"{path}.1.self_attn.o_proj.weight"].shape == (32, 16)
    assert torch.allclose(logits(small, ids), logits(model, ids), rtol=0, atol=2e-6)
    assert torch.equal(generated(small, ids), generated(small, ids, use_cache=False))


def test_together_with_equal_widths() -> None:
    model = build("llama")
    cuts = {layer: [Cut(own[1], (0, 1))] for layer, own in enumerate(find_structures(Decoder.find(model)))}
    config = without_blocks(smaller_config(model.config, cuts), {0: {"self_attn": 2}})
    shapes = {name: tuple(p.shape) for name, p in build_decoder(config).model.named_parameters()}
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (32, 46)
    assert not any(name.startswith("model.layers.0.self_attn") for name in shapes)


def test_a_model_without_blocks_is_searched_again() -> None:
    model = build("llama")
    config = without_blocks(model.config, {0: {"self_attn": 2}})
    blocks = find_subblocks(build_decoder(config))
    assert NO_ATTENTION in str(blocks[0]["attention"].refusal)
    assert blocks[0]["mlp"].modules == {"mlp": 1}
    assert blocks[1]["attention"].modules == {"self_attn": 2}
