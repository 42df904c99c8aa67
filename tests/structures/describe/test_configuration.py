"""Configs of smaller models: found, refused, audited, and with layer-specific sizes."""

from typing import Any

import pytest
import torch
from shrinking import Cuts, by_kind, cut_all, logits, masked_logits, shrunk_state
from tiny_models import build, random_ids
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmprune.errors import ModelError
from llmprune.models.decoder import Decoder
from llmprune.models.skeleton import build_skeleton
from llmprune.models.uneven import apply_per_layer, build_decoder, read_per_layer
from llmprune.structures.describe.audit import audit
from llmprune.structures.describe.configuration import _Search, smaller_config, uneven_config
from llmprune.structures.find.discovery import find_structures
from llmprune.structures.remove.cuts import Cut


def cuts_of(model: PreTrainedModel, kind: str, removed: tuple[int, ...] = (1,)) -> Cuts:
    found = find_structures(Decoder.find(model))
    return {
        layer: [Cut(s, removed) for s in structures if s.kind == kind and s.refusal is None]
        for layer, structures in enumerate(found)
    }


def shapes(model: PreTrainedModel) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("family", "kind", "attributes"),
    [
        ("llama", "heads", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
        ("phi", "heads", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
        ("gemma", "heads", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
        ("gpt2", "ffn", {"n_inner": 127, "n_head": 4}),
        ("opt", "ffn", {"ffn_dim": 47}),
        ("recurrent_gemma", "ffn", {"intermediate_size": 46}),
        ("gemma3n", "ffn", {"intermediate_size": [47] * 4}),
        ("qwen2_moe", "ffn", {"moe_intermediate_size": 23, "shared_expert_intermediate_size": 39}),
        ("glm_moe_dsa", "experts", {"n_routed_experts": 3, "index_n_heads": 2}),
    ],
)
def test_the_attributes_that_change(family: str, kind: str, attributes: dict[str, Any]) -> None:
    model = build(family)
    smaller = smaller_config(model.config, cuts_of(model, kind))
    assert {name: getattr(smaller, name) for name in attributes} == attributes
    # Nothing else does.
    before, after = model.config.to_dict(), smaller.to_dict()
    assert {key for key in before | after if before.get(key) != after.get(key)} <= set(attributes)


def test_the_config_that_was_given_stays() -> None:
    model = build("llama")
    before = model.config.to_dict()
    smaller_config(model.config, cuts_of(model, "ffn"))
    assert model.config.to_dict() == before


def test_one_attribute_for_two_structures() -> None:
    """Shared experts are twice as wide as routed ones, and one number says both."""
    model = build("deepseek_v3", n_shared_experts=2)
    cuts: Cuts = {}
    for layer, structures in enumerate(find_structures(Decoder.find(model))):
        ffn = [s for s in structures if s.kind == "ffn"]
        cuts[layer] = [Cut(s, tuple(range(s.groups // 3))) for s in ffn]
    smaller = smaller_config(model.config, cuts)
    assert (smaller.moe_intermediate_size, smaller.intermediate_size, smaller.n_shared_experts) == (16, 32, 2)
    with pytest.raises(ModelError, match="no attribute"):
        smaller_config(model.config, {layer: own[:1] for layer, own in cuts.items()})


def test_what_the_config_cannot_say_is_refused() -> None:
    model = build("gpt2")
    with pytest.raises(ModelError) as error:
        smaller_config(model.config, cuts_of(model, "heads"))
    assert "3 of 4 groups (heads)" in error.value.what
    assert "n_head=3, head_dim=8: the model cannot be built" in error.value.expected


def test_a_config_that_its_own_class_refuses() -> None:
    """Llama wants a hidden size that is a multiple of its heads, although it need not be."""
    model = build("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    with pytest.raises(ModelError, match="multiple of the number of attention heads"):
        smaller_config(model.config, cuts_of(model, "heads"))
    assert smaller_config(model.config, cuts_of(model, "heads", (0, 2))).num_attention_heads == 4


def test_what_changes_beside_the_shapes_is_noticed() -> None:
    granite = _Search(build("granite").config, {}, None)
    assert granite.other_differences({}, None) == []
    scaled = granite.other_differences({("attention_multiplier",): 2}, None)
    assert scaled[0] == "model.layers.0.self_attn.scaling would be 2, not 1.0"
    rotated = granite.other_differences({("rope_parameters", "rope_theta"): 7}, None)
    assert "the buffer model.rotary_emb.inv_freq would change" in rotated


def test_layers_that_differ_need_overrides() -> None:
    model = build("llama")
    cuts = cuts_of(model, "ffn")
    with pytest.raises(ModelError, match="or use a budget"):
        smaller_config(model.config, {1: cuts[1]})


def test_fewer_experts_than_a_token_chooses() -> None:
    model = build("mixtral")
    with pytest.raises(ModelError, match="2 of 1 experts are to be selected"):
        smaller_config(model.config, cuts_of(model, "experts", (0, 1, 2)))


def test_a_layer_that_does_not_exist() -> None:
    model = build("llama")
    with pytest.raises(ModelError, match="no layer 7"):
        smaller_config(model.config, {7: cuts_of(model, "ffn")[0]})


def uneven(family: str) -> tuple[PreTrainedModel, Cuts]:
    model = build(family, num_hidden_layers=3)
    found = find_structures(Decoder.find(model))
    ffn = [by_kind(found, layer, "ffn")[0] for layer in range(3)]
    heads = by_kind(found, 2, "heads")[0]
    return model, {0: [Cut(ffn[0], (3, 5))], 2: [Cut(ffn[2], tuple(range(7, 20))), Cut(heads, (0,))]}


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "cohere"])
def test_layers_of_different_widths(family: str) -> None:
    model, cuts = uneven(family)
    config = uneven_config(model.config, cuts)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    found = read_per_layer(config)
    assert found[0] == {"intermediate_size": 46}
    assert found[2].items() >= {"intermediate_size": 35, **heads}.items()
    assert set(found) == {0, 2}
    reread = AutoConfig.for_model(**config.to_dict())
    assert read_per_layer(reread) == found
    small = build_decoder(reread).model
    small.load_state_dict(shrunk_state(model, cuts), assign=True)
    ids = random_ids(2, 20)
    assert torch.allclose(logits(small, ids), masked_logits(model, cuts, ids), rtol=0, atol=2e-6)
    assert audit(config, shapes(small)) == []


def test_overrides_are_applied_before_weights_are_loaded() -> None:
    model, cuts = uneven("llama")
    config = uneven_config(model.config, cuts)
    plain = build_skeleton(model.config)
    apply_per_layer(Decoder.find(plain), config)
    assert shapes(plain) == {name: list(tensor.shape) for name, tensor in shrunk_state(model, cuts).items()}
    assert {p.device.type for p in plain.parameters()} == {"meta"}


def test_a_pruned_model_is_pruned_again() -> None:
    model, cuts = uneven("llama")
    config = uneven_config(model.config, cuts)
    small = build_decoder(config).model
    found = find_structures(Decoder.find(small))
    assert [by_kind(found, layer, "ffn")[0].groups for layer in range(3)] == [46, 48, 35]


def test_an_architecture_that_owns_the_overrides() -> None:
    model = build("gemma4")
    cuts = {0: [Cut(by_kind(find_structures(Decoder.find(model)), 0, "ffn")[0], (0,))]}
    with pytest.raises(ModelError, match="already defines per_layer_config"):
        uneven_config(model.config, cuts)
    assert read_per_layer(model.config) == {}


def test_overrides_of_a_layer_that_does_not_exist() -> None:
    model, cuts = uneven("llama")
    data = uneven_config(model.config, cuts).to_dict()
    data["num_hidden_layers"] = 2
    data["per_layer_config"] = {"1": {"intermediate_size": 8}}
    config = AutoConfig.for_model(**data)
    fewer = build_skeleton(AutoConfig.for_model(**{**model.config.to_dict(), "num_hidden_layers": 1}))
    with pytest.raises(ModelError, match="names layer 1"):
        apply_per_layer(Decoder.find(fewer), config)


def test_a_sound_checkpoint_has_nothing_to_complain_about() -> None:
    for family in ("llama-tied", "gemma3-vision", "gpt_oss"):
        model = build(family)
        assert audit(model.config, shapes(model)) == []


def test_tied_weights_need_to_be_there_once() -> None:
    model = build("llama-tied")
    here = shapes(model)
    del here["lm_head.weight"]
    assert audit(model.config, here) == []
    del here["model.embed_tokens.weight"]
    assert audit(model.config, here) == ["lm_head.weight is missing", "model.embed_tokens.weight is missing"]


def test_the_audit_names_what_is_wrong() -> None:
    model = build("llama")
    here = shapes(model)
    here["model.layers.1.mlp.up_proj.weight"] = [40, 32]
    here["model.layers.0.mlp.up_proj.scale"] = [48]
    del here["model.layers.0.self_attn.q_proj.bias"]
    assert audit(model.config, here) == [
        "model.layers.0.mlp.up_proj.scale is not part of the model",
        "model.layers.0.self_attn.q_proj.bias is missing",
        "model.layers.1.mlp.up_proj.weight has shape [40, 32], but the config says [48, 32]",
    ]


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("mixtral", {"num_experts_per_tok": 5}, "5 of 4 experts are to be selected"),
        ("deepseek_v3", {"n_group": 3}, "8 experts cannot be split into 3 groups"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 2 layers"),
        ("qwen3", {"num_key_value_heads": 3}, "the model does not run"),
    ],
)
def test_configs_that_contradict_themselves(family: str, changes: dict[str, Any], problem: str) -> None:
    model = build(family)
    for name, value in changes.items():
        setattr(model.config, name, value)
    here = shapes(build_skeleton(model.config))
    assert any(problem in line for line in audit(model.config, here))


def test_the_stock_class_loads_the_state() -> None:
    model = build("qwen3")
    cuts, _ = cut_all(find_structures(Decoder.find(model)), "ffn")
    small = AutoModelForCausalLM.from_config(smaller_config(model.config, cuts))
    assert small.load_state_dict(shrunk_state(model, cuts)).missing_keys == []
