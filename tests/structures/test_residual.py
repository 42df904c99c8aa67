"""What reads the residual stream, which architectures are refused, and why."""

from pathlib import Path

import pytest
import torch
from tiny_models import build, marked, save
from torch import nn

from llmprune.errors import ModelError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.structures import residual
from llmprune.structures.residual import Fold, find_residual
from llmprune.structures.turning import fold_layer

LAYER = "model.layers.0"


def opened(family: str, folder: Path, **changes: object) -> CheckpointSource:
    return CheckpointSource(save(build(family, **changes), folder), torch.float32)


def test_readers_of_a_llama(tmp_path: Path) -> None:
    found = find_residual(opened("llama", tmp_path))
    attention, mlp = f"{LAYER}.input_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"
    folds = {name: fold for name, fold in found.folds.items() if name.startswith(LAYER)}
    assert folds == {
        **{f"{LAYER}.self_attn.{name}_proj.weight": Fold(attention, 1) for name in "qkv"},
        **{f"{LAYER}.mlp.{name}_proj.weight": Fold(mlp, 1) for name in ("gate", "up")},
    }
    assert found.folds["lm_head.weight"] == Fold("model.norm.weight", 1)
    assert found.places[f"{LAYER}.self_attn.o_proj.bias"] == (0,)
    assert attention not in found.places
    assert found.tied is None


def test_values_of_a_llama_and_their_bias(tmp_path: Path) -> None:
    values = find_residual(opened("llama", tmp_path)).values[1]
    assert (values.producer, values.bias) == ("self_attn.v_proj.weight", "self_attn.v_proj.bias")
    assert torch.equal(values.rows, torch.arange(16).view(2, 8))
    assert values.consumer == "self_attn.o_proj.weight"
    # Each KV head is read by two query heads.
    assert torch.equal(values.columns, torch.arange(32).view(2, 2, 8))


def test_values_in_a_fused_matrix_come_after_queries_and_keys(tmp_path: Path) -> None:
    values = find_residual(opened("phi3", tmp_path)).values[0]
    assert values.producer == "self_attn.qkv_proj.weight"
    assert torch.equal(values.rows, 48 + torch.arange(16).view(2, 8))


def test_gated_values_are_left_alone(tmp_path: Path) -> None:
    # The second layer's attention multiplies its output by an elementwise gate.
    assert find_residual(opened("qwen3_next", tmp_path)).values == {}


@pytest.mark.parametrize("family", marked(["mixtral", "qwen2_moe"]))
def test_routers_and_experts_read_the_same_norm(family: str, tmp_path: Path) -> None:
    folds = find_residual(opened(family, tmp_path)).folds
    read = [f"{LAYER}.mlp.gate.weight", f"{LAYER}.mlp.experts.gate_up_proj"]
    assert {folds[name].gain for name in read} == {f"{LAYER}.post_attention_layernorm.weight"}
    assert [folds[name].dim for name in read] == [1, 2]


def test_gains_that_are_stored_less_one(tmp_path: Path) -> None:
    found = find_residual(opened("gemma", tmp_path), untie=True)
    assert set(found.offsets.values()) == {1}
    gain = f"{LAYER}.input_layernorm.weight"
    assert torch.equal(found.folded(gain, torch.rand(32).double(), {}), torch.zeros(32).double())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        pytest.param("gpt2", r"ln_1 \(LayerNorm\) subtracts the mean over the hidden channels", id="gpt2"),
        *(
            pytest.param(family, reason, id=family, marks=pytest.mark.families)
            for family, reason in (
                ("gemma2", "post_attention_layernorm.weight is added to the residual stream"),
                ("olmo2", "is added to the residual stream"),
                ("starcoder2", "subtracts the mean"),
                ("glm4", "is added to the residual stream"),
                ("zaya", "something acts on single hidden channels"),
                ("olmoe", "cannot be told apart from its other sizes"),
            )
        ),
    ],
)
def test_refused_with_the_reason(family: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        find_residual(opened(family, tmp_path), untie=True)
    assert "cannot be rotated" in caught.value.what
    assert caught.value.fix


def test_tied_embeddings_are_untied_only_if_told_to(tmp_path: Path) -> None:
    source = opened("llama-tied", tmp_path)
    with pytest.raises(ModelError, match="tied embeddings") as caught:
        find_residual(source)
    assert "--untie" in caught.value.fix
    assert "16.4 kB" in caught.value.fix
    found = find_residual(source, untie=True)
    assert found.tied == "lm_head.weight"
    assert found.config.tie_word_embeddings is False
    assert source.config.tie_word_embeddings is True


def test_what_acts_on_single_channels_is_found_by_its_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, built = opened("llama", tmp_path), residual.build_decoder

    class Clipped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-0.1, 0.1)

    def clipping(*args: object) -> object:
        decoder = built(*args)
        decoder.layers[0].mlp.down_proj.__class__ = Clipped
        return decoder

    monkeypatch.setattr(residual, "build_decoder", clipping)
    with pytest.raises(ModelError, match=r"logits would differ by .*%"):
        find_residual(source)


def test_a_folded_layer_computes_the_same(tmp_path: Path) -> None:
    source = opened("qwen3", tmp_path)
    found = find_residual(source)
    source.load_layer(0, torch.device("cpu"))
    layer, x = source.layers[0], torch.randn(1, 5, 32)
    turned = (torch.ones(1, 5, 16), torch.zeros(1, 5, 16))
    with torch.no_grad():
        before = layer(x, position_embeddings=turned)
        fold_layer(found, layer, LAYER)
        after = layer(x, position_embeddings=turned)
    torch.testing.assert_close(after, before)
    assert torch.equal(layer.input_layernorm.weight, torch.ones(32))
    assert not torch.equal(layer.self_attn.q_norm.weight, torch.ones(16))
