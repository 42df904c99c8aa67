"""Llamas whose heads do not divide their hidden size are described as Mistrals, which compute the same outputs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shrinking import Cuts, by_kind, logits, masked_logits, shrunk_state
from tiny_models import build, random_ids, save
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedModel,
)

from llmprune.errors import ModelError
from llmprune.models.decoder import Decoder
from llmprune.models.uneven import build_decoder, read_per_layer
from llmprune.storage.hub import resolve_model
from llmprune.structures.describe import equals
from llmprune.structures.describe.audit import audit
from llmprune.structures.describe.configuration import smaller_config, uneven_config
from llmprune.structures.describe.equals import equal_config
from llmprune.structures.find.discovery import find_query_heads, find_structures
from llmprune.structures.remove.cuts import Cut

IDS = random_ids(2, 40)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def llama(**changes: Any) -> PreTrainedModel:
    """With eight query heads, of which six do not divide the hidden size."""
    return build("llama-tied", num_attention_heads=8, num_key_value_heads=4, head_dim=8, **changes)


def cuts_of(model: PreTrainedModel, removed: tuple[int, ...] = (1,)) -> Cuts:
    found = find_structures(Decoder.find(model))
    return {layer: [Cut(by_kind(found, layer, "heads")[0], removed)] for layer in range(len(found))}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": YARN},
        {"tie_word_embeddings": False, "rms_norm_eps": 1e-3, "hidden_act": "gelu"},
        {"num_key_value_heads": 1, "head_dim": 16},
    ],
)
def test_both_classes_compute_the_same(changes: dict[str, Any]) -> None:
    model = build("llama-tied", **changes)
    config = equal_config(model.config)
    assert config is not None
    other = AutoModelForCausalLM.from_config(config).eval()
    assert type(other).__name__ == "MistralForCausalLM"
    loaded = other.load_state_dict(model.state_dict())
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
    assert torch.equal(logits(other, IDS), logits(model, IDS))
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(other.generate(IDS, **options), model.generate(IDS, **options))


def test_everything_else_is_carried_over() -> None:
    model = llama(rope_parameters=LLAMA3, bos_token_id=5, eos_token_id=[6, 7], attention_dropout=0.25)
    config = equal_config(model.config)
    assert config is not None
    before, after = model.config.to_dict(), config.to_dict()
    assert {key for key in before | after if before.get(key) != after.get(key)} == {
        "architectures", "attention_bias", "mlp_bias", "model_type", "pretraining_tp",
    }  # fmt: skip
    assert after["architectures"] == ["MistralForCausalLM"]
    assert after["sliding_window"] is None


@pytest.mark.parametrize("model_type", ["internlm3", "iquestcoder"])
def test_other_configs_of_the_same_class(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {model_type}")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = equal_config(CONFIG_MAPPING[model_type](**sizes, **heads, **tokens))
    assert config is not None
    assert config.model_type == "mistral"


def test_what_has_no_equal() -> None:
    assert equal_config(build("qwen2").config) is None
    for key, value in (("attention_bias", True), ("mlp_bias", True), ("pretraining_tp", 2)):
        model = build("llama-tied")
        setattr(model.config, key, value)
        with pytest.raises(ModelError, match=f"MistralForCausalLM accepts .* has no {key}"):
            equal_config(model.config)


@pytest.mark.parametrize(
    ("changed", "noticed"),
    [
        ({"rms_norm_eps": 1e-3}, r"variance_epsilon would be 0\.001, not 1e-06"),
        ({"head_dim": 16}, "scaling would be"),
        ({"num_key_value_heads": 4}, r"k_proj.weight would be \[32, 32\], not \[16, 32\]"),
        ({"num_hidden_layers": 2}, "would be"),
        ({"hidden_act": "gelu"}, "act_fn would be a GELU.*, not a SiLU"),
        ({"rope_parameters": YARN | {"attention_factor": 1.0}}, "the buffer model.rotary_emb.inv_freq would change"),
    ],
)
def test_a_difference_is_noticed(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], noticed: str) -> None:
    """Should the two classes part one day, the config is refused."""
    row = equals._EQUALS["LlamaForCausalLM"]
    monkeypatch.setitem(equals._EQUALS, "LlamaForCausalLM", replace(row, sets={**row.sets, **changed}))
    with pytest.raises(ModelError, match=f"not equivalent: .*{noticed}"):
        equal_config(build("llama-tied").config)


def test_the_shrunk_model_is_a_mistral(tmp_path: Path) -> None:
    model = llama(rope_parameters=LLAMA3)
    cuts = cuts_of(model)
    config = smaller_config(model.config, cuts)
    assert config.model_type == "mistral"
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 3, 8)
    state = shrunk_state(model, cuts)
    assert audit(config, {name: tensor.shape for name, tensor in state.items()}) == []
    small = AutoModelForCausalLM.from_config(config)
    small.load_state_dict(state)
    loaded = AutoModelForCausalLM.from_pretrained(save(small, tmp_path)).eval()
    assert loaded.config.sliding_window is None
    assert torch.allclose(logits(loaded, IDS), masked_logits(model, cuts, IDS), rtol=0, atol=2e-6)


def test_six_of_eight_heads_of_the_testbed() -> None:
    model = AutoModelForCausalLM.from_pretrained(resolve_model("testbed"), dtype=torch.float32).eval()
    cuts = cuts_of(model)
    config = smaller_config(model.config, cuts)
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (256, 6, 3)
    small = AutoModelForCausalLM.from_config(config).eval()
    small.load_state_dict(shrunk_state(model, cuts))
    dense, masked = logits(model, IDS), masked_logits(model, cuts, IDS)
    assert float((logits(small, IDS) - masked).abs().max()) < 2e-6 * float(dense.abs().max())
    assert float((dense - masked).abs().max()) > 0.1


def test_a_llama_stays_one_where_it_can() -> None:
    model = llama()
    assert smaller_config(model.config, cuts_of(model, (0, 2))).model_type == "llama"
    query = {layer: [Cut(own[0], (0, 2, 4, 6))] for layer, own in enumerate(find_query_heads(Decoder.find(model)))}
    assert smaller_config(model.config, query).model_type == "llama"


def test_query_heads_of_a_llama() -> None:
    model = build("llama-tied", num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    cuts = {layer: [Cut(own[0], (1, 6))] for layer, own in enumerate(find_query_heads(Decoder.find(model)))}
    config = smaller_config(model.config, cuts)
    assert (config.model_type, config.num_attention_heads, config.num_key_value_heads) == ("mistral", 6, 2)


def test_layers_that_differ() -> None:
    model = llama()
    cuts = {1: cuts_of(model)[1]}
    config = uneven_config(model.config, cuts)
    assert config.model_type == "mistral"
    assert read_per_layer(config) == {1: {"num_attention_heads": 6, "num_key_value_heads": 3}}
    small = build_decoder(config).model
    small.load_state_dict(shrunk_state(model, cuts), assign=True)
    assert torch.allclose(logits(small, IDS), masked_logits(model, cuts, IDS), rtol=0, atol=2e-6)


def test_the_error_says_what_stands_in_the_way() -> None:
    model = build("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    with pytest.raises(ModelError, match="multiple of the number of attention heads") as error:
        smaller_config(model.config, cuts_of(model))
    assert "MistralForCausalLM accepts such sizes and is otherwise equivalent, but has no attention_bias" in (
        error.value.fix
    )


def test_other_errors_do_not_speak_of_it() -> None:
    model = build("llama")
    with pytest.raises(ModelError, match="or use a budget") as error:
        smaller_config(model.config, {1: cuts_of(model)[1]})
    assert "Mistral" not in str(error.value)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_the_tokenizer_gives_the_same_tokens(tmp_path: Path, named: str, bos: bool) -> None:
    """A Mistral's folder is read by the class for any tokenizer.json, whatever class is named there."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefgh.,"]
    vocabulary = {token: number for number, token in enumerate([*letters, "▁a", "ab", "cd", "abcd"])}
    merges = [("▁", "a"), ("a", "b"), ("c", "d"), ("ab", "cd")]
    LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=bos).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**described, "tokenizer_class": named}))
    config = LlamaConfig(bos_token_id=1, eos_token_id=2)
    found = []
    for described in (config, equal_config(config)):
        described.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        ids = tokenizer("abcd ab  cd é\n a.</s> a").input_ids
        found.append((ids, tokenizer.decode(ids), tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)))
    assert found[0] == found[1]
    assert (found[0][0][0] == 1) == bos
