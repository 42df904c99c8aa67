"""Every architecture: the shrunk checkpoint, loaded by stock transformers, computes what the masked model does."""

from pathlib import Path

import pytest
import torch
from shrinking import Cuts, by_kind, cut_all, logits, masked_logits, shrunk_state, structures_of
from tiny_models import FAMILIES, build, every_family, known, random_ids, save
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.errors import ModelError, PatternError
from llmprune.models.decoder import Decoder
from llmprune.structures.describe.audit import audit
from llmprune.structures.describe.configuration import smaller_config
from llmprune.structures.find.discovery import Slice, Structure, find_structures
from llmprune.structures.remove.cuts import Cut, mask, shrink

# Older transformers script a function of GPT-BigCode, which torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

EXACT, NONE = "exact", "none"
# What stands in the way of the heads, FFN channels and experts of a family.
FIXED = "fixed"  # the config cannot express it
ALIBI = "different values for each group"
SHARED = "later layers read the same keys and values"
NORMED = "is normalised over all groups"
OUTCOMES: dict[str, tuple[str, str, str]] = {
    "llama": (EXACT, EXACT, NONE),
    "llama-tied": (EXACT, EXACT, NONE),
    "mistral": (EXACT, EXACT, NONE),
    "qwen2": (EXACT, EXACT, NONE),
    "qwen3": (EXACT, EXACT, NONE),
    "gemma": (EXACT, EXACT, NONE),
    "gemma2": (EXACT, EXACT, NONE),
    "gemma3": (EXACT, EXACT, NONE),
    "gemma3-vision": (EXACT, EXACT, NONE),
    "gemma3n": (SHARED, EXACT, NONE),
    "gemma4": (SHARED, EXACT, NONE),
    "phi": (EXACT, EXACT, NONE),
    "phi3": (EXACT, EXACT, NONE),
    "openai-gpt": (FIXED, FIXED, NONE),
    "gpt2": (FIXED, EXACT, NONE),
    "gpt_bigcode": (FIXED, EXACT, NONE),
    "gpt_neo": (FIXED, EXACT, NONE),
    "gptj": (FIXED, EXACT, NONE),
    "gpt_neox": (FIXED, EXACT, NONE),
    "gpt_neox-sequential": (FIXED, EXACT, NONE),
    "opt": (FIXED, EXACT, NONE),
    "opt-350m": (FIXED, EXACT, NONE),
    "bloom": (ALIBI, FIXED, NONE),
    "falcon-7b": (FIXED, EXACT, NONE),
    "falcon-40b": (FIXED, EXACT, NONE),
    "falcon-rw": (ALIBI, EXACT, NONE),
    "mpt": (ALIBI, FIXED, NONE),
    "olmo": (EXACT, EXACT, NONE),
    "olmo2": (NORMED, EXACT, NONE),
    "stablelm": ("different shares of self_attn.k_layernorm", EXACT, NONE),
    "cohere": (EXACT, EXACT, NONE),
    "cohere2": (EXACT, EXACT, NONE),
    "granite": (EXACT, EXACT, NONE),
    "smollm3": (EXACT, EXACT, NONE),
    "starcoder2": (EXACT, EXACT, NONE),
    "nemotron": (EXACT, EXACT, NONE),
    "glm": (EXACT, EXACT, NONE),
    "glm4": (EXACT, EXACT, NONE),
    "xglm": (FIXED, EXACT, NONE),
    "mixtral": (EXACT, EXACT, EXACT),
    "qwen2_moe": (EXACT, EXACT, EXACT),
    "qwen3_moe": (EXACT, EXACT, EXACT),
    "olmoe": (NORMED, EXACT, EXACT),
    "deepseek_v3": (EXACT, EXACT, "its router chooses groups of experts first"),
    "deepseek_v4": (EXACT, EXACT, NONE),  # some layers route by a table of token ids
    "glm_moe_dsa": (EXACT, EXACT, EXACT),
    "gpt_oss": (EXACT, EXACT, EXACT),
    "granitemoe": (EXACT, EXACT, EXACT),
    "granitemoehybrid": (EXACT, EXACT, EXACT),
    "jetmoe": (EXACT, EXACT, EXACT),
    "llama4": (EXACT, EXACT, EXACT),
    "phimoe": (EXACT, EXACT, NONE),  # it masks all but the highest score instead of a top-k
    "dbrx": (FIXED, EXACT, EXACT),
    "zaya": ("different shares of self_attn.qkv_proj", EXACT, NONE),  # one more choice than experts
    "mamba": (NONE, NONE, NONE),
    "mamba2": (NONE, NONE, NONE),
    "falcon_mamba": (NONE, NONE, NONE),
    "jamba": (EXACT, EXACT, EXACT),
    "bamba": (EXACT, EXACT, NONE),
    "falcon_h1": (EXACT, EXACT, NONE),
    "nemotron_h": (EXACT, EXACT, EXACT),
    "rwkv": (NONE, EXACT, NONE),
    "qwen3_next": (EXACT, EXACT, EXACT),
    "lfm2": (EXACT, EXACT, NONE),
    "recurrent_gemma": (FIXED, EXACT, NONE),  # its recurrent layers have as many heads
}  # fmt: skip


