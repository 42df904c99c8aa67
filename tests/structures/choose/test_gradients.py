"""Gradient scores against those of the whole model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shrinking import by_kind
from streams import matrix_names, whole_gradients
from tiny_models import build, random_ids
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from llmprune.models.decoder import Decoder
from llmprune.models.source import ModelSource
from llmprune.structures.choose.gradients import gradient_scores
from llmprune.structures.find.discovery import Structure, find_structures

IDS = random_ids(4, 10)
KINDS = ("heads", "ffn", "experts")


def structures_of(model: PreTrainedModel) -> dict[int, list[Structure]]:
    found = find_structures(Decoder.find(model))
    kinds = {index: [s for kind in KINDS for s in by_kind(found, index, kind)] for index in range(len(found))}
    return {index: [s for s in own if s.refusal is None] for index, own in kinds.items()}


Weigh = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
WEIGH: dict[str, Weigh] = {
    "taylor": lambda weight, both: (weight * both[0]).abs(),
    "fisher": lambda weight, both: 0.5 * weight.square() * both[1],
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "dbrx", "gpt_oss"])
def test_scores_add_up_what_each_group_holds(family: str) -> None:
    model = build(family, dtype=torch.float64)
    structures = structures_of(model)
    scores = gradient_scores(ModelSource(model), IDS, None, structures, ["taylor", "fisher"])
    gradients = whole_gradients(model, matrix_names(model), IDS)
    layers = Decoder.find(model).layers
    assert set(scores) == set(structures)
    for index, own in structures.items():
        for structure, found in zip(own, scores[index], strict=True):
            for method, values in found.items():
                weighed = {
                    name: WEIGH[method](layers[index].get_parameter(name).detach(), both)
                    for (layer, name), both in gradients.items()
                    if layer == index
                }
                parts = [part for part in structure.slices if part.name in weighed]
                # Summed without regard to experts: a channel's scores in all of them together.
                wanted = [
                    sum(weighed[p.name].index_select(p.dim, p.index[group]).sum() for p in parts)
                    for group in range(structure.groups)
                ]
                total = values.sum(0) if values.dim() == 2 else values
                assert_close(total, torch.stack(wanted), rtol=1e-5, atol=1e-12)  # type: ignore[arg-type]


def test_channels_of_fused_experts_have_scores_of_each_expert() -> None:
    model = build("mixtral", dtype=torch.float64)
    (own,) = by_kind(find_structures(Decoder.find(model)), 1, "ffn")
    ((found,),) = gradient_scores(ModelSource(model), IDS, None, {1: [own]}, ["taylor"]).values()
    gradients = whole_gradients(model, {1: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, IDS)
    experts: Any = model.model.layers[1].mlp.experts
    up = (experts.gate_up_proj * gradients[1, "mlp.experts.gate_up_proj"][0]).abs().sum(2).view(4, 2, 48).sum(1)
    down = (experts.down_proj * gradients[1, "mlp.experts.down_proj"][0]).abs().sum(1)
    assert found["taylor"].shape == (4, 48)
    assert_close(found["taylor"], (up + down).detach(), rtol=1e-5, atol=1e-12)
