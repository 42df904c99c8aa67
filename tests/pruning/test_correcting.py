"""Runs with `statistics.alpha`: what is aimed at, where it is not, and that no way to the result shows in it."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import tensors, untimed, weights_and_texts
from runs import stop_early
from tiny_models import build, every_family, known, random_ids, recipe, save, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune import prune
from llmprune.errors import RecipeError
from llmprune.methods import SparseGPT
from llmprune.models.source import ModelSource
from llmprune.pages.fitted import fitting_facts
from llmprune.patterns import NM
from llmprune.pruning.jobs import Job
from llmprune.pruning.solving import solve_in_turn, solve_layer
from llmprune.pruning.targets import Targets
from llmprune.recipe.recipe import load_recipe
from llmprune.statistics import Gram
from llmprune.storage.report import MatrixRow, load_report
from llmprune.stream.paired import frozen
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.timing import Stages

# Of the correction, which is large in models as small as these.
PART = 0.1
SHARED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def correcting(alpha: float = 0.5, **changes: Any) -> dict[str, Any]:
    statistics = {"alpha": alpha, **changes.pop("statistics", {})}
    # More tokens than inputs, or the errors would be those of this text alone.
    text = {"source": "self", "samples": 9, "length": 24}
    return recipe(**{"pattern": "2:4", "statistics": statistics, "calibration": text, **changes})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama", num_hidden_layers=4), tmp_path_factory.mktemp("model"))


def inputs_of(model: PreTrainedModel, ids: Tensor, name: str) -> Tensor:
    """What a linear module reads in a stock model, [tokens, in]."""
    seen: list[Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0].double()


def aimed_at(weight: Tensor, dense: Tensor, pruned: Tensor) -> Tensor:
    """The weight whose outputs on the pruned model's inputs come nearest to those on a mixture, by least squares."""
    dense = pruned + PART * (dense - pruned)
    pull = (0.01 * pruned.square().sum(0).mean()).sqrt()
    left = torch.cat([pruned, pull * torch.eye(pruned.shape[1], dtype=torch.float64)])
    right = torch.cat([dense @ weight.double().T, pull * weight.double().T])
    return torch.linalg.lstsq(left, right).solution.T


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in turn"])
def test_a_matrix_aims_at_what_its_dense_self_gives_in_the_dense_model(sequential: bool) -> None:
    """Compared with the plain way: hooks on two stock models, one dense and one pruned by hand."""
    model, dense, by_hand, ids = build("llama"), build("llama"), build("llama"), random_ids(8, 16)
    job, pairs = Job(NM(2, 4), SparseGPT(), "sparsegpt"), list[tuple[str, Tensor, Tensor]]()
    rows: list[MatrixRow] = []
    stream = Stream(ModelSource(model), ids, StreamSettings(batch_size=2))
    targets = Targets(None, stream, paired=True)
    for layer in stream:
        jobs, twin = dict.fromkeys(layer.matrices, job), frozen(layer)
        if sequential:
            rows += solve_in_turn(layer, jobs, "none", 0, Stages(), dense=partial(targets.rows, twin), alpha=PART)
        else:
            groups = layer.observe(dict.fromkeys(jobs, Gram), dense=targets.rows(twin, jobs))
            rows += solve_layer(layer, groups, jobs, 0, Stages(), alpha=PART)
        assert targets.prepare(twin) is None
        for part in SHARED:
            names = [name for name in jobs if name.endswith(part)]
            both = [inputs_of(stock, ids, names[0]) for stock in (dense, by_hand)]
            gram = Gram(both[1].float().T @ both[1].float(), len(both[1]))
            for name in names:
                aim = aimed_at(dense.get_submodule(name).weight.detach(), *both).float()
                pairs.append((name, layer.weight(name), job.method(aim, gram, job.pattern).weight))
            if sequential:
                take_over(by_hand, layer, names)
        take_over(by_hand, layer, list(jobs))
    assert len(pairs) == len(rows) == 14
    assert max(row.correction or 0 for row in rows) > 0.05
    for name, found, expected in pairs:
        assert float((found - expected).norm() / expected.norm()) < 1e-3, name


def take_over(model: PreTrainedModel, layer: ResidentLayer, names: list[str]) -> None:
    for name in names:
        model.get_submodule(name).weight.data = layer.weight(name)


@every_family
def test_the_dense_stream_is_the_dense_model(family: str) -> None:
    """Whatever its layers hand on, and whatever happens to the weights of the other stream."""
    if not known(family):
        pytest.skip(f"this version of transformers has no {family}")
    ids, settings = random_ids(3, 12), StreamSettings(batch_size=2, outputs=True)
    plain = Stream(ModelSource(build(family)), ids, settings)
    expected = [*[states_of(plain) for _ in plain][1:], states_of(plain)]
    stream = Stream(ModelSource(build(family)), ids, settings)
    targets = Targets("corrected", stream, paired=True)
    for layer, outputs in zip(stream, expected, strict=True):
        twin = frozen(layer)
        layer.observe(dict.fromkeys(layer.matrices, Gram), dense=targets.rows(twin, layer.matrices))
        for name in layer.matrices:
            layer.replace(name, layer.weight(name) * 0.5)
        found = targets.prepare(twin)
        assert found is not None
        assert all(torch.equal(found[1][batch], output) for batch, output in enumerate(outputs))


