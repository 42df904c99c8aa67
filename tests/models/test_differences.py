"""What is reported of two skeletons, and what is expected to differ."""

import torch
from torch import Tensor, nn

from llmprune.models.differences import Expected, differences, module_differences, shape_differences


class Layer(nn.Module):
    def __init__(self, width: int = 4, scale: float = 0.5, buffer: Tensor | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(3, width, bias=False)
        self.scale, self.layer_idx = scale, 0
        self.register_buffer("turns", torch.arange(3.0) if buffer is None else buffer)


STAYS = Expected()


def test_what_is_alike_does_not_differ() -> None:
    assert list(differences(Layer(), Layer(), STAYS)) == []


def test_shapes_numbers_and_buffers_are_compared() -> None:
    other = Layer(2, 0.25, torch.zeros(3))
    assert list(module_differences(Layer(), other, STAYS)) == [
        "scale would be 0.25, not 0.5",
        "the buffer turns would change",
        "up.out_features would be 2, not 4",
    ]
    assert list(shape_differences(Layer(), other, STAYS)) == ["up.weight would be [2, 3], not [4, 3]"]
    assert len(list(differences(Layer(), other, STAYS))) == 4


def test_what_is_missing_or_new() -> None:
    other = Layer()
    other.up = nn.Sequential(nn.Linear(3, 4, bias=False))
    other.extra = 1
    other.register_buffer("mask", torch.ones(1))
    del other.turns
    assert list(differences(Layer(), other, STAYS)) == [
        "extra would be 1, not None",
        "the buffer turns would change",
        "the buffer mask would be new",
        "up would be a Sequential, not a Linear",
        "up.0 would be new",
        "up.weight would be missing, not [4, 3]",
        "up.0.weight would be new",
    ]


def test_what_is_expected_is_not_reported() -> None:
    other = Layer(2, 0.25, torch.zeros(2))
    expected = Expected(
        parameter=lambda name, before, after: (2, *before[1:]),
        buffer=lambda name, before: (2,),
        value=lambda key, before, after: key in ("scale", "out_features") or before == after,
    )
    assert list(differences(Layer(), other, expected)) == []
    assert list(differences(Layer(), other, Expected(inside=lambda name: name == "nowhere"))) == []
    alike = Expected(kind=lambda module: "norm", value=lambda key, before, after: True)
    assert list(module_differences(nn.LayerNorm(2), nn.RMSNorm(2), alike)) == []
    assert list(module_differences(nn.Identity(), nn.Sequential(), STAYS)) == [
        "it would be a Sequential, not a Identity"
    ]
