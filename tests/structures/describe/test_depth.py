"""Fewer layers: the config and the new numbers give the model that skips the removed ones."""

from typing import Any

import pytest
import torch
from shrinking import logits
from tiny_models import build, random_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.errors import ModelError
from llmprune.models.decoder import Decoder
from llmprune.models.uneven import read_per_layer, with_per_layer
from llmprune.structures.describe.depth import drop_layers


def kept_state(model: PreTrainedModel, path: str, numbers: dict[int, int]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in model.state_dict().items():
        number, _, inner = name.removeprefix(path + ".").partition(".")
        if not name.startswith(path + "."):
            state[name] = tensor
        elif int(number) in numbers:
            state[f"{path}.{numbers[int(number)]}.{inner}"] = tensor
    return state


class Skipped(nn.Module):
    """Stands for a decoder layer that hands its input on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


@pytest.mark.parametrize(
    ("family", "changes", "attributes"),
    [
        ("llama", {"num_hidden_layers": 4}, {"num_hidden_layers": 2}),
        (
            "gemma3",
            {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
            {"layer_types": ["full_attention", "sliding_attention"]},
        ),
        ("qwen2", {"num_hidden_layers": 4, "max_window_layers": 2}, {"max_window_layers": 1}),
        ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1]}, {"no_rope_layers": [0, 1]}),
        ("qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}, {"mlp_only_layers": [1]}),
        ("deepseek_v3", {"num_hidden_layers": 4, "first_k_dense_replace": 2}, {"first_k_dense_replace": 1}),
        ("gemma3n", {}, None),
    ],
)
def test_the_model_without_two_layers(family: str, changes: dict[str, Any], attributes: dict[str, Any] | None) -> None:
    model = build(family, **changes)
    decoder = Decoder.find(model)
    path, layers = decoder.path, decoder.layers
    if attributes is None:
        with pytest.raises(ModelError, match="would not be the same at its new position"):
            drop_layers(model.config, [1, 2])
        return
    config, numbers = drop_layers(model.config, [1, 2])
    assert numbers == {1: 0, 2: 1}
    assert {name: getattr(config, name) for name in attributes} == attributes
    small = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    small.load_state_dict(kept_state(model, path, numbers))
    ids = random_ids(2, 20)
    for gone in (0, 3):
        layers[gone] = Skipped(layers[gone])
    assert torch.equal(logits(small, ids), logits(model, ids))


def test_a_period_that_cannot_be_kept() -> None:
    """In Jamba every second layer has attention, and the config says no more than that."""
    model = build("jamba", num_hidden_layers=4)
    with pytest.raises(ModelError) as error:
        drop_layers(model.config, [0, 2])
    assert "model.layers.2 would not be the same at its new position" in error.value.what
    config, _ = drop_layers(model.config, [0, 1])
    assert config.num_hidden_layers == 2


def test_a_layer_that_needs_one_that_goes() -> None:
    """The second layer attends to the tokens that the first one has chosen."""
    with pytest.raises(ModelError, match="top-k indices from a previous"):
        drop_layers(build("glm_moe_dsa").config, [1])


def test_a_scale_by_number() -> None:
    with pytest.raises(ModelError, match="its attention is scaled by its layer number"):
        drop_layers(build("gpt2", scale_attn_by_inverse_layer_idx=True).config, [1])


@pytest.mark.parametrize("kept", [[], [0, 3], [1, 0], [0, 0], [-1]])
def test_layers_that_cannot_be_kept(kept: list[int]) -> None:
    with pytest.raises(ModelError, match="ascending"):
        drop_layers(build("llama").config, kept)


def test_widths_move_with_their_layers() -> None:
    config = build("llama", num_hidden_layers=12).config
    uneven = with_per_layer(config, {"1": {"intermediate_size": 40}, "10": {"intermediate_size": 32}})
    smaller, _ = drop_layers(uneven, [0, 2, 10])
    assert read_per_layer(smaller) == {2: {"intermediate_size": 32}}
