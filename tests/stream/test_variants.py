"""Variants of a model beside the stream's own: the states and divergences of whole models, and one refusal."""

import pytest
import torch
import torch.nn.functional as F
from streams import IDS, stream, walk
from tiny_models import build, known
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.errors import ModelError
from llmprune.stream.variants import Variants

SCALE = 0.5


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.double().log_softmax(-1)


def scale(model: PreTrainedModel, layer: int, factor: float) -> None:
    """A change of one layer that can be undone exactly."""
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight.mul_(factor)


@pytest.mark.parametrize("last_position", [False, True])
def test_divergences_are_those_of_whole_models(last_position: bool) -> None:
    model = build("llama", num_hidden_layers=3)
    run = stream(model, outputs=True)
    variants = Variants[int](run, "")
    for layer in run:
        variants.advance(layer)
        scale(model, layer.index, SCALE)
        variants.begin(layer.index, layer)
        scale(model, layer.index, 1 / SCALE)
    found = variants.divergences(run.hidden, last_position=last_position)
    stop = None if last_position else -1
    dense = logits(model)[:, :stop]
    assert list(found) == [0, 1, 2]
    for index, value in found.items():
        scale(model, index, SCALE)
        changed = logits(model)[:, :stop]
        scale(model, index, 1 / SCALE)
        wanted = F.kl_div(changed, dense, reduction="sum", log_target=True) / dense[..., 0].numel()
        assert value == pytest.approx(float(wanted), rel=1e-3)


def test_a_variant_without_the_layer_has_its_inputs() -> None:
    run = stream(build("llama"), outputs=True)
    variants = Variants[str](run, "")
    for layer in run:
        variants.advance(layer)
        if layer.index == 1:
            variants.begin("skipped", layer, skipped=True)
            inputs = run.hidden.copy()
    # Its final states are exactly the inputs of the last layer, so that nothing is between them.
    assert variants.divergences(inputs, last_position=True) == {"skipped": 0.0}
    assert variants.divergences(run.hidden, last_position=True)["skipped"] > 0


@pytest.mark.parametrize("family", [family for family in ("gemma3n", "gemma4", "zaya", "glm_moe_dsa") if known(family)])
def test_layers_that_hand_one_another_more_are_refused_with_a_way_out(family: str) -> None:
    run = stream(build(family))
    variants = Variants[int](run, "take another way")
    with pytest.raises(ModelError, match=r"reads more than the hidden states of earlier layers(.|\n)*another way"):
        walk(run, variants.advance)
