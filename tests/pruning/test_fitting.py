"""Runs that fit each layer as a whole: what the report has, and that no interruption shows in the result."""

import json
from dataclasses import asdict, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import tensors, untimed, weights_and_texts
from rich.console import Console
from runs import stop_early
from tiny_models import build, recipe, save, tokenizer
from transformers import AutoModelForCausalLM

from llmprune import Report, dry_run, prune
from llmprune.cli.tables.pruning import report_table
from llmprune.errors import RecipeError
from llmprune.pages.fitted import fitting_facts, match_parts
from llmprune.pages.page import Chart
from llmprune.pruning import fitting as fit
from llmprune.storage.report import load_report
from llmprune.stream.matching import Matched
from llmprune.stream.resident import ResidentLayer

TARGETS = ("dense", "local", "corrected")
QUICK = {"epochs": 2, "lr": 3e-3, "sequences": 2}
SMALLER = {"ffn": {"remove": 0.5}, "depth": {"remove": 1}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama", num_hidden_layers=4), tmp_path_factory.mktemp("model"))


def fitting(target: str = "corrected", **changes: Any) -> dict[str, Any]:
    return recipe(**{"method": "wanda", "held_back": 2, "reconstruct": {"target": target, **QUICK}, **changes})


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Any:
    return partial(stop_early, monkeypatch)


@pytest.mark.parametrize("structures", [None, SMALLER], ids=["weights", "smaller"])
@pytest.mark.parametrize("target", TARGETS)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    llama: Path, tmp_path: Path, stopped: Any, target: str, structures: dict[str, Any] | None
) -> None:
    settings = fitting(target, structures=structures)
    whole = prune(llama, settings, tmp_path / "whole")
    stopped(llama, settings, tmp_path / "resumed")
    again = prune(llama, settings, tmp_path / "resumed", resume=True)
    assert weights_and_texts(tmp_path / "resumed") == weights_and_texts(tmp_path / "whole")
    assert untimed(again) == untimed(whole) == untimed(load_report(tmp_path / "resumed"))
    layers = [row.layer for row in again.matches]
    assert layers == [f"model.layers.{number}" for number in range(4 if structures is None else 3)]
    assert {row.target for row in again.matches} == {target}


def test_attention_first_then_the_rest(llama: Path, tmp_path: Path, stopped: Any) -> None:
    """Both parts are fitted, neither gets worse, and an interruption does not show."""
    settings = fitting(reconstruct={**QUICK, "window": "attention+mlp"})
    whole = prune(llama, settings, tmp_path / "whole")
    stopped(llama, settings, tmp_path / "resumed")
    prune(llama, settings, tmp_path / "resumed", resume=True)
    assert weights_and_texts(tmp_path / "resumed") == weights_and_texts(tmp_path / "whole")
    names = [(row.layer, row.part) for row in whole.matches]
    assert names == [(f"model.layers.{number}", part) for number in range(4) for part in ("attention", "layer")]
    for kind in ("attention", "layer"):
        rows = [row for row in whole.matches if row.part == kind]
        assert all(row.after <= row.before for row in rows)
        assert any(row.after < row.before for row in rows)
    assert sum(row.zeros for row in whole.rows) == sum(
        row.zeros for row in prune(llama, fitting(), tmp_path / "layers").rows
    )
    assert "of 8 fits of attentions and layers" in dict(fitting_facts(whole))["block matching"]
    (chart,) = match_parts(whole)
    assert isinstance(chart, Chart)
    assert [row[0] for row in chart.table.rows[:3]] == ["0 attention", "0", "1 attention"]


