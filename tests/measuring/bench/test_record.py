"""Results of `llmprune bench` in a file, and what is read from them."""

from pathlib import Path

import pytest

from llmprune.errors import CheckpointError
from llmprune.measuring.bench.record import gains, grouped, read_results, write_result


def test_results_of_several_devices_stand_together(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    for device, finished in (("one", "a"), ("two", "b"), ("one", "c")):
        write_result(path, {"device": device, "finished": finished})
    assert {name: result["finished"] for name, result in read_results(path).items()} == {"one": "c", "two": "b"}
    path.write_text("[]")
    with pytest.raises(CheckpointError):
        read_results(path)


def test_gains_belong_to_a_layout() -> None:
    layout = {"layout": "nm", "shape": [8, 8], "keep": 2, "of": 4}
    rows = [{"tokens": 64, "ratio": 1.1}, {"tokens": 1, "ratio": 1.6}, {"tokens": 4, "correct": False}]
    result = {"products": [{"layouts": {"a": layout}, "comparisons": rows}]}
    assert gains(result, "a", layout) == ((1, 1.6), (64, 1.1))
    assert gains(result, "a", {**layout, "keep": 1}) == ()
    assert gains(result, "b", layout) == ()


def test_names_of_layers_are_joined() -> None:
    names = [f"model.layers.{layer}.mlp.{name}" for layer in (0, 1, 2, 5) for name in ("up", "down")]
    assert grouped([*names, "score"]) == "model.layers.0-2, 5: mlp.up, mlp.down; score"
    experts = [f"m.layers.3.experts.{number}.up" for number in range(4)]
    assert grouped(experts) == "m.layers.3: experts.*.up"
