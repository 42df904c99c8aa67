"""What sampling and evaluation are expected to take: single steps, times how often a run makes them."""

from typing import Any

import pytest
import tiny_models
import torch

from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.pruning.forecast import around
from llmprune.pruning.forecast.around import measure_around
from llmprune.pruning.forecast.memory import LayerMemory
from llmprune.pruning.forecast.plan import Around, LayerPlan, MatrixPlan, Work
from llmprune.recipe.recipe import load_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CheckpointSource:
    return CheckpointSource(tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama")))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every step really runs, once; each is said to take a quarter of a second."""
    steps: list[Any] = []

    def once(work: Any, device: torch.device) -> float:
        steps.append(work())
        return 4.0

    monkeypatch.setattr(around, "runs_per_second", once)
    return steps


def look(source: CheckpointSource, **changes: Any) -> Around:
    return measure_around(source, load_recipe(tiny_models.recipe(**changes)).fitted(64, "cpu"), CPU)


SELF = {"source": "self", "samples": 6, "length": 24}
FILE = {"source": "nobody/corpus", "samples": 6, "length": 24}


def test_every_position_is_a_step_of_both_layers_the_head_and_a_draw(source: CheckpointSource, made: list[Any]) -> None:
    found = look(source, calibration=SELF, evaluation=None)
    assert found == Around(sampling=24 * (2 * 0.25 + 0.25 + 0.25))
    # The head on 6 sequences and one held back, their tokens, and a layer's output for one token of each.
    head, tokens, layer = made
    assert (head.shape, tokens.shape) == ((7, 128), (7,))
    assert (layer[0] if isinstance(layer, tuple) else layer).shape == (7, 1, 32)


def test_more_sequences_than_a_batch_take_their_steps_one_batch_after_another(
    source: CheckpointSource, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(around, "SAMPLING_BATCH", 3)
    assert look(source, calibration=SELF, evaluation=None).sampling == 3 * 24.0


def test_evaluation_is_two_passes_and_two_heads(source: CheckpointSource, made: list[Any]) -> None:
    found = look(source, calibration=FILE, evaluation={**FILE, "samples": 2})
    layers, head = 2 * 0.25 / 24, 0.25 / 64
    assert found == Around(0.0, pytest.approx(2 * 24 * (2 * layers + head)))
    assert look(source, calibration=FILE, evaluation=None) == Around()


def planned(method: str | None, pattern: str, shape: tuple[int, int], layers: int) -> LayerPlan:
    matrices = (MatrixPlan("m", shape, pattern, method, 0),)
    return LayerPlan(tuple(range(layers)), matrices, Work(0, 0, 0), LayerMemory(0, 0, 0, 0, 0))


@pytest.mark.parametrize("pattern", ["0.5", "0.6/row", "0.6/layer", "2:4", "0.5@24x8"])
def test_zeros_are_chosen_in_some_rows_of_every_kind_of_matrix(
    source: CheckpointSource, made: list[Any], pattern: str
) -> None:
    plans = [planned("wanda", pattern, (4800, 16), 3), planned("sparsegpt", pattern, (4800, 16), 2)]
    recipe = tiny_models.recipe(calibration=FILE, evaluation=None)
    found = measure_around(source, load_recipe(recipe).fitted(64, "cpu"), CPU, plans)
    (chosen,) = made
    assert chosen.mask.shape == (1008 if "@" in pattern else 1024, 16)
    assert found == Around(choosing=pytest.approx(3 * 4800 / chosen.mask.shape[0] * 0.25))
