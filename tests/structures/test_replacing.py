"""Kept layers that stand for the removed ones after them: by a linear map, by block matching, or refused."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import tensors, weights_and_texts
from rich.console import Console
from runs import stop_early
from tiny_models import build, recipe, save
from transformers import AutoModelForCausalLM

from llmprune import Report, dry_run, prune
from llmprune.cli.tables.pruning import dry_run_tables
from llmprune.errors import ModelError, RecipeError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.pages.fitted import fitting_facts, match_parts
from llmprune.recipe.recipe import load_recipe
from llmprune.text.loading import load_texts, load_tokenizer

LINEAR = {"remove": 2, "replace": "linear"}
QUICK = {"epochs": 2, "lr": 3e-3, "sequences": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama", num_hidden_layers=5), tmp_path_factory.mktemp("model"))


def settings(depth: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    plain = {key: value for key, value in recipe(held_back=2).items() if key not in ("pattern", "method")}
    return {**plain, "structures": {"depth": depth or LINEAR}, **changes}


def kept(report: Report) -> list[int]:
    return list(report.header["decisions"]["layers"])


def test_the_map_brings_the_kept_layer_closer_to_the_removed_ones(llama: Path, tmp_path: Path) -> None:
    text = {"evaluation": {"samples": 2, "length": 16, "prompts": []}}
    report = prune(llama, settings(**text), tmp_path / "out")
    assert kept(report)[0] == 0
    assert len(kept(report)) == 3
    assert report.matches
    numbers = {old: new for new, old in enumerate(kept(report))}
    before = [old for old in kept(report) if old < 4 and old + 1 not in numbers]
    assert [row.layer for row in report.matches] == [f"model.layers.{numbers[old]}" for old in before]
    assert all((row.target, row.epochs, row.best) == ("linear", 1, 1) for row in report.matches)
    assert all(0 < row.after < row.before for row in report.matches)
    old, new = tensors(llama), tensors(tmp_path / "out")
    changed = {
        name
        for name, value in new.items()
        if ".layers." in name
        and not torch.equal(value, old[name.replace(f".{(n := int(name.split('.')[2]))}.", f".{kept(report)[n]}.", 1)])
    }
    own = {f"model.layers.{numbers[old]}.mlp.down_proj" for old in before}
    assert changed == {f"{name}.{kind}" for name in own for kind in ("weight", "bias")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(1, 12)[None]).logits).all()
    assert dict(fitting_facts(report)).keys() == {"standing for removed layers"}
    assert match_parts(report) == []


def test_the_map_is_the_least_squares_fit_of_the_removed_layer(llama: Path, tmp_path: Path) -> None:
    """By hand, on the whole model in float64 with hooks; the text has no sequences that weigh more than others."""
    report = prune(llama, settings({"remove": 1, "replace": "linear", "damping": 0.0}, held_back=0), tmp_path / "out")
    (gone,) = set(range(5)) - set(kept(report))
    model, states = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64), {}
    for name, module in model.named_modules():
        if name in (f"model.layers.{gone - 1}.mlp", f"model.layers.{gone - 1}", f"model.layers.{gone}"):
            module.register_forward_hook(lambda module, args, output, name=name: states.update({name: output}))
    ids = calibration(llama)
    with torch.no_grad():
        model(ids)
    mlp, y, t = (states[key].flatten(0, 1) for key in sorted(states, key=lambda key: (not key.endswith("mlp"), key)))
    weight = 1 / t.norm(dim=1, keepdim=True)
    change = torch.linalg.lstsq(mlp * weight, (t - y) * weight).solution.T
    linear = torch.eye(32, dtype=torch.float64) + change
    down = tensors(llama)[f"model.layers.{gone - 1}.mlp.down_proj.weight"].double()
    new = tensors(tmp_path / "out")[f"model.layers.{gone - 1}.mlp.down_proj.weight"].double()
    assert torch.allclose(new, linear @ down, rtol=1e-3, atol=1e-3)


def calibration(folder: Path) -> torch.Tensor:
    source = CheckpointSource(folder)
    spec = load_recipe(settings(held_back=0)).fitted(64, "cpu").calibration
    return load_texts({"calibration": spec}, source, load_tokenizer(folder), torch.device("cpu"))["calibration"].ids


@pytest.mark.parametrize("reconstruct", [None, {**QUICK, "target": "corrected"}, {**QUICK, "target": "local"}])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    llama: Path, tmp_path: Path, reconstruct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings(
        reconstruct=reconstruct, structures={"depth": LINEAR, "ffn": {"remove": 0.5}}, pattern="2:4", method="wanda"
    )
    whole = prune(llama, wanted, tmp_path / "whole")
    stop_early(monkeypatch, llama, wanted, tmp_path / "resumed")
    again = prune(llama, wanted, tmp_path / "resumed", resume=True)
    assert weights_and_texts(tmp_path / "resumed") == weights_and_texts(tmp_path / "whole")
    assert [(row.layer, row.target, row.after) for row in again.matches] == [
        (row.layer, row.target, row.after) for row in whole.matches
    ]
    assert again.sparsity == whole.sparsity == 0.5


def test_block_matching_fits_a_kept_layer_to_the_removed_ones_after_it(llama: Path, tmp_path: Path) -> None:
    """Before training, its error is that of a layer whose successor is missing; later layers begin from less."""
    reports = {
        replace: prune(llama, settings({"remove": 2, "replace": replace}, reconstruct=QUICK), tmp_path / str(replace))
        for replace in (None, "linear")
    }
    plain, linear = reports[None].matches, reports["linear"].matches
    assert [row.target for row in plain] == ["corrected"] * 3
    first = next(row for row in plain if row.before)
    assert first.after < first.before
    if kept(reports[None]) == kept(reports["linear"]):
        by_map = next(row for row in linear if row.target == "linear")
        assert (by_map.layer, by_map.before) == (first.layer, pytest.approx(first.before, rel=1e-4))
        fitted = next(row for row in linear if row.layer == first.layer and row.target == "corrected")
        assert fitted.before == pytest.approx(by_map.after, rel=1e-4)


def test_a_map_that_does_not_help_is_left_out(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.structures.remove.linear_map.LinearMap.solve", lambda self, damping: -self._gram)
    report = prune(llama, settings(), tmp_path / "out")
    assert all(row.best == 0 and row.after == row.before for row in report.matches)
    plain = prune(llama, settings({"remove": 2}), tmp_path / "plain")
    assert kept(plain) == kept(report)
    assert weights_and_texts(tmp_path / "out").keys() == weights_and_texts(tmp_path / "plain").keys()
    new, old = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    assert all(torch.equal(new[name], old[name]) for name in old)


@pytest.mark.parametrize("method", ["block-influence", "angular", "kl"])
def test_the_first_layer_is_kept(llama: Path, tmp_path: Path, method: str) -> None:
    report = prune(llama, settings({"remove": 4, "replace": "linear", "method": method}), tmp_path / "out")
    assert kept(report) == [0]
    with pytest.raises(RecipeError, match="5 of 5 layers"):
        dry_run(llama, settings({"remove": 5, "replace": "linear", "method": method}))


@pytest.mark.parametrize("family", ["gemma2", "mamba", "zaya"])
def test_what_cannot_take_up_a_map_is_refused_before_anything_runs(family: str, tmp_path: Path) -> None:
    source = save(build(family), tmp_path / "dense")
    with pytest.raises(ModelError, match="cannot stand for removed layers") as raised:
        dry_run(source, settings({"remove": 1, "replace": "linear"}))
    assert "leave replace out" in str(raised.value)


def test_removed_mlps_cannot_take_it_up() -> None:
    with pytest.raises(RecipeError, match="replace together with mlp"):
        load_recipe(settings(structures={"depth": LINEAR, "mlp": {"remove": 1}}))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("reconstruct", [None, {**QUICK, "train": ["norms"]}], ids=["plain", "fitted"])
def test_the_dry_run_knows_what_it_takes(family: str, reconstruct: Any, tmp_path: Path) -> None:
    source = save(build(family, num_hidden_layers=3), tmp_path / "dense")
    wanted = settings({"remove": 1, "replace": "linear"}, reconstruct=reconstruct)
    plan, report = dry_run(source, wanted), prune(source, wanted, tmp_path / "out")
    assert plan.memory.layer.replacing > 0
    assert plan.memory.peak == pytest.approx(report.header["memory"]["predicted_bytes"], rel=0.01)
    without = dry_run(source, settings({"remove": 1}, reconstruct=reconstruct))
    assert without.work.solve < plan.work.solve
    assert without.work.gram < plan.work.gram
    text = StringIO()
    Console(file=text, width=120).print(*dry_run_tables(plan))
    assert "standing for removed layers" in text.getvalue()
    assert json.dumps(plan.to_dict())
