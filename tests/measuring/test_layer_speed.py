"""What a measurement of speed runs, how often and in which order; clocks themselves are not tested."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, random_ids, save
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.errors import CalibrationError, RecipeError
from llmprune.measuring import layer_speed
from llmprune.measuring.layer_speed import compare_speed
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.source import ModelSource

IDS, CPU = random_ids(2, 12), torch.device("cpu")

Runs = list[Tensor]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The outputs of all runs in order; the clock says one second a number, and more each time."""
    outputs: Runs = []

    def seconds(run: Callable[[], Any], device: torch.device) -> float:
        output = run()
        outputs.append(output[0] if isinstance(output, tuple) else output)
        return outputs[-1].numel() + len(outputs) / 1000

    monkeypatch.setattr(layer_speed, "_seconds", seconds)
    return outputs


def states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What each layer gives; the last one's before the final norm."""
    outputs = []
    hooks = [layer.register_forward_hook(lambda *seen: outputs.append(seen[2])) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


def test_each_layer_runs_on_what_the_layers_before_give(runs: Runs) -> None:
    model = build("llama-tied")
    measured = compare_speed(ModelSource(model), ModelSource(build("llama-tied")), IDS, CPU, repeats=2)
    prompt, single = states(model, IDS[:1]), states(model, IDS[:1, :1])
    expected = [output for pair in zip(prompt, single, strict=True) for output in pair for _ in range(3)]
    for place, speed in enumerate(measured):
        assert all(torch.equal(*pair) for pair in zip(runs[place::2], expected, strict=True))
        assert (speed.prefill_tokens, speed.layers) == (12, 3)
        # The fastest of the runs after the first, which warms up: the second.
        fastest = [(6 * part + 3 + place) / 1000 for part in range(6)]
        assert speed.prefill_seconds == pytest.approx(3 * 12 * 32 + sum(fastest[::2]), abs=1e-6)
        assert speed.token_seconds == pytest.approx(3 * 32 + sum(fastest[1::2]), abs=1e-6)


def test_two_models_run_in_turn(runs: Runs) -> None:
    """Four layers beside three: each of seven layers once, those at the same depth run by run."""
    dense, pruned = build("llama", num_hidden_layers=4), build("llama", num_hidden_layers=3, hidden_size=16)
    first, second = compare_speed(ModelSource(dense), ModelSource(pruned), IDS, CPU, repeats=2)
    widths = [output.shape[-1] for output in runs]
    pair = [32, 16] * 3
    assert widths == [*pair, *pair, *[32] * 6, *pair, *pair, *pair, *pair]
    assert (first.layers, second.layers) == (4, 3)
    assert int(first.prefill_seconds) == 4 * 12 * 32
    assert int(second.prefill_seconds) == 3 * 12 * 16
    wide, narrow = states(dense, IDS[:1]), states(pruned, IDS[:1])
    assert torch.equal(runs[-7], narrow[-1])
    assert torch.equal(runs[-8], wide[-1])


def test_checkpoints_hold_one_layer_each(tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    save(build("mixtral"), tmp_path / "dense")
    save(build("mixtral", intermediate_size=24), tmp_path / "pruned")
    dense, pruned = CheckpointSource(tmp_path / "dense"), CheckpointSource(tmp_path / "pruned")
    seen = []
    clock = layer_speed._seconds

    def resident(run: Callable[[], Tensor], device: torch.device) -> float:
        loaded = [any(not p.is_meta for p in layer.parameters()) for s in (dense, pruned) for layer in s.layers]
        seen.append(tuple(loaded))
        return clock(run, device)

    monkeypatch.setattr(layer_speed, "_seconds", resident)
    compare_speed(dense, pruned, IDS, CPU, repeats=1)
    assert list(dict.fromkeys(seen)) == [(True, False, True, False), (False, True, False, True)]
    assert all(parameter.is_meta for source in (dense, pruned) for parameter in source.model.parameters())


def test_a_failure_lets_go_of_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = CheckpointSource(save(build("llama"), tmp_path))

    def fail(run: Callable[[], Tensor], device: torch.device) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(layer_speed, "_seconds", fail)
    with pytest.raises(KeyboardInterrupt):
        compare_speed(source, ModelSource(build("llama")), IDS, CPU)
    assert all(parameter.is_meta for parameter in source.model.parameters())


def test_seconds_of_this_machine() -> None:
    """A hundred times the work takes longer, whatever the clock."""
    wide, narrow = ModelSource(build("llama", intermediate_size=8192)), ModelSource(build("llama"))
    first, second = compare_speed(wide, narrow, random_ids(1, 48), CPU, repeats=3)
    assert 0 < second.prefill_seconds < first.prefill_seconds
    assert 0 < second.token_seconds < first.token_seconds


def test_layers_that_hand_each_other_more(runs: Runs) -> None:
    """The second layer attends to the tokens that the first one has chosen."""
    first, second = (ModelSource(build("glm_moe_dsa")) for _ in range(2))
    compare_speed(first, second, IDS, CPU, repeats=1)
    assert len(runs) == 2 * 2 * 2 * 2


def test_nothing_to_measure() -> None:
    first, second = (ModelSource(build("llama")) for _ in range(2))
    with pytest.raises(RecipeError, match="0 repeats"):
        compare_speed(first, second, IDS, CPU, repeats=0)
    with pytest.raises(CalibrationError, match="no tokens"):
        compare_speed(first, second, IDS[:0], CPU)