def test_parts_that_make_the_whole_layer_worse_are_undone(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention of layer 1 is fitted so that it doubles, and said to be better; the rest cannot make up for it."""
    match_layer = fit.match_layer

    def mislead(layer: ResidentLayer, *arguments: Any) -> Matched:
        matched = match_layer(layer, *arguments)
        if layer.index != 1 or not arguments[-1]("self_attn.o_proj.weight"):
            return matched
        for name, parameter in layer.module.named_parameters():
            if "self_attn" in name:
                parameter.data.mul_(20.0)
        return replace(matched, after=matched.before / 2, best=1)

    monkeypatch.setattr(fit, "match_layer", mislead)
    settings = fitting(reconstruct={**QUICK, "epochs": 1, "lr": 1e-5, "window": "attention+mlp"})
    report = prune(llama, settings, tmp_path / "out")
    rows = [row for row in report.matches if row.layer == "model.layers.1"]
    assert [(row.part, row.best, row.after) for row in rows] == [
        ("attention", 0, rows[0].before),
        ("layer", 0, rows[1].before),
    ]
    # Norms are those of the dense model again, and so are the weights that Wanda kept.
    before, after = tensors(llama), tensors(tmp_path / "out")
    for name in (name for name in after if ".layers.1." in name):
        kept = after[name] != 0
        assert torch.equal(after[name][kept], before[name][kept]), name
    assert any(row.best for row in report.matches if row.layer != "model.layers.1")


def test_layers_without_both_parts_are_refused_before_any_text_is_read(tmp_path: Path) -> None:
    source = save(build("bloom"), tmp_path / "dense")
    settings = fitting(reconstruct={**QUICK, "window": "attention+mlp"})
    for run in (lambda: prune(source, settings, tmp_path / "out"), lambda: dry_run(source, settings)):
        with pytest.raises(
            RecipeError, match=r"reconstruct.window is attention\+mlp, and layer 0 has no attention by itself"
        ):
            run()


def test_rows_say_what_it_brought(llama: Path, tmp_path: Path) -> None:
    report = prune(llama, fitting(), tmp_path / "out")
    assert all(row.after <= row.before for row in report.matches)
    assert any(row.after < row.before and row.best > 0 for row in report.matches)
    assert all(row.epochs >= row.best for row in report.matches)
    assert report.header["seconds"]["match"] > 0
    assert load_report(tmp_path / "out").matches == report.matches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_are_those_of_the_solver(tmp_path: Path, dtype: torch.dtype) -> None:
    """In the first layer, which is solved on the same inputs with and without."""
    source = save(build("llama", dtype), tmp_path / "dense")
    reports = [
        prune(source, fitting(reconstruct=reconstruct), tmp_path / name)
        for name, reconstruct in (("fitted", QUICK), ("plain", None))
    ]
    fitted, plain = tensors(tmp_path / "fitted"), tensors(tmp_path / "plain")
    for name in (f"{row.name}.weight" for row in reports[0].rows if row.layer.endswith("0")):
        assert torch.equal(fitted[name] == 0, plain[name] == 0)
        assert not torch.equal(fitted[name], plain[name])
    for row in reports[0].rows:
        assert row.zeros == int((fitted[f"{row.name}.weight"] == 0).sum())
    assert reports[0].sparsity == reports[1].sparsity


def test_only_pruned_matrices_are_trained(llama: Path, tmp_path: Path) -> None:
    report = prune(llama, fitting(include=["*.mlp.*"], exclude=["*.3.*"]), tmp_path / "out")
    before, after = tensors(llama), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    weights = {name for name in changed if name.endswith("proj.weight")}
    assert weights == {f"model.layers.{i}.mlp.{kind}_proj.weight" for i in range(3) for kind in ("gate", "up", "down")}
    assert any("layernorm" in name for name in changed)
    # A layer that is excluded as a whole keeps its norms and biases as well.
    assert not any(name.startswith("model.layers.3.") for name in changed)
    assert [row.layer for row in report.matches] == [f"model.layers.{i}" for i in range(3)]


def test_norms_alone(llama: Path, tmp_path: Path) -> None:
    plain, normed = fitting(reconstruct=None), fitting(reconstruct={**QUICK, "train": ["norms"]})
    prune(llama, plain, tmp_path / "plain")
    prune(llama, normed, tmp_path / "normed")
    plain, normed = tensors(tmp_path / "plain"), tensors(tmp_path / "normed")
    first = [name for name in plain if ".layers.0." in name]
    changed = {name for name in first if not torch.equal(plain[name], normed[name])}
    assert changed == {f"model.layers.0.{which}_layernorm.weight" for which in ("input", "post_attention")}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_fitted(family: str, tmp_path: Path) -> None:
    source = save(build(family), tmp_path / "dense")
    report = prune(source, fitting("local"), tmp_path / "out")
    assert any(row.after < row.before for row in report.matches)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def in_memory(folder: Path, settings: dict[str, Any]) -> tuple[Any, Report]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model, prune(model, settings, tokenizer=tokenizer())


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_in_memory_is_fitted_alike(llama: Path, tmp_path: Path, target: str) -> None:
    settings = fitting(target)
    streamed = prune(llama, settings, tmp_path / "out")
    model, report = in_memory(llama, settings)
    stored = tensors(tmp_path / "out")
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert untimed(report)["matches"] == untimed(streamed)["matches"]
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_correcting_brings_the_last_layer_nearest_to_the_dense_model(llama: Path, tmp_path: Path) -> None:
    """What the targets are for: earlier errors are corrected only where the dense model's states are the target."""
    found = {}
    for target in ("local", "corrected"):
        settings = fitting(target, evaluation={"samples": 4, "length": 24})
        settings["reconstruct"] = {"target": target, "epochs": 4, "lr": 2e-3, "sequences": 2}
        report = prune(llama, settings, tmp_path / target)
        found[target] = report.header["evaluation"]["kl_divergence"]
    assert found["corrected"] < found["local"]


def test_it_needs_validation_sequences(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="reconstruct without validation sequences"):
        prune(llama, fitting(held_back=0), tmp_path / "out")


def test_losses_of_chains_reach_the_report_the_page_and_the_terminal(llama: Path, tmp_path: Path, stopped: Any) -> None:
    settings = fitting(method=["wanda", "swaps", "refit"])
    out = tmp_path / "out"
    stopped(llama, settings, out)
    report = prune(llama, settings, out, resume=True)
    for row in report.rows:
        assert [loss.step for loss in row.losses] == ["", "swaps", "refit"]
        assert [loss.loss for loss in row.losses] == sorted((loss.loss for loss in row.losses), reverse=True)
    stored = json.loads((out / "report.json").read_text())["rows"]
    assert [row["losses"] for row in stored] == [[asdict(loss) for loss in row.losses] for row in report.rows]
    assert load_report(out).rows == report.rows
    assert prune(llama, settings, out, resume=True).rows == report.rows
    shown = StringIO()
    Console(width=400, file=shown).print(report_table(report, out))
    for name, line in fitting_facts(report):
        assert f"{name}" in shown.getvalue()
        assert line in shown.getvalue()
        assert line in (out / "report.html").read_text()
    assert [name for name, _ in fitting_facts(report)] == ["loss after each step", "block matching"]
