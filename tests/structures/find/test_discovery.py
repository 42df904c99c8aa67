"""Which rows go with which group: against known layouts, and against what perturbed rows change."""

import pytest
import torch
from shrinking import by_kind
from tiny_models import build, random_ids
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import TORCH_INIT_FUNCTIONS

from llmprune.models.decoder import Decoder
from llmprune.models.skeleton import build_skeleton
from llmprune.structures.find.discovery import Structure, find_structures

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def described(found: list[list[Structure]]) -> list[object]:
    return [
        (s.kind, s.consumer, s.groups, s.columns, s.refusal, [(p.name, p.dim, p.index.tolist()) for p in s.slices])
        for layer in found
        for s in layer
    ]


def slices(family: str, kind: str, layer: int = 0, **changes: object) -> dict[str, tuple[int, list[list[int]]]]:
    (structure,) = by_kind(find_structures(Decoder.find(build(family, **changes))), layer, kind)
    assert structure.refusal is None
    return {part.name: (part.dim, part.index.tolist()) for part in structure.slices}


def runs(*starts: int, length: int) -> list[int]:
    return [start + offset for start in starts for offset in range(length)]


def test_key_and_value_go_with_all_their_queries() -> None:
    found = slices("llama", "heads")
    two_heads, one_head = [runs(0, length=16), runs(16, length=16)], [runs(0, length=8), runs(8, length=8)]
    assert found == {
        "self_attn.q_proj.weight": (0, two_heads),
        "self_attn.q_proj.bias": (0, two_heads),
        "self_attn.k_proj.weight": (0, one_head),
        "self_attn.k_proj.bias": (0, one_head),
        "self_attn.v_proj.weight": (0, one_head),
        "self_attn.v_proj.bias": (0, one_head),
        "self_attn.o_proj.weight": (1, two_heads),
    }


def test_fused_projections() -> None:
    interleaved = slices("gpt_neox", "heads")["attention.query_key_value.weight"]
    assert interleaved == (0, [runs(24 * head, length=24) for head in range(4)])
    concatenated = slices("phi3", "heads")["self_attn.qkv_proj.weight"]
    assert concatenated == (0, [runs(0, 8, 32, 48, length=8), runs(16, 24, 40, 56, length=8)])
    transposed = slices("gpt2", "heads")["attn.c_attn.weight"]
    assert transposed == (1, [runs(8 * head, 32 + 8 * head, 64 + 8 * head, length=8) for head in range(4)])
    assert slices("phi3", "ffn")["mlp.gate_up_proj.weight"] == (0, [[row, 48 + row] for row in range(48)])


def test_one_key_and_value_for_all_heads_stays() -> None:
    found = slices("falcon-7b", "heads")
    assert found["self_attention.query_key_value.weight"] == (0, [runs(8 * head, length=8) for head in range(4)])


def test_more_heads_than_channels_in_a_head() -> None:
    """The columns of one value channel are then the larger groups, but not heads."""
    found = slices("falcon-7b", "heads", num_attention_heads=16)
    assert found["self_attention.dense.weight"] == (1, [runs(2 * head, length=2) for head in range(16)])
    assert found["self_attention.query_key_value.weight"][1] == [runs(2 * head, length=2) for head in range(16)]


def test_latent_attention_keeps_what_heads_share() -> None:
    found = slices("deepseek_v3", "heads")
    per_head = [runs(16 * head, length=16) for head in range(4)]
    assert set(found) == {"self_attn.q_b_proj.weight", "self_attn.kv_b_proj.weight", "self_attn.o_proj.weight"}
    assert found["self_attn.q_b_proj.weight"] == found["self_attn.kv_b_proj.weight"] == (0, per_head)


def test_parameters_of_each_head() -> None:
    assert slices("gpt_oss", "heads")["self_attn.sinks"] == (0, [[0, 1], [2, 3]])
    assert slices("cohere", "heads")["self_attn.q_norm.weight"] == (0, [[0, 1], [2, 3]])
    assert slices("cohere", "heads")["self_attn.k_norm.weight"] == (0, [[0], [1]])
    assert "self_attn.q_norm.weight" not in slices("qwen3", "heads")


def test_channels_inside_experts() -> None:
    transposed = slices("gpt_oss", "ffn")
    assert transposed["mlp.experts.gate_up_proj"] == (2, [[2 * channel, 2 * channel + 1] for channel in range(48)])
    assert transposed["mlp.experts.gate_up_proj_bias"][0] == 1
    assert transposed["mlp.experts.down_proj"] == (1, [[channel] for channel in range(48)])
    stacked = slices("dbrx", "ffn")
    everywhere = [[24 * expert + channel for expert in range(8)] for channel in range(24)]
    assert stacked["ffn.experts.mlp.w1"] == stacked["ffn.experts.mlp.w2"] == (0, everywhere)


def test_whole_experts() -> None:
    found = slices("nemotron_h", "experts", layer=2)
    assert found == dict.fromkeys(
        ("mixer.gate.weight", "mixer.gate.e_score_correction_bias", "mixer.experts.up_proj", "mixer.experts.down_proj"),
        (0, [[0], [1], [2], [3]]),
    )
    assert slices("dbrx", "experts")["ffn.experts.mlp.v1"][1][2] == runs(48, length=24)


