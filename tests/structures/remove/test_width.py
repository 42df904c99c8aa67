"""Every architecture: the narrowed model equals the full one with zeroed channels, or is refused with a reason."""

import math
from typing import Any

import pytest
import torch
from narrowing import CHANNELS, factors_of, narrowed, restrict
from shrinking import logits
from tiny_models import FAMILIES, build, every_family, known, random_ids
from torch import Tensor
from transformers import AutoConfig
from transformers.models.llama import modeling_llama

from llmprune.errors import ModelError, NumericsError, PatternError
from llmprune.models.uneven import read_per_layer
from llmprune.structures.remove.width import plan_width, shrink_width

# Older transformers script a function of GPT-BigCode, which torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

# The norms of those that can be narrowed.
RMS, LAYER, LAYER_PLUS, RMS_PLUS = "rms", "layer", "layer+1", "rms+1"
KINDS = {RMS: (False, 0), RMS_PLUS: (False, 1), LAYER: (True, 0), LAYER_PLUS: (True, 1)}
# What stands in the way of the others.
SCALED = "scale would be"
HEADS = r"head_(dim|size) would be 6, not 8"
INNER = "does not accept a hidden size of 24"  # the size of a recurrence follows from it
OUTCOMES = {
    "gemma": "scalar_embed_scale would be 4.89",
    "gemma2": "scalar_embed_scale would be 4.89",
    "gemma3": "scalar_embed_scale would be 4.89",
    "gemma3-vision": "scalar_embed_scale would be 4.89",
    "gemma3n": "the buffer model.per_layer_projection_scale would change",
    "gemma4": SCALED,
    "phi": LAYER,
    "openai-gpt": "c_attn.nf would be 72, not 96",
    "gpt2": HEADS,
    "gpt_bigcode": HEADS,
    "gpt_neo": HEADS,
    "gptj": HEADS,
    "gpt_neox": HEADS,
    "gpt_neox-sequential": HEADS,
    "opt": HEADS,
    "opt-350m": HEADS,
    "bloom": HEADS,
    "falcon-7b": HEADS,
    "falcon-40b": HEADS,
    "falcon-rw": HEADS,
    "mpt": HEADS,
    "olmo": "a norm without a gain",
    "stablelm": HEADS,
    "cohere": LAYER,
    "cohere2": LAYER,
    "starcoder2": LAYER,
    "nemotron": LAYER_PLUS,
    "xglm": SCALED,
    "olmoe": r"k_norm.weight would be \[12\], not \[16\]",
    "deepseek_v4": r"attn_hc.fn would be \[8, 48\]",  # several streams of the hidden width
    "phimoe": LAYER,
    "dbrx": HEADS,
    "granitemoehybrid": INNER,
    "mamba2": INNER,
    "jamba": "mamba.intermediate_size would be 48, not 64",
    "bamba": INNER,
    "falcon_h1": "channels_attn would be 48, not 64",
    "rwkv": LAYER,
    "qwen3_next": RMS_PLUS,
    "lfm2": "conv.in_proj.out_features would be 72, not 96",
    "recurrent_gemma": "the buffer model.normalizer would change",
}


@every_family
def test_the_narrow_model_computes_what_the_full_one_does_with_zeros(family: str) -> None:
    if not known(family):
        pytest.skip(f"this transformers does not know {FAMILIES[family][0]}")
    model, outcome = build(family), OUTCOMES.get(family, RMS)
    if outcome not in KINDS:
        with pytest.raises(ModelError, match=outcome):
            plan_width(model.config, len(CHANNELS))
        return
    width = plan_width(model.config, len(CHANNELS))
    assert {(norm.centred, norm.offset) for norm in width.norms.values()} == {KINDS[outcome]}
    factors = factors_of(width)
    small = narrowed(model, width, CHANNELS, factors)
    ids = random_ids(2, 20)
    dense, found = logits(model, ids), logits(small, ids)
    restrict(model, small, width, factors)
    scale = float(dense.abs().max())
    assert float((found - logits(model, ids)).abs().max()) < 3e-6 * scale
    assert float((dense - found).abs().max()) > 1e-2 * scale, "what was removed had no effect"


def test_the_attributes_that_change() -> None:
    for family, attributes in {
        "qwen2": {"hidden_size": 24, "head_dim": 8, "rms_norm_eps": 1e-6 * 32 / 24},
        "glm": {"hidden_size": 24, "rms_norm_eps": 1.5625e-07 * 32 / 24},
        # Its norms of queries and keys have the same epsilon.
        "qwen3": {"hidden_size": 24},
    }.items():
        config = build(family).config
        before = config.to_dict()
        after = plan_width(config, 24).config.to_dict()
        changed = {key: after[key] for key in before | after if before.get(key) != after.get(key)}
        assert changed == pytest.approx(attributes)
        assert config.to_dict() == before
        assert type(config).from_dict(after).to_dict() == after


def test_all_that_is_hidden_width() -> None:
    width = plan_width(build("mixtral", num_hidden_layers=1).config, 24)
    layer = "model.layers.0."
    assert width.places == {
        "model.embed_tokens.weight": (1,),
        layer + "self_attn.q_proj.weight": (1,),
        layer + "self_attn.k_proj.weight": (1,),
        layer + "self_attn.v_proj.weight": (1,),
        layer + "self_attn.o_proj.weight": (0,),
        layer + "mlp.gate.weight": (1,),
        layer + "mlp.experts.gate_up_proj": (2,),
        layer + "mlp.experts.down_proj": (1,),
        layer + "input_layernorm.weight": (0,),
        layer + "post_attention_layernorm.weight": (0,),
        "model.norm.weight": (0,),
        "lm_head.weight": (1,),
    }


