"""Pruning by gradients of the dense model's loss: scores of weights, and weights of tokens."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import tensors
from rich.console import Console
from tiny_models import build, random_ids, recipe, save
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmprune import prune
from llmprune.cli.tables.pruning import report_table
from llmprune.errors import RecipeError
from llmprune.methods import METHODS, Magnitude
from llmprune.models.decoder import prunable_matrices
from llmprune.models.source import ModelSource
from llmprune.patterns import parse
from llmprune.progress import Progress
from llmprune.pruning.context import Run
from llmprune.pruning.forecast.forecast import dry_run
from llmprune.pruning.gradients import DenseGradients, dense_gradients, importance
from llmprune.pruning.jobs import plan_jobs
from llmprune.recipe.recipe import load_recipe
from llmprune.statistics import Gram
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.text.tokens import Tokens

IDS = random_ids(7, 16)
COUNTED = IDS[:6]


def reference(model: Any, weight: Tensor) -> Tensor:
    """The gradient of each sample's loss, by transformers, [samples, out, in]."""
    losses = (model(input_ids=sample[None], labels=sample[None]).loss for sample in COUNTED)
    return torch.stack([torch.autograd.grad(loss, weight)[0].double() for loss in losses])


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("name", ["gradient", "taylor", "fisher"])
def test_scores_are_those_of_the_dense_models_gradients(name: str, chained: bool) -> None:
    model = build("llama")
    settings = load_recipe(recipe(method=[name, "refit"] if chained else name, activation_budget=0))
    run, source = Run.begin(settings), ModelSource(model)
    jobs = plan_jobs(source, settings)
    found = dense_gradients(run, source, jobs, Tokens(IDS, "", {}))
    assert found.kept.resident_bytes == 0
    for layer, matrix in ((0, "model.layers.0.self_attn.q_proj"), (1, "model.layers.1.mlp.down_proj")):
        parameter = model.get_parameter(f"{matrix}.weight")
        each, weight = reference(model, parameter), parameter.detach().double()
        wanted = {
            "gradient": each.mean(0).abs(),
            "taylor": (each.mean(0) * weight).abs(),
            "fisher": weight.square() * each.square().mean(0) / 2,
        }[name]
        job = found.bound(jobs[layer])[matrix]
        scores = job.method.scores(parameter.detach(), None).double()
        torch.testing.assert_close(scores, wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()))


def test_no_pass_is_made_for_methods_that_read_no_gradients() -> None:
    settings = load_recipe(recipe(method="sparsegpt"))
    source = ModelSource(build("llama"))
    said: list[Progress] = []
    found = dense_gradients(Run.begin(settings, said.append), source, plan_jobs(source, settings), Tokens(IDS, "", {}))
    assert (said, found.places, found.importance) == ([], {}, {})


def test_statistics_are_half_plain_and_half_weighted_by_the_loss() -> None:
    model = build("llama")
    settings = load_recipe(recipe(statistics={"loss_weight": "tokens"}))
    source = ModelSource(model)
    found = dense_gradients(Run.begin(settings), source, plan_jobs(source, settings), Tokens(IDS, "", {}))
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    layer = model.model.layers[0]
    hooks = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output)),
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()[0].double())),
    ]
    squares = []
    for sample in COUNTED:
        loss = model(input_ids=sample[None], labels=sample[None]).loss
        squares.append(torch.autograd.grad(loss, outputs[-1])[0].double().square().mean(-1)[0])
    for hook in hooks:
        hook.remove()
    each = torch.stack(squares)
    each = each.clamp(max=each.flatten().sort().values[int(0.99 * (each.numel() - 1))])
    torch.testing.assert_close(found.importance[0].double(), each / each.mean(), rtol=1e-3, atol=1e-4)
    assert float(found.importance[0].max()) > 2

    x = torch.cat(inputs)
    plain, weighted = x.T @ x, x.T @ (each.view(-1, 1) * x)
    wanted = plain / 2 + weighted / 2 * plain.trace() / weighted.trace()
    stream = Stream(ModelSource(model), IDS, StreamSettings(batch_size=4, held_back=1))
    resident = next(iter(stream))
    (group,) = resident.observe({"model.layers.0.mlp.up_proj": Gram}, importance=found.importance[0])
    assert isinstance(group.statistics, Gram)
    torch.testing.assert_close(group.statistics.products.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()))
    assert group.statistics.tokens == len(x)


def test_importance_is_clipped_and_one_on_average() -> None:
    squares = torch.ones(4, 50)
    squares[0, :3] = 1e6
    weights = importance(squares)
    assert weights.mean() == pytest.approx(1)
    assert importance(torch.cat([torch.ones(1, 200), torch.full((1, 1), 1e6)], 1)).max() == 1
    assert bool((importance(torch.zeros(2, 3)) == 1).all())


