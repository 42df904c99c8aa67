"""Permuting channels does not change experts' outputs, and each expert loses the channels that it chose."""

from typing import Any

import pytest
import torch
from shrinking import by_kind, logits
from tiny_models import build, known, random_ids
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.errors import ModelError, PatternError
from llmprune.models.decoder import Decoder, prunable_matrices
from llmprune.structures.find.discovery import Slice, Structure, find_structures
from llmprune.structures.remove.cuts import Cut, mask, shrink
from llmprune.structures.remove.fused import by_expert, experts_of, last_groups, permute_channels, removed_last

IDS = random_ids(3, 12)
FUSED = [
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "deepseek_v4", "glm_moe_dsa", "gpt_oss", "granitemoe",
    "granitemoehybrid", "jetmoe", "llama4", "phimoe", "dbrx", "zaya", "jamba", "nemotron_h", "qwen3_next",
]  # fmt: skip

Choices = list[tuple[nn.Module, Structure, list[list[int]]]]


def choose(model: PreTrainedModel, remove: int = 7) -> Choices:
    """Channels of every expert of every layer, drawn for each by itself."""
    random = torch.Generator().manual_seed(1)
    layers = Decoder.find(model).layers
    choices: Choices = []
    for layer, own in zip(layers, find_structures(Decoder.find(model)), strict=True):
        for structure in own:
            experts = experts_of(layer, structure)
            if experts > 1:
                drawn = [torch.randperm(structure.groups, generator=random)[:remove].tolist() for _ in range(experts)]
                choices.append((layer, structure, drawn))
    return choices


def permute(choices: Choices) -> None:
    for layer, structure, removed in choices:
        order = removed_last(removed, structure.groups)
        permute_channels(dict(layer.named_parameters()), structure, order)


def silence(layer: nn.Module, structure: Structure, removed: list[list[int]]) -> None:
    """Zero the columns of the consumer that read the channels of each expert, found from its matrices."""
    matrices = [m for m in prunable_matrices(layer, "") if m.parameter == structure.consumer]
    for matrix, own in zip(matrices, removed, strict=True):
        matrix.view(layer.get_parameter(structure.consumer).data)[:, own] = 0


@pytest.mark.parametrize("family", [family for family in FUSED if known(family)])
def test_each_expert_loses_the_channels_it_chose(family: str) -> None:
    model = build(family)
    dense = logits(model, IDS)
    choices = choose(model)
    assert choices
    permute(choices)
    torch.testing.assert_close(logits(model, IDS), dense, rtol=1e-4, atol=1e-4)
    for layer, structure, removed in choices:
        mask(layer, Cut(structure, last_groups(structure, len(removed[0]))))
    masked = logits(model, IDS)
    assert not torch.allclose(masked, dense, atol=1e-2)

    reference = build(family)
    layers = Decoder.find(reference).layers
    twins = dict(zip(Decoder.find(model).layers, layers, strict=True))
    for layer, structure, removed in choices:
        silence(twins[layer], structure, removed)
    torch.testing.assert_close(masked, logits(reference, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx"])
def test_what_shrinks_is_what_the_others_keep_in_their_order(family: str) -> None:
    model = build(family)
    layer, structure, removed = choose(model)[0]
    experts = len(removed)
    before = {name: tensor.clone() for name, tensor in layer.named_parameters()}
    permute([(layer, structure, removed)])
    cut = Cut(structure, last_groups(structure, 7))
    small = shrink(dict(layer.named_parameters()), [cut])
    for part in structure.slices:
        views, dim, index = by_expert(part, before[part.name], experts)
        shrunk = (
            small[part.name] if small[part.name].shape[0] == experts else small[part.name].unflatten(0, (experts, -1))
        )
        for expert, own in enumerate(removed):
            gone = set(index[own].flatten().tolist())
            kept = [place for place in range(views.shape[dim]) if place not in gone]
            assert torch.equal(shrunk[expert], views[expert].index_select(dim - 1, torch.tensor(kept)))


def test_ordinary_channels_and_shared_experts_are_no_fused_experts() -> None:
    model = build("qwen2_moe")
    layer = model.model.layers[0]
    counts = {s.consumer: experts_of(layer, s) for s in by_kind(find_structures(Decoder.find(model)), 0, "ffn")}
    assert counts == {"mlp.experts.down_proj": 4, "mlp.shared_expert.down_proj.weight": 1}
    assert [experts_of(layer, s) for s in by_kind(find_structures(Decoder.find(model)), 0, "heads")] == [1]


def test_heads_that_experts_have_in_common_cannot_move() -> None:
    model = build("jetmoe")
    (heads,) = by_kind(find_structures(Decoder.find(model)), 0, "heads")
    layer: Any = model.model.layers[0]
    assert experts_of(layer, heads) == 1
    with pytest.raises(ModelError, match=r"\(heads\) have the same order"):
        permute_channels(dict(layer.named_parameters()), heads, torch.arange(2).expand(4, 2))


def test_experts_with_rows_in_common_cannot_choose() -> None:
    model = build("mixtral")
    (own,) = by_kind(find_structures(Decoder.find(model)), 0, "ffn")
    odd = Slice("self_attn.q_proj.weight", 0, torch.arange(48).view(48, 1))
    shared = Structure("ffn", own.consumer, own.groups, 1, (*own.slices, odd))
    with pytest.raises(ModelError, match=r"share self_attn\.q_proj\.weight"):
        experts_of(model.model.layers[0], shared)


def test_the_removed_groups_come_last() -> None:
    order = removed_last([[3, 0], [1, 2]], 4)
    assert order.tolist() == [[1, 2, 0, 3], [0, 3, 1, 2]]


@pytest.mark.parametrize("removed", [[[0], [1, 2]], [[1, 1]], [[4]], [[-1]], []])
def test_impossible_choices_are_refused(removed: list[list[int]]) -> None:
    with pytest.raises(PatternError, match="groups are to be removed from each of"):
        removed_last(removed, 4)


def bad_orders() -> list[Tensor]:
    return [torch.zeros(4, 48, dtype=torch.int64), torch.arange(47).expand(4, 47), torch.arange(1, 49).expand(4, 48)]


@pytest.mark.parametrize("order", bad_orders())
def test_an_order_that_loses_a_channel_is_refused(order: Tensor) -> None:
    model = build("mixtral")
    (own,) = by_kind(find_structures(Decoder.find(model)), 0, "ffn")
    before = model.model.layers[0].mlp.experts.down_proj.clone()
    with pytest.raises(PatternError, match="every group once"):
        permute_channels(dict(model.model.layers[0].named_parameters()), own, order)
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, before)