@pytest.mark.parametrize(
    ("family", "layer", "kind", "reason"),
    [
        ("olmo2", 0, "heads", "output of self_attn.q_proj.weight is normalised over all groups"),
        ("bloom", 0, "heads", "depends on the argument alibi"),
        ("mamba2", 0, "mixer", "by a convolution or recurrence"),
        ("rwkv", 0, "mixer", "by a convolution or recurrence"),
        ("gemma4", 1, "heads", "later layers read the same keys and values"),
        ("gemma4", 2, "heads", "some of its groups share argument shared_kv_states"),
        ("deepseek_v3", 1, "experts", "chooses groups of experts first"),
    ],
)
def test_refusals(family: str, layer: int, kind: str, reason: str) -> None:
    (structure,) = by_kind(find_structures(Decoder.find(build(family))), layer, kind)
    assert reason in str(structure.refusal)
    assert structure.slices == ()


def test_what_is_part_of_something_larger_is_no_structure() -> None:
    """Neither the residual, nor bottlenecks, nor the rows inside a mixer that several of its matrices read."""
    found = find_structures(Decoder.find(build("jamba")))
    assert [[(s.kind, s.consumer) for s in layer] for layer in found] == [
        [("ffn", "feed_forward.down_proj.weight")],
        [
            ("heads", "self_attn.o_proj.weight"),
            ("ffn", "feed_forward.experts.down_proj"),
            ("experts", "feed_forward.experts.down_proj"),
        ],
    ]
    assert find_structures(Decoder.find(build("mamba"))) == [[], []]


def test_a_single_head_is_refused() -> None:
    found = find_structures(Decoder.find(build("llama", num_attention_heads=1, num_key_value_heads=1)))
    assert [s.refusal for s in by_kind(found, 0, "heads")] == ["it has only one head"]


def test_channels_that_are_normalised_together() -> None:
    """Gemma 3n keeps the strongest gates of a token: which ones depends on all of them."""
    found = find_structures(Decoder.find(build("gemma3n", activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0])))
    sparse, dense = (
        next(s for s in by_kind(found, layer, "ffn") if s.consumer == "mlp.down_proj.weight") for layer in (0, 1)
    )
    assert "proj.weight is normalised over all groups" in str(sparse.refusal)
    assert dense.refusal is None


def test_closed_relus_are_channels_too() -> None:
    """No weight is read, so dead channels do not go missing."""
    model = build("opt")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.bias.fill_(-100)
            layer.fc1.weight.zero_()
    assert described(find_structures(Decoder.find(model))) == described(find_structures(Decoder.find(build("opt"))))


@pytest.mark.parametrize("family", ["gemma3-vision", "nemotron_h", "gpt_oss"])
def test_no_weight_is_needed(family: str) -> None:
    model = build(family)
    expected = described(find_structures(Decoder.find(model)))
    assert expected == described(find_structures(Decoder.find(model))), "not the same at every call"
    assert expected == described(find_structures(Decoder.find(build_skeleton(model.config))))
    assert expected == described(find_structures(Decoder.find(build_skeleton(model.config, torch.bfloat16))))


def test_no_number_is_drawn_for_a_model_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    config, initialize = build("llama").config, PreTrainedModel.initialize_weights
    monkeypatch.setitem(TORCH_INIT_FUNCTIONS, "normal_", lambda *_, **options: pytest.fail("drawn"))
    skeleton = build_skeleton(config)
    assert not [name for name, parameter in skeleton.named_parameters() if vars(parameter)]
    assert PreTrainedModel.initialize_weights is initialize


def test_the_model_stays_as_it_was() -> None:
    model = build("mixtral")
    model.set_attn_implementation("sdpa")
    model.set_experts_implementation("grouped_mm")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_structures(Decoder.find(model))
    assert model.config._attn_implementation == "sdpa"
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)


def test_layers_of_different_sizes() -> None:
    found = find_structures(Decoder.find(build("gemma4")))
    assert [by_kind(found, layer, "heads")[0].columns for layer in range(4)] == [16, 32, 8, 16]


def consumer_inputs(model: PreTrainedModel, structure: Structure, layer: int) -> Tensor:
    """What the consumer reads in the real model: [tokens, columns]."""
    layers = Decoder.find(model).layers
    module = layers[layer].get_submodule(structure.consumer.removesuffix(".weight"))
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).clone()))
    with torch.no_grad():
        model(input_ids=random_ids(2, 12), use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["gpt_neox", "falcon-40b", "deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("kind", ["heads", "ffn"])
def test_rows_of_a_group_change_its_columns_only(family: str, kind: str) -> None:
    """An independent check on the real weights: what a group's rows are has an effect on its own columns alone."""
    model = build(family)
    layer = 1
    structure = by_kind(find_structures(Decoder.find(model)), layer, kind)[0]
    if structure.consumer.endswith("experts.down_proj"):
        structure = by_kind(find_structures(Decoder.find(model)), layer, kind)[1]
    before = consumer_inputs(model, structure, layer)
    group, state = 1, dict(Decoder.find(model).layers[layer].named_parameters())
    with torch.no_grad():
        for part in structure.slices:
            if part.name != structure.consumer:
                state[part.name].index_fill_(part.dim, part.index[group], 0.3)
    changed = (consumer_inputs(model, structure, layer) != before).any(0)
    expected = torch.arange(len(changed)) // structure.columns == group
    assert torch.equal(changed, expected)


def test_many_layers_and_channels_cost_little() -> None:
    """Codes over the groups, not a pass for each of them: a wide layer takes a few dozen passes."""
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=512, intermediate_size=14336, num_hidden_layers=40, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    found = find_structures(Decoder.find(build_skeleton(config)))
    assert [(s.kind, s.groups, s.columns) for s in found[39]] == [("heads", 8, 64), ("ffn", 14336, 1)]
    assert found[39][0] is found[0][0], "layers that are alike are analysed once"
