"""Trouble with numbers is raised by name or climbs a visible ladder; layer-wide patterns and starved experts add up."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import tensors, zeros
from safetensors.torch import save_file
from tiny_models import build, recipe, save
from torch import Tensor

from llmprune import prune
from llmprune.errors import NumericsError
from llmprune.methods.magnitude import Magnitude
from llmprune.methods.method import Pruned

METHODS = ["magnitude", "wanda", "sparsegpt"]


def changed(folder: Path, **changes: Tensor | float) -> Path:
    """A Llama in which parameters of layer 1 are replaced, or their first value; dots are written as __."""
    source = save(build("llama", num_hidden_layers=3), folder / "dense")
    stored = tensors(source)
    for name, value in changes.items():
        key = f"model.layers.1.{name.replace('__', '.')}"
        if isinstance(value, Tensor):
            stored[key] = value.expand_as(stored[key]).contiguous()
        else:
            stored[key].view(-1)[0] = value
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("evaluation", [None, {"samples": 1}], ids=["pruning", "evaluating"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj", "input_layernorm"])
def test_a_broken_weight_is_named(tmp_path: Path, name: str, value: float, evaluation: Any) -> None:
    source = changed(tmp_path, **{f"{name.replace('.', '__')}__weight": value})
    text = tmp_path / "words.txt"
    text.write_text("w50 w60 w70 " * 20)
    calibration = {"source": str(text), "samples": 2, "length": 8}
    texts = {"calibration": calibration, "evaluation": evaluation and {**calibration, **evaluation}}
    with pytest.raises(NumericsError) as caught:
        prune(source, recipe(**texts), tmp_path / "pruned")
    assert f"model.layers.1.{name}.weight contains NaN or infinity" in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("factor", [1e8, float("nan")])
def test_a_solution_that_cannot_be_stored_is_named(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blown_up(self: Magnitude, weight: Tensor, *_: Any) -> Pruned:
        return Pruned(weight * factor, weight != 0)

    monkeypatch.setattr(Magnitude, "__call__", blown_up)
    source = save(build("llama", torch.float16), tmp_path / "dense")
    with pytest.raises(NumericsError, match=r"layers\.0\..*_proj, pruned and stored in float16, holds \d+ values"):
        prune(source, recipe(method="magnitude", held_back=0), tmp_path / "pruned")


@pytest.mark.parametrize("method", METHODS)
def test_overflowing_activations_are_named(tmp_path: Path, method: str) -> None:
    """All weights are finite; the product of the two branches is not."""
    huge = torch.tensor(1e25)
    source = changed(tmp_path, mlp__gate_proj__weight=huge, mlp__up_proj__weight=huge)
    # Without statistics, the first matrix whose outputs overflow is found.
    culprit = "gate" if method == "magnitude" else "down"
    with pytest.raises(NumericsError, match=rf"model\.layers\.1\.mlp\.{culprit}_proj") as caught:
        prune(source, on_words(tmp_path, method=method), tmp_path / "pruned")
    assert "float32" in caught.value.fix
    assert not list((tmp_path / "pruned").glob("model-00003*"))


def on_words(folder: Path, words: str = "w50 w60 w70", **changes: Any) -> Mapping[str, Any]:
    """A recipe that calibrates on these words, again and again."""
    text = folder / "words.txt"
    text.write_text(f"{words} " * 40)
    calibration = {"source": str(text), "samples": 3, "length": 8}
    return recipe(**{"calibration": calibration, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_an_error_that_overflows_is_no_number_for_a_report(tmp_path: Path, method: str) -> None:
    """Finite inputs, finite weights, and a squared norm beyond float32."""
    source = changed(tmp_path, mlp__down_proj__weight=torch.tensor(3e38))
    with pytest.raises(NumericsError, match=r"model\.layers\.1"):
        prune(source, on_words(tmp_path, method=method), tmp_path / "pruned")


def test_a_singular_gram_climbs_a_ladder_that_the_report_shows(tmp_path: Path) -> None:
    """One word again and again: fewer independent inputs than columns, and no damping to begin with."""
    source = save(build("llama"), tmp_path / "dense")
    settings = on_words(tmp_path, "w50", method={"sparsegpt": {"damping": 0}}, held_back=0)
    report = prune(source, settings, tmp_path / "pruned")
    climbed = [row for row in report.rows if len(row.damping_tried) > 1]
    assert {row.name for row in climbed} >= {f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"}
    for row in climbed:
        assert row.damping_tried == (0.0, 0.01, 0.1, 1.0)[: len(row.damping_tried)]
        assert row.damping == row.damping_tried[-1]
    assert all(row.error is not None and 0 <= row.error < 1 for row in report.rows)
    assert all(row.zeros == row.shape[0] * row.shape[1] // 2 for row in report.rows)


def test_the_damping_that_was_asked_for_is_the_one_reported(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    rules = [{"match": "*.q_proj", "method": {"sparsegpt": {"damping": 0.3}}}, {"match": "*.k_proj", "method": "wanda"}]
    report = prune(source, recipe(rules=rules), tmp_path / "pruned")
    expected = {"q_proj": (0.3, (0.3,)), "k_proj": (None, ())}
    for row in report.rows:
        assert (row.damping, row.damping_tried) == expected.get(row.name.rpartition(".")[2], (0.01, (0.01,)))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_dead_inputs_are_counted_and_their_weights_go_first(tmp_path: Path, method: str) -> None:
    norm = torch.ones(32)
    norm[[3, 17]] = 0
    source = changed(tmp_path, input_layernorm__weight=norm)
    report = prune(source, recipe(method=method, pattern="0.5/row"), tmp_path / "pruned")
    after = tensors(tmp_path / "pruned")
    for row in report.rows:
        dead = row.name in [f"model.layers.1.self_attn.{letter}_proj" for letter in "qkv"]
        assert row.dead_inputs == (2 if dead else 0)
        if dead:
            assert not after[f"{row.name}.weight"][:, [3, 17]].any()
        assert zeros(after[f"{row.name}.weight"]) == row.zeros


def test_a_matrix_of_zeros_has_no_error(tmp_path: Path) -> None:
    source = changed(tmp_path, self_attn__v_proj__weight=torch.zeros(()))
    for method in METHODS:
        report = prune(source, recipe(method=method), tmp_path / method)
        (row,) = (row for row in report.rows if row.name == "model.layers.1.self_attn.v_proj")
        assert row.error == 0
        assert row.zeros == row.shape[0] * row.shape[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_pattern_is_exact_over_each_layer(tmp_path: Path, method: str) -> None:
    dense = save(build("llama", torch.bfloat16, num_hidden_layers=3), tmp_path / "dense")
    report = prune(dense, recipe(pattern="0.37/layer", method=method, exclude=["*.v_proj"]), tmp_path / "pruned")
    before, after = tensors(dense), tensors(tmp_path / "pruned")
    for number in range(3):
        names = [f"{row.name}.weight" for row in report.rows if row.layer == f"model.layers.{number}"]
        assert len(names) == 6
        elements = sum(after[name].numel() for name in names)
        assert sum(zeros(after[name]) for name in names) == int(0.37 * elements + 0.5)
        assert len({zeros(after[name]) / after[name].numel() for name in names}) > 1
        if method == "magnitude":
            dropped = max(float(before[name][after[name] == 0].abs().max()) for name in names)
            assert dropped <= min(float(before[name][after[name] != 0].abs().min()) for name in names)


def test_experts_that_see_too_little_get_prior_tokens(tmp_path: Path) -> None:
    source = save(build("mixtral"), tmp_path / "dense")
    report = prune(source, recipe(experts={"min_tokens": 100}), tmp_path / "pruned")
    experts = [row for row in report.rows if ".experts." in row.name]
    assert len(experts) == 2 * 4 * 2 or len(experts) == 2 * 4 * 3
    assert all(row.prior_tokens == max(0, 100 - row.tokens) for row in experts)
    assert all(row.prior_tokens == 0 for row in report.rows if row not in experts)
    assert all(row.zeros == row.shape[0] * row.shape[1] // 2 for row in report.rows)
