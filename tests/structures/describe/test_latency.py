"""Costs of structures at each level: against actually cut tensors, counted FLOPs and known clocks."""

import pytest
import torch
from tiny_models import build, random_ids
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llmprune.errors import ModelError, PatternError, RecipeError
from llmprune.models.sizes import Weight, flops, layer_size, parameters
from llmprune.models.source import ModelSource
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.structures.describe.latency import Latency, level_sizes
from llmprune.structures.find.discovery import Slice, Structure, find_structures
from llmprune.structures.remove.cuts import Cut, shrink

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

ACTIVE = {"mixtral": 0.5, "qwen2_moe": 0.5, "dbrx": 0.25, "llama": 1.0, "phi3": 1.0, "jetmoe": 0.5}


def numbers(layer: nn.Module) -> dict[str, torch.Tensor]:
    return dict(layer.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen3", "mixtral", "qwen2_moe", "dbrx"])
def test_parameters_are_those_of_the_tensors_that_shrink(family: str) -> None:
    source = ModelSource(build(family))
    layer = source.layers[-1]
    full = sum(tensor.numel() for tensor in numbers(layer).values())
    assert layer_size(layer, parameters) == full
    structures = [found for found in find_structures(source.decoder)[-1] if found.refusal is None]
    assert structures
    for structure in structures:
        levels = [0, 1, structure.groups - 1]
        sizes = level_sizes(layer, structure, levels, parameters)
        for level, size in zip(levels, sizes, strict=True):
            cut = Cut(structure, tuple(range(level)))
            left = sum(tensor.numel() for tensor in shrink(numbers(layer), [cut]).values())
            assert sizes[0] - size == full - left


def test_a_row_and_a_column_of_one_matrix_meet_once() -> None:
    layer = nn.Sequential(nn.Linear(6, 8, bias=False))
    groups = torch.arange(6).view(3, 2)
    structure = Structure("ffn", "0.weight", 3, 2, (Slice("0.weight", 0, groups), Slice("0.weight", 1, groups)))
    assert level_sizes(layer, structure, [0, 1, 2], parameters) == [48, 6 * 4, 4 * 2]


@pytest.mark.parametrize("family", ACTIVE)
def test_flops_are_those_of_the_products_with_matrices(family: str) -> None:
    """Counted while the layer runs: products of activations are `bmm` or attention, those with weights `mm`."""
    model = build(family).requires_grad_(False)
    layer = next(iter(Stream(ModelSource(model), random_ids(1, 8), StreamSettings(batch_size=1))))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer.forward(layer.stream.hidden[0], 0)
    products = counter.get_flop_counts()["Global"]
    counted = sum(count for name, count in products.items() if name in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert layer_size(layer.module, flops, ACTIVE[family]) == counted / 8


def test_a_token_reaches_as_many_experts_as_before() -> None:
    source = ModelSource(build("mixtral"))
    experts, channels = (
        next(found for found in find_structures(source.decoder)[0] if found.kind == kind) for kind in ("experts", "ffn")
    )
    # Two of four experts a token: with fewer experts only the router, 4 x 32, is smaller.
    full, fewer, least = level_sizes(source.layers[0], experts, [0, 1, 2], flops, active=0.5)
    assert (full - fewer, full - least) == (2 * 32, 2 * 2 * 32)
    # Three matrices of 32 x 48 in each of the two.
    wide, narrow = level_sizes(source.layers[0], channels, [0, 24], flops, active=0.5)
    assert (wide, narrow) == (2 * 2 * 3 * 32 * 48, 2 * 2 * 3 * 32 * 24)


def test_blocks_of_a_matrix_are_no_experts() -> None:
    """The first projection of the output is block-diagonal; every token meets both blocks."""
    layer = ModelSource(build("deepseek_v4")).layers[0]
    all_active, half_active = (layer_size(layer, flops, active) for active in (1.0, 0.5))
    routed = sum(p.numel() for name, p in layer.named_parameters() if ".experts." in name)
    assert all_active - half_active == routed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """A device on which a product takes as many seconds as it has multiplications; returns what was measured."""
    asked = []

    def measure(latency: Latency, rows: int, outputs: int, inputs: int) -> float:
        asked.append((rows, outputs, inputs))
        return float(rows * outputs * inputs)

    monkeypatch.setattr(Latency, "_measure", measure)
    return asked


def latency(tokens: int) -> Latency:
    return Latency(torch.device("cpu"), torch.float32, tokens)


def test_latency_is_measured_at_a_few_levels_and_once_a_shape(clock: list[tuple[int, int, int]]) -> None:
    source = ModelSource(build("llama-tied"))
    found = find_structures(source.decoder)
    structure = next(found for found in found[0] if found.kind == "ffn")
    cost, levels = latency(7), list(range(0, 45, 3))
    sizes = level_sizes(source.layers[0], structure, levels, cost)
    assert sizes == pytest.approx([7.0 * 3 * 32 * (48 - level) for level in levels])
    assert {(rows, min(shape)) for rows, *shape in clock} <= {(7, width) for width in range(6, 49)}
    assert len(clock) == len(set(clock)) == 2 * 6
    assert level_sizes(source.layers[1], structure, levels, cost) == sizes
    assert len(clock) == 12


def test_latency_of_experts_counts_the_tokens_that_reach_them(clock: list[tuple[int, int, int]]) -> None:
    fused = [Weight((4, 6, 8), matrices=4, share=0.5), Weight((4 * 6, 8), matrices=4, share=0.5)]
    # One token: two experts, one row each; ten tokens: four experts, five rows each.
    assert latency(1)(fused) == 2 * (2 * 6 * 8)
    assert latency(10)(fused) == 2 * (4 * 5 * 6 * 8)
    assert set(clock) == {(1, 6, 8), (5, 6, 8)}
    assert latency(3)([Weight((9,)), Weight((9, 1, 4))]) == 0


def test_latency_of_this_machine() -> None:
    cost = Latency(torch.device("cpu"), torch.float32, tokens=8, seconds=0.01)
    small, large = (cost([Weight((width, width))]) for width in (16, 1024))
    assert 0 < small < large


@pytest.mark.parametrize("levels", [[], [-1], [48]])
def test_levels_out_of_range(levels: list[int]) -> None:
    source = ModelSource(build("llama"))
    structure = next(found for found in find_structures(source.decoder)[0] if found.kind == "ffn")
    with pytest.raises(PatternError, match="down_proj"):
        level_sizes(source.layers[0], structure, levels, parameters)


def test_refusals() -> None:
    layer = nn.Sequential(nn.Linear(6, 8))
    refused = Structure("heads", "0.weight", 3, 2, (), "it is shared")
    with pytest.raises(ModelError, match="it is shared"):
        level_sizes(layer, refused, [0, 1], parameters)
    with pytest.raises(RecipeError, match="active is 0"):
        layer_size(layer, flops, active=0)
    with pytest.raises(RecipeError, match="latency of 0 tokens"):
        latency(0)