# Experts keep the plain statistics, other matrices do not.
@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize(
    "change",
    [
        {"method": "wanda", "statistics": {"loss_weight": "tokens"}},
        {"method": "sparsegpt", "statistics": {"loss_weight": "tokens", "sequential": True}},
        {"method": ["taylor", "refit"], "pattern": "0.5/layer"},
        {"method": "fisher", "pattern": "0.5/layer"},
    ],
    ids=lambda change: str(change["method"]),
)
def test_a_run_spills_and_resumes_to_the_same_bytes(tmp_path: Path, family: str, change: dict[str, Any]) -> None:
    source = save(build(family), tmp_path / "dense")
    settings = recipe(**{"pattern": "2:4", **change})
    report = prune(source, settings, tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.stage == "pruning" and progress.layer == 1:
            raise KeyboardInterrupt

    spilled = {**settings, "activation_budget": 0}
    with pytest.raises(KeyboardInterrupt):
        prune(source, spilled, tmp_path / "resumed", watch=stop)
    prune(source, spilled, tmp_path / "resumed", resume=True)
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "resumed")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    if "statistics" in change:
        prune(source, {**settings, "statistics": {**change["statistics"], "loss_weight": "none"}}, tmp_path / "plain")
        plain = tensors(tmp_path / "plain")
        assert not all(torch.equal(plain[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    ("method", "pattern"), [("gradient", "0.5"), (["fisher", "refit"], "0.501/layer"), ("taylor", "2:4")], ids=str
)
def test_experts_without_gradients_are_pruned_by_magnitude(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str | list[str], pattern: str
) -> None:
    """As if no token had reached expert 2: neither its first neurons go, nor all of it."""
    read = DenseGradients._read
    monkeypatch.setattr(DenseGradients, "_read", lambda self, name: read(self, name) * (".experts.2." not in name))
    source = save(build("mixtral"), tmp_path / "dense")
    report = prune(source, recipe(method=method, pattern=pattern), tmp_path / "out")
    blind = [row for row in report.rows if ".experts.2." in row.name]
    assert [row for row in report.rows if row.by_magnitude] == blind != []
    before, after = prunable(source), prunable(tmp_path / "out")
    for row in blind:
        wanted = Magnitude()(before[row.name], None, parse(pattern)).mask
        assert torch.equal(after[row.name] != 0, wanted), row.name
    elements = sum(row.shape[0] * row.shape[1] for row in report.rows)
    assert sum(row.zeros for row in report.rows) == 2 * round(elements // 2 * parse(pattern).sparsity)
    shown = StringIO()
    Console(width=200, file=shown).print(report_table(report, tmp_path / "out"))
    for text in (shown.getvalue(), (tmp_path / "out" / "report.html").read_text("utf-8")):
        assert f"for {len(blind)} matrices, chosen by magnitude instead" in text


def prunable(folder: Path) -> dict[str, Tensor]:
    """All matrices of a checkpoint's layers, by the names that reports give them."""
    source = ModelSource(AutoModelForCausalLM.from_pretrained(folder))
    return {
        matrix.name: matrix.view(layer.get_parameter(matrix.parameter)).detach()
        for index, layer in enumerate(source.layers)
        for matrix in prunable_matrices(layer, f"{source.layers_path}.{index}")
    }


def test_scores_by_gradients_of_a_full_size_model_are_refused_with_structures() -> None:
    assert {"gradient", "taylor", "fisher"} <= set(METHODS)
    settings = recipe(method="taylor", structures={"ffn": {"remove": 0.5}})
    with pytest.raises(RecipeError, match="taylor with structures"):
        load_recipe(settings)
    rules = [{"match": "*.q_proj", "method": "fisher"}]
    with pytest.raises(RecipeError, match="fisher with structures"):
        load_recipe({**settings, "method": "wanda", "rules": rules})


def test_a_dry_run_counts_the_backward_pass(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    plain, scored = (dry_run(source, recipe(method=method)) for method in ("magnitude", "taylor"))
    assert plain.memory.backward == plain.memory.kept == 0
    elements = sum(len(p.indices) * m.shape[0] * m.shape[1] for p in scored.layers for m in p.matrices)
    assert scored.memory.kept == 4 * elements
    assert scored.memory.peak >= scored.memory.backward > scored.memory.kept
    assert scored.work.forward == 3 * plain.work.forward
    assert any("backward pass" in note for note in scored.notes)
    assert not any("backward pass" in note for note in plain.notes)
    grams = [dry_run(source, recipe(statistics={"loss_weight": weight})) for weight in ("none", "tokens")]
    first, second = (plan.memory.layer.statistics for plan in grams)
    assert second == 2 * first
