"""Decoder layers and matrices, found from structure."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, recipe, save
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmprune import prune
from llmprune.errors import ModelError
from llmprune.models.decoder import Decoder, Matrix, prunable_matrices


class Hand(PreTrainedModel):
    """A model made of the lists that a test gives it."""

    config_class = PreTrainedConfig

    def __init__(self, **lists: list[nn.Module]) -> None:
        super().__init__(PreTrainedConfig())
        for name, modules in lists.items():
            setattr(self, name, nn.ModuleList(modules))


def linears(count: int, width: int) -> list[nn.Module]:
    return [nn.Linear(width, width) for _ in range(count)]


def test_the_largest_list_holds_the_layers() -> None:
    model = Hand(small=linears(3, 4), large=linears(2, 32))
    found = Decoder.find(model)
    assert (found.model, found.path, found.layers) == (model, "large", model.large)
    assert (found.layer_name(1), found.place("large.1.weight")) == ("large.1", (1, "weight"))
    assert found.place("larger.1.weight") == (None, "larger.1.weight")


def test_lists_inside_layers_do_not_count() -> None:
    layers = [nn.ModuleDict({"experts": nn.ModuleList(linears(4, 16))}) for _ in range(2)]
    assert Decoder.find(Hand(layers=layers)).path == "layers"


def test_lists_without_matrices_do_not_count() -> None:
    model = Hand(norms=[nn.LayerNorm(1000) for _ in range(4)], layers=linears(2, 8))
    assert Decoder.find(model).path == "layers"


def test_the_text_decoder_comes_before_other_towers() -> None:
    model = build("gemma3-vision")
    tower, decoder = model.model.vision_tower, model.model.language_model.layers
    assert sum(p.numel() for p in tower.parameters()) > sum(p.numel() for p in decoder.parameters())
    assert Decoder.find(model).path == "model.language_model.layers"


def test_lists_of_alike_size_are_ambiguous_and_both_named() -> None:
    model = Hand(first=linears(2, 8), second=linears(3, 8))
    with pytest.raises(ModelError, match=r"second \(3 modules\), first \(2 modules\)") as caught:
        Decoder.find(model)
    assert "decoder_layers:" in caught.value.fix
    assert Decoder.find(model, "first").layers is model.first


def test_a_model_without_lists_is_refused() -> None:
    with pytest.raises(ModelError, match="no ModuleList with matrices"):
        Decoder.find(Hand())


@pytest.mark.parametrize("path", ["layers.0", "nowhere", "model", ""])
def test_a_wrong_path_names_the_right_ones(path: str) -> None:
    with pytest.raises(ModelError, match="not a list of modules") as caught:
        Decoder.find(build("llama"), path)
    assert "model.layers" in caught.value.expected


def test_layers_in_common_are_refused() -> None:
    block = nn.Linear(8, 8)
    with pytest.raises(ModelError, match=r"layers\.0 and layers\.1 share the parameter weight"):
        Decoder.find(Hand(layers=[block, block]))


def test_the_recipe_names_the_layers(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "source")
    by_name = prune(folder, recipe(decoder_layers="model.layers"), tmp_path / "output")
    assert {row.layer for row in by_name.rows} == {"model.layers.0", "model.layers.1"}
    with pytest.raises(ModelError, match=r"'model\.blocks' is not a list of modules"):
        prune(folder, recipe(decoder_layers="model.blocks"), tmp_path / "other")


def names(layer: nn.Module) -> list[str]:
    return [matrix.name for matrix in prunable_matrices(layer, "l")]


def test_linear_and_conv1d_are_matrices_in_the_order_of_modules() -> None:
    layer = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), Conv1D(7, 5), nn.Conv1d(7, 7, 3), nn.Embedding(9, 9))
    found = list(prunable_matrices(layer, "l"))
    assert [(m.name, m.parameter, m.transposed, m.shape) for m in found] == [
        ("l.0", "0.weight", False, (5, 3)),
        ("l.2", "2.weight", True, (7, 5)),
    ]
    assert all(m.view(layer.get_parameter(m.parameter)).shape == m.shape for m in found)


@pytest.mark.parametrize("router", ["gate", "router", "shared_expert_gate"])
def test_routers_and_whatever_is_in_them_are_left_alone(router: str) -> None:
    layer = nn.ModuleDict({router: nn.ModuleDict({"layer": nn.Linear(4, 4)}), "gate_proj": nn.Linear(4, 4)})
    assert names(layer) == ["l.gate_proj"]
    layer = nn.ModuleDict({router: nn.Linear(4, 4), "gate_up": nn.Linear(4, 4)})
    assert names(layer) == ["l.gate_up"]


class Experts(nn.Module):
    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))


def test_fused_experts_are_one_matrix_each() -> None:
    layer = nn.ModuleDict({"experts": Experts(up=torch.rand(2, 5, 3), up_bias=torch.rand(2, 5, 3))})
    found = list(prunable_matrices(layer, "l"))
    assert [(m.name, m.expert, m.shape) for m in found] == [
        ("l.experts.0.up", 0, (5, 3)),
        ("l.experts.1.up", 1, (5, 3)),
    ]
    assert [m.kind for m in found] == ["l.experts.*.up"] * 2
    weight = layer["experts"].up
    assert torch.equal(found[1].view(weight), weight[1])


def test_experts_say_that_they_are_transposed() -> None:
    experts = Experts(up=torch.rand(2, 5, 3))
    experts.is_transposed = True  # type: ignore[assignment]
    (first, _) = prunable_matrices(experts, "l")
    assert first.shape == (3, 5)
    assert torch.equal(first.view(experts.up), experts.up[0].T)


def test_vectors_in_three_dimensions_are_no_matrices() -> None:
    assert names(Experts(scale=torch.rand(1, 1, 8), shift=torch.rand(4, 8, 1))) == []


@pytest.mark.parametrize(
    ("family", "parameter", "shape", "transposed"),
    [
        ("dbrx", "ffn.experts.mlp.w1", (24, 32), False),
        ("dbrx", "ffn.experts.mlp.w2", (32, 24), True),
        ("deepseek_v4", "self_attn.o_a_proj.weight", (8, 16), False),
        ("llama4", "feed_forward.experts.gate_up_proj", (96, 32), True),
    ],
)
def test_layouts_that_structure_cannot_tell(
    family: str, parameter: str, shape: tuple[int, int], transposed: bool
) -> None:
    layers = Decoder.find(build(family)).layers
    found = [m for layer in layers for m in prunable_matrices(layer, "l") if m.parameter == parameter]
    assert {m.routed for m in found} == {"experts" in parameter}, "every token meets all blocks of a matrix"
    assert {(m.shape, m.transposed) for m in found} == {(shape, transposed)}
    assert [m.expert for m in found][: found[0].experts] == list(range(found[0].experts))


@pytest.mark.parametrize(
    ("matrix", "kind"),
    [
        (Matrix("l.3.mlp.up_proj", "mlp.up_proj.weight", None, False, (4, 4)), None),
        (Matrix("l.3.experts.7.up_proj", "experts.7.up_proj.weight", None, False, (4, 4)), "l.3.experts.*.up_proj"),
        (Matrix("l.3.experts.3.up", "experts.up", 3, False, (4, 4), 8), "l.3.experts.*.up"),
        (Matrix("l.3.moe.input.3.weight", "moe.input.weight", 3, False, (4, 4), 8), "l.3.moe.input.*.weight"),
    ],
)
def test_experts_of_one_kind(matrix: Matrix, kind: Any) -> None:
    assert matrix.kind == kind
