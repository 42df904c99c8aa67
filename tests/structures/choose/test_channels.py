"""Inputs of scores are gathered in group order, however a matrix is stored."""

from typing import Any

import pytest
import torch
from shrinking import by_kind
from tiny_models import build
from torch import Tensor
from torch.testing import assert_close

from llmprune.errors import PatternError
from llmprune.models.decoder import Decoder
from llmprune.statistics import ChannelGram, ColumnNorm, Gram, Moments
from llmprune.stream.backward import Gradients
from llmprune.structures.choose.channels import channels_of, matrix_parameters
from llmprune.structures.choose.scores import NEEDS, SCORES
from llmprune.structures.find.discovery import Structure, find_structures

ALL = {"matrices", "reading", "tokens", "sums", "squares", "active", "gradients", "squared_gradients"}


def first(family: str, kind: str) -> tuple[Any, Structure]:
    model = build(family)
    return model.get_decoder().layers[0], by_kind(find_structures(Decoder.find(model)), 0, kind)[0]


def test_heads_have_their_rows_and_columns() -> None:
    layer, heads = first("llama", "heads")
    found = channels_of(layer, heads, {"matrices", "reading"})
    attention = layer.self_attn
    wanted = [attention.q_proj.weight.T, attention.k_proj.weight.T, attention.v_proj.weight.T, attention.o_proj.weight]
    assert found.groups == 2
    assert len(found.matrices) == 4
    assert all(torch.equal(mine, matrix) for mine, matrix in zip(found.matrices, wanted, strict=True))
    assert found.reading is not None
    assert torch.equal(found.reading, attention.o_proj.weight)


def test_scattered_and_transposed_channels_are_gathered() -> None:
    model = build("gpt2")
    layer: Any = model.transformer.h[0]
    (heads,) = by_kind(find_structures(Decoder.find(model)), 0, "heads")
    qkv, reading = channels_of(layer, heads, {"matrices"}).matrices
    head = layer.attn.c_attn.weight.view(32, 3, 4, 8)[:, :, 1]
    assert torch.equal(qkv.view(32, 4, 24)[:, 1], head.reshape(32, 24))
    assert torch.equal(reading, layer.attn.c_proj.weight.T)


def test_a_fused_gate_and_up_count_for_the_same_channel() -> None:
    layer, ffn = first("phi3", "ffn")
    gate_up, down = channels_of(layer, ffn, {"matrices"}).matrices
    both = layer.mlp.gate_up_proj.weight.view(2, 48, 32)
    assert torch.equal(gate_up.view(32, 48, 2), both.permute(2, 1, 0))
    assert torch.equal(down, layer.mlp.down_proj.weight)


@pytest.mark.parametrize("expert", [0, 2])
def test_an_expert_has_its_own_channels(expert: int) -> None:
    layer, ffn = first("mixtral", "ffn")
    gate_up, down = channels_of(layer, ffn, {"matrices"}, expert=expert).matrices
    own = layer.mlp.experts
    assert torch.equal(gate_up.view(32, 48, 2)[..., 0], own.gate_up_proj[expert, :48].T)
    assert torch.equal(gate_up.view(32, 48, 2)[..., 1], own.gate_up_proj[expert, 48:].T)
    assert torch.equal(down, own.down_proj[expert])


@pytest.mark.parametrize("expert", [0, 5])
def test_stacked_experts_are_told_apart(expert: int) -> None:
    model = build("dbrx")
    layer: Any = model.transformer.blocks[0]
    (ffn,) = by_kind(find_structures(Decoder.find(model)), 0, "ffn")
    own = layer.ffn.experts.mlp
    found = channels_of(layer, ffn, {"matrices", "reading"}, expert=expert)
    wanted = [weight.view(8, 24, 32)[expert].T for weight in (own.w1, own.v1, own.w2)]
    assert all(torch.equal(mine, matrix) for mine, matrix in zip(found.matrices, wanted, strict=True))
    assert found.reading is not None
    assert torch.equal(found.reading, wanted[2])


def test_experts_as_groups_hold_all_of_their_weights() -> None:
    layer, experts = first("mixtral", "experts")
    scores = SCORES["magnitude-l1"](channels_of(layer, experts, NEEDS["magnitude-l1"]))
    own = layer.mlp.experts
    wanted = own.gate_up_proj.abs().sum((1, 2), dtype=torch.float64) + own.down_proj.abs().sum(
        (1, 2), dtype=torch.float64
    )
    assert_close(scores, wanted)
    with pytest.raises(PatternError, match="4 experts cannot be scored by channel activations"):
        channels_of(layer, experts, NEEDS["wanda"])


def test_scales_of_norms_and_biases_count_for_nothing() -> None:
    model = build("cohere")
    (heads,) = by_kind(find_structures(Decoder.find(model)), 0, "heads")
    assert "self_attn.q_norm.weight" in {part.name for part in heads.slices}
    names = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    assert matrix_parameters(model.model.layers[0], heads) == names


@pytest.mark.parametrize("kind", [Moments, ChannelGram, ColumnNorm, Gram])
def test_statistics_reach_the_scores(kind: Any) -> None:
    layer, ffn = first("llama", "ffn")
    statistics = kind.empty(48)
    x = torch.randn(20, 48)
    statistics.update(x)
    found = channels_of(layer, ffn, ALL - {"gradients", "squared_gradients"}, statistics=statistics)
    assert found.tokens == 20
    assert found.squares is not None
    assert_close(found.squares, x.square().sum(0))
    if kind in (Moments, ChannelGram):
        assert found.sums is not None
        assert found.active is not None
        assert_close(found.sums, x.sum(0))
        assert found.active.tolist() == (x > 0).sum(0).tolist()
    else:
        assert found.sums is None


def test_an_expert_without_tokens_has_scores_of_zero() -> None:
    layer, ffn = first("mixtral", "ffn")
    for name in ("wanda", "flap", "activation-norm", "activation-frequency"):
        known = channels_of(layer, ffn, NEEDS[name], statistics=Moments.empty(48), expert=1)
        assert SCORES[name](known).tolist() == [0.0] * 48


def test_gradients_are_gathered_like_their_weights() -> None:
    layer, ffn = first("llama", "ffn")
    weights: dict[str, Tensor] = {name: layer.get_parameter(name).detach() for name in matrix_parameters(layer, ffn)}
    gradients = {name: Gradients(2 * weight, 3 * weight) for name, weight in weights.items()}
    found = channels_of(layer, ffn, ALL, statistics=Moments.empty(48), gradients=gradients)
    for matrix, mean, square in zip(found.matrices, found.gradients, found.squared_gradients, strict=True):
        assert torch.equal(mean, 2 * matrix)
        assert torch.equal(square, 3 * matrix)


def test_16_bit_weights_are_scored_in_32_bits() -> None:
    layer, ffn = first("llama", "ffn")
    found = channels_of(layer.bfloat16(), ffn, {"matrices"})
    assert {matrix.dtype for matrix in found.matrices} == {torch.float32}
    assert not found.gradients
    assert found.reading is None