def test_every_family_has_an_outcome() -> None:
    assert set(OUTCOMES) == set(FAMILIES)


@every_family
def test_the_shrunk_checkpoint_computes_what_the_masked_model_does(family: str, tmp_path: Path) -> None:
    """All kinds that can go exactly go at once; the others are refused for the reason in the table."""
    if not known(family):
        pytest.skip(f"this transformers does not know {FAMILIES[family][0]}")
    model, found = build(family), structures_of(family)
    exact: Cuts = {}
    for kind, expected in zip(("heads", "ffn", "experts"), OUTCOMES[family], strict=True):
        for layer, cuts in possible_cuts(model, found, kind, expected).items():
            exact.setdefault(layer, []).extend(cuts)
    if exact:
        check_exactness(family, model, exact, tmp_path)


def possible_cuts(model: PreTrainedModel, found: list[list[Structure]], kind: str, expected: str) -> Cuts:
    cuts, refusals = cut_all(found, kind)
    if expected == NONE:
        assert not cuts
        assert not refusals
    elif expected == FIXED:
        assert not refusals
        with pytest.raises(ModelError, match=r"^no (attribute|config)"):
            smaller_config(model.config, cuts)
    elif expected != EXACT:
        assert not cuts
        assert any(expected in refusal for refusal in refusals)
    else:
        # Gemma gates a small input of each layer channel by channel, like an FFN.
        assert all(ALIBI in refusal and kind == "ffn" for refusal in refusals)
        return cuts
    return {}


def check_exactness(family: str, model: PreTrainedModel, cuts: Cuts, folder: Path) -> None:
    config = smaller_config(model.config, cuts)
    state = shrunk_state(model, cuts)
    assert audit(config, {name: tensor.shape for name, tensor in state.items()}) == []
    small = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    small.load_state_dict(state)
    loaded = AutoModelForCausalLM.from_pretrained(save(small, folder), experts_implementation="eager").eval()
    ids = random_ids(2, 20)
    dense, masked = logits(model, ids), masked_logits(model, cuts, ids)
    scale = float(dense.abs().max())
    assert float((logits(loaded, ids) - masked).abs().max()) < 5e-6 * scale
    assert float((dense - masked).abs().max()) > 1e-4 * scale, "what was removed had no effect"


def test_heads_and_channels_go_together(tmp_path: Path) -> None:
    model = build("phi3")
    found = find_structures(Decoder.find(model))
    heads, channels = cut_all(found, "heads")[0], cut_all(found, "ffn")[0]
    both = {layer: heads[layer] + channels[layer] for layer in heads}
    config = smaller_config(model.config, both)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 34)
    small = AutoModelForCausalLM.from_config(config).eval()
    small.load_state_dict(shrunk_state(model, both))
    ids = random_ids(2, 20)
    assert torch.allclose(logits(small, ids), masked_logits(model, both, ids), rtol=0, atol=2e-6)