def test_tied_parameters_have_all_their_names() -> None:
    width = plan_width(build("llama-tied").config, 24)
    assert width.places["lm_head.weight"] == width.places["model.embed_tokens.weight"] == (1,)


@pytest.mark.parametrize(("multiple", "nearest"), [(64, "24 or 28"), (8, "16 or 24"), (12, "12 or 24")])
def test_a_number_that_the_config_does_not_take(multiple: int, nearest: str) -> None:
    """Llama wants a hidden size that is a multiple of its four heads."""
    with pytest.raises(ModelError, match="multiple of the number of attention heads") as error:
        plan_width(build("llama").config, 27, multiple)
    assert error.value.what.startswith("LlamaConfig does not accept a hidden size of 27: ")
    assert error.value.expected == nearest


def test_no_number_at_all() -> None:
    with pytest.raises(ModelError) as error:
        plan_width(build("mamba2").config, 24)
    assert error.value.expected == "no other number works either"


@pytest.mark.parametrize("kept", [0, 32, 40, -1])
def test_numbers_out_of_range(kept: int) -> None:
    with pytest.raises(ModelError, match="of 32 hidden channels"):
        plan_width(build("llama").config, kept)


def test_a_scale_that_no_module_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The structure of both models is alike, but the code reads the hidden size."""
    config = build("llama").config
    plain = modeling_llama.LlamaMLP.forward

    def scaled(self: Any, x: Tensor) -> Tensor:
        return plain(self, x) / self.config.hidden_size**0.5

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", scaled)
    with pytest.raises(ModelError, match=r"its logits would differ by \d+\.\d%"):
        plan_width(config, 24)


def test_a_norm_of_an_unknown_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build("llama").config

    def by_sum(self: Any, x: Tensor) -> Tensor:
        return self.weight * x / x.abs().sum(-1, keepdim=True)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", by_sum)
    with pytest.raises(
        ModelError, match=r"input_layernorm \(LlamaRMSNorm\) mixes the hidden channels in an unknown way"
    ):
        plan_width(config, 24)


def test_a_size_that_is_the_hidden_size_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """All shapes follow from the hidden size, but the channels inside are others than those outside."""
    config = build("llama").config
    size = config.hidden_size

    def reversed_channels(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x).flip(-1))

    def square(self: Any, config: Any) -> None:
        torch.nn.Module.__init__(self)
        self.up_proj, self.down_proj = (torch.nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", square)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", reversed_channels)
    with pytest.raises(ModelError, match="its logits would differ"):
        plan_width(config, size - 8)


def test_widths_that_differ_between_layers_stay() -> None:
    data = build("llama").config.to_dict()
    config = AutoConfig.for_model(**{**data, "per_layer_config": {"1": {"intermediate_size": 40}}})
    width = plan_width(config, 24)
    assert read_per_layer(width.config) == {1: {"intermediate_size": 40}}
    assert "model.layers.1.mlp.down_proj.weight" in width.places


def test_shrinking_leaves_the_rest_alone() -> None:
    model = build("qwen3")
    width, state = plan_width(model.config, len(CHANNELS)), dict(model.state_dict())
    small = shrink_width(state, width, CHANNELS, dict.fromkeys(width.norms, 2.0))
    name = "model.layers.0.self_attn.q_norm.weight"
    assert small[name] is state[name]
    weight = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(small[weight], state[weight][CHANNELS])
    assert torch.equal(small["model.norm.weight"], 2 * state["model.norm.weight"][CHANNELS])


def test_a_gain_to_which_one_is_added() -> None:
    model = build("qwen3_next", torch.bfloat16)
    width = plan_width(model.config, len(CHANNELS))
    gain = model.state_dict()["model.norm.weight"]
    small = shrink_width({"model.norm.weight": gain}, width, CHANNELS, dict.fromkeys(width.norms, 1.5))
    expected = (1 + gain[CHANNELS].double()) * 1.5 - 1
    assert torch.equal(small["model.norm.weight"], expected.to(torch.bfloat16))


@pytest.mark.parametrize(
    "channels", [CHANNELS[:-1], [*CHANNELS[:-1], 32], [*CHANNELS[1:], 0], [CHANNELS[0], *CHANNELS[:-1]]]
)
def test_channels_that_do_not_fit(channels: list[int]) -> None:
    width = plan_width(build("llama").config, len(CHANNELS))
    with pytest.raises(PatternError, match="24 ascending numbers below 32"):
        shrink_width({}, width, channels, factors_of(width))


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf, None])
def test_factors_that_cannot_be(factor: float | None) -> None:
    width = plan_width(build("llama").config, len(CHANNELS))
    factors = factors_of(width)
    del factors["model.norm"]
    if factor is not None:
        factors["model.norm"] = factor
    with pytest.raises(NumericsError, match=r"the gain of model\.norm is to be multiplied by"):
        shrink_width({}, width, CHANNELS, factors)