def states_of(stream: Stream) -> list[Tensor]:
    return [stream.hidden[batch].clone() for batch in range(2)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": ["wanda", "refit"], "statistics": {"sequential": True, "loss_weight": "tokens"}},
        {"reconstruct": {"target": "local", "epochs": 1}, "activation_budget": 0},
        {"reconstruct": {"target": "corrected", "epochs": 1}},
        {"rotation": {"kind": "hadamard"}},
    ],
    ids=["plain", "in turn", "fitted", "fitted to dense", "rotated"],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    llama: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = correcting(**changes)
    whole = prune(llama, settings, tmp_path / "whole")
    stop_early(monkeypatch, llama, settings, tmp_path / "resumed")
    again = prune(llama, settings, tmp_path / "resumed", resume=True)
    assert weights_and_texts(tmp_path / "resumed") == weights_and_texts(tmp_path / "whole")
    rows = untimed(whole)["rows"]
    assert untimed(again)["rows"] == rows == untimed(load_report(tmp_path / "resumed"))["rows"]
    assert any(row.correction for row in whole.rows)


def test_disk_and_memory_give_the_same(llama: Path, tmp_path: Path) -> None:
    streamed = prune(llama, correcting(), tmp_path / "streamed")
    spilled = prune(llama, correcting(activation_budget=0), tmp_path / "spilled")
    model = AutoModelForCausalLM.from_pretrained(llama)
    in_memory = prune(model, correcting(), tokenizer=tokenizer())
    stored = tensors(tmp_path / "streamed")
    assert all(torch.equal(value, stored[name]) for name, value in tensors(tmp_path / "spilled").items())
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert untimed(in_memory)["rows"] == untimed(streamed)["rows"] == untimed(spilled)["rows"]


def test_errors_begin_where_weights_were_pruned(llama: Path, tmp_path: Path) -> None:
    """The first layer has none, unless its matrices are pruned in turn; the report and its page say how large."""
    report = prune(llama, correcting(), tmp_path / "at once")
    first = [row.correction for row in report.rows if ".layers.0." in row.name]
    assert first == [0.0] * 7
    assert all(row.correction and row.correction > 0 for row in report.rows if ".layers.0." not in row.name)
    in_turn = prune(llama, correcting(statistics={"sequential": True}), tmp_path / "in turn")
    zero = {row.name.rpartition(".")[2] for row in in_turn.rows if row.correction == 0}
    assert zero == {"q_proj", "k_proj", "v_proj"}
    assert [name for name, _ in fitting_facts(report)] == ["error correction"]
    assert fitting_facts(report)[0][1] in (tmp_path / "at once" / "report.html").read_text()


def test_without_alpha_nothing_is_compared(llama: Path, tmp_path: Path) -> None:
    report = prune(llama, correcting(0.0), tmp_path / "zero")
    assert {row.correction for row in report.rows} == {None}
    prune(llama, correcting(0.0, statistics={"alpha": 1e-9}), tmp_path / "tiny")
    stored = tensors(tmp_path / "tiny")
    assert all(torch.allclose(value, stored[name], atol=1e-5) for name, value in tensors(tmp_path / "zero").items())


def test_it_brings_outputs_nearer_to_the_dense_model(llama: Path, tmp_path: Path) -> None:
    text = {"samples": 64, "length": 24}
    found = {}
    for alpha in (0.0, 0.5):
        settings = correcting(alpha, calibration={"source": "self", **text}, evaluation={"prompts": [], **text})
        report = prune(llama, settings, tmp_path / str(alpha))
        found[alpha] = report.header["evaluation"]["kl_divergence"]
    assert found[0.5] < found[0.0]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in turn"])
def test_routed_experts_keep_their_weights_as_targets(family: str, sequential: bool, tmp_path: Path) -> None:
    """Their tokens are not the same in both models; attention and shared experts are corrected."""
    source = save(build(family, num_hidden_layers=3), tmp_path / "dense")
    report = prune(source, correcting(statistics={"sequential": sequential}), tmp_path / "out")
    routed = [row for row in report.rows if ".experts." in row.name]
    assert routed
    assert {row.correction for row in routed} == {None}
    others = [row for row in report.rows if ".experts." not in row.name and ".layers.0." not in row.name]
    assert others
    assert all(row.correction for row in others)
    assert all(row.zeros == row.shape[0] * row.shape[1] // 2 for row in report.rows)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_methods_without_a_gram_are_refused_and_told_what_to_do() -> None:
    with pytest.raises(RecipeError, match=r"wanda with statistics\.alpha: .*Gram matrix.*\(in method\)") as caught:
        load_recipe(correcting(method="wanda"))
    assert "[wanda, refit]" in caught.value.fix
    load_recipe(correcting(method=["wanda", "refit"]))
    rule = {"match": "*.mlp.*", "method": "magnitude"}
    with pytest.raises(RecipeError, match=r"magnitude with statistics\.alpha.*\(in rules\.0"):
        load_recipe(correcting(rules=[rule]))
    load_recipe(correcting(0.0, rules=[rule]))


def test_smaller_models_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"statistics\.alpha with structures: .*other sizes.*statistics\.alpha\)"):
        load_recipe(correcting(structures={"ffn": {"remove": 0.5}}))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, "half", float("nan")])
def test_alpha_is_a_part(alpha: Any) -> None:
    with pytest.raises(RecipeError, match=r"statistics\.alpha is"):
        load_recipe(correcting(alpha))