def test_the_model_shrinks_physically() -> None:
    model = build("llama")
    cuts, _ = cut_all(find_structures(Decoder.find(model)), "heads")
    state = shrunk_state(model, cuts)
    full = model.state_dict()
    weight = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(state[weight], full[weight][:, :16])
    assert torch.equal(state["model.layers.1.self_attn.k_proj.bias"], full["model.layers.1.self_attn.k_proj.bias"][:8])
    assert state["model.layers.1.mlp.up_proj.weight"].data_ptr() == full["model.layers.1.mlp.up_proj.weight"].data_ptr()


def test_the_first_group_goes_as_well_as_the_last() -> None:
    for removed in ((0,), (1,)):
        model = build("gpt_oss")
        found = find_structures(Decoder.find(model))
        cuts = {layer: [Cut(by_kind(found, layer, "heads")[0], removed)] for layer in range(2)}
        small = AutoModelForCausalLM.from_config(smaller_config(model.config, cuts), experts_implementation="eager")
        small.eval().load_state_dict(shrunk_state(model, cuts))
        ids = random_ids(2, 20)
        assert torch.allclose(logits(small, ids), masked_logits(model, cuts, ids), rtol=0, atol=1e-5)


def structure(refusal: str | None = None) -> Structure:
    index = torch.arange(6).view(3, 2)
    slices = () if refusal else (Slice("weight", 1, index), Slice("bias", 0, torch.arange(3).view(3, 1)))
    return Structure("ffn", "weight", 3, 2, slices, refusal)


@pytest.mark.parametrize("removed", [(0, 0), (3,), (-1,), (0, 1, 2)])
def test_groups_that_cannot_go(removed: tuple[int, ...]) -> None:
    with pytest.raises(PatternError, match="below 3, and not all"):
        Cut(structure(), removed)


def test_a_refused_structure_cannot_be_cut() -> None:
    with pytest.raises(ModelError, match="because of the moon"):
        Cut(structure("because of the moon"), (0,))


def test_cuts_refer_to_the_full_size() -> None:
    tensors = {"weight": torch.arange(12.0).view(2, 6), "bias": torch.arange(3.0), "other": torch.ones(1)}
    result = shrink(tensors, [Cut(structure(), (0,)), Cut(structure(), (2,))])
    assert result["weight"].tolist() == [[2, 3], [8, 9]]
    assert result["bias"].tolist() == [1]
    assert result["other"] is tensors["other"]
    assert tensors["weight"].shape == (2, 6)


@pytest.mark.parametrize("tensors", [{"bias": torch.ones(3)}, {"weight": torch.ones(2, 4), "bias": torch.ones(3)}])
def test_tensors_that_do_not_fit(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ModelError, match=r"weight: .* index 5 of its dimension 1"):
        shrink(tensors, [Cut(structure(), (2,))])


def test_a_mask_zeroes_what_goes_and_nothing_else() -> None:
    layer = nn.Linear(6, 3)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    mask(layer, Cut(structure(), (1,)))
    assert not layer.weight[:, 2:4].any()
    assert layer.bias[1] == 0
    assert torch.equal(layer.weight[:, [0, 1, 4, 5]], before["weight"][:, [0, 1, 4, 5]])
    assert torch.equal(layer.bias[[0, 2]], before["bias"][[0, 2]])


def test_routing_is_restored() -> None:
    model = build("glm_moe_dsa")
    cuts, _ = cut_all(find_structures(Decoder.find(model)), "experts")
    ids = random_ids(2, 20)
    before = logits(model, ids)
    assert not torch.equal(masked_logits(model, cuts, ids), before)
    assert torch.equal(logits(model, ids), before)
