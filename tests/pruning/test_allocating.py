"""Allocations in whole runs: as many zeros as uniform, which is measured beside them; decisions are recorded."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build, random_ids, recipe, save

from llmprune import prune
from llmprune.errors import RecipeError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.source import ModelSource
from llmprune.pruning.allocating import allocate as allocating
from llmprune.pruning.allocating.allocate import allocate, warning
from llmprune.pruning.allocating.globs import glob_offsets
from llmprune.pruning.allocating.pool import find_pool
from llmprune.pruning.context import Run
from llmprune.pruning.jobs import plan_jobs
from llmprune.recipe.recipe import load_recipe

RULES: list[Any] = [
    "owl",
    "alpha",
    "dlp",
    "atp",
    "sensitivity",
    "search",
    {"search": {"generations": 2, "offspring": 3}},
    {"*.mlp.*": 0.6},
]
IDS = random_ids(12, 16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama", num_hidden_layers=3), tmp_path_factory.mktemp("models") / "llama")


def decided(folder: Path, allocation: Any, pattern: str = "0.5", method: str = "wanda", **more: Any) -> Any:
    settings = load_recipe({"pattern": pattern, "method": method, "allocation": allocation, "held_back": 2, **more})
    source = CheckpointSource(folder)
    run = Run.begin(settings)
    return source, settings, allocate(run, source, plan_jobs(source, settings), IDS)


def zeros(jobs: Any, source: Any) -> int:
    from llmprune.models.decoder import prunable_matrices

    shapes = {
        matrix.name: matrix.shape
        for index, layer in enumerate(source.layers)
        for matrix in prunable_matrices(layer, source.layer_name(index))
    }
    return sum(job.pattern.compared(job.method.scope).zeros(shapes[name]) for own in jobs for name, job in own.items())


@pytest.mark.parametrize("allocation", RULES, ids=str)
def test_every_rule_keeps_the_number_of_zeros(llama: Path, allocation: Any) -> None:
    source, settings, found = decided(llama, allocation)
    uniform, ours = plan_jobs(source, settings), plan_jobs(source, settings, found.choices)
    assert zeros(ours, source) == zeros(uniform, source) == found.record["zeros"]
    assert found.record["tokens"] == 2 * 16
    assert json.loads(json.dumps(found.record, allow_nan=False)) == found.record
    if allocation == "search":
        assert found.record["divergence"] <= found.record["uniform_divergence"]
        assert 12 <= len(found.record["evidence"]["tried"]) <= 20


@pytest.mark.parametrize("pattern", ["0.5/row", "0.6/matrix", "0.5@4x8", "0.5@4x8/row"])
def test_every_pattern_with_a_sparsity_is_exact(llama: Path, pattern: str) -> None:
    source, settings, found = decided(llama, {"dlp": {"spread": 0.3}}, pattern)
    ours = plan_jobs(source, settings, found.choices)
    assert zeros(ours, source) == zeros(plan_jobs(source, settings), source)
    assert len({job.pattern.sparsity for own in ours for job in own.values()}) > 1


def test_switches_start_from_the_best_of_the_search(llama: Path) -> None:
    _, _, found = decided(llama, {"search": {"generations": 2, "offspring": 3}})
    course = found.record["evidence"]["generations"]
    best = min(value for _, value in found.record["evidence"]["tried"])
    assert len(course) == 2
    assert best >= course[0] >= course[1] == found.record["divergence"]


def test_a_run_records_and_resumes_its_allocation(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = recipe(pattern=0.5, method="wanda", allocation={"owl": {"spread": 0.2}})
    report = prune(llama, settings, tmp_path / "out")
    record = report.header["allocation"]
    assert sum(row.zeros for row in report.rows) == record["zeros"]
    assert len({row.sparsity for row in report.rows}) > 1
    monkeypatch.setattr(allocating, "collect", None)
    shard = max((tmp_path / "out").glob("model-*.safetensors"))
    content = shard.read_bytes()
    shard.unlink()
    assert prune(llama, settings, tmp_path / "out", resume=True).header["allocation"] == record
    assert shard.read_bytes() == content


def test_a_model_in_memory_gets_the_same_allocation(llama: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = recipe(pattern=0.5, method="wanda", allocation="dlp", evaluation=None)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    in_memory = prune(model, settings, tokenizer=AutoTokenizer.from_pretrained(llama))
    assert any(not value.equal(before[name]) for name, value in model.state_dict().items())
    streamed = prune(llama, settings, tmp_path / "out")
    assert in_memory.header["allocation"] == streamed.header["allocation"]
    assert [row.zeros for row in in_memory.rows] == [row.zeros for row in streamed.rows]


def test_measuring_changes_no_weight(llama: Path) -> None:
    model = build("llama", num_hidden_layers=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source, settings = ModelSource(model), load_recipe({"pattern": 0.5, "method": "wanda", "allocation": "sensitivity"})
    allocate(Run.begin(settings), source, plan_jobs(source, settings), IDS)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_no_matrix_is_sparser_than_the_most(llama: Path) -> None:
    free = decided(llama, {"sensitivity": {"grid": 0.05}}, "0.5/matrix")[2].record["units"]
    held = decided(llama, {"sensitivity": {"grid": 0.05, "most": 0.6}}, "0.5/matrix")[2].record["units"]
    assert max(unit["sparsity"] for unit in free) > 0.65
    assert 0.55 < max(unit["sparsity"] for unit in held) < 0.61


def test_what_is_worse_is_said(llama: Path) -> None:
    source = CheckpointSource(llama)
    settings = load_recipe({"pattern": 0.5, "method": "wanda", "allocation": {"*.down_proj": 1.0}})
    seen: list[str] = []
    run = Run.begin(settings, lambda progress: seen.append(progress.stage))
    record = allocate(run, source, plan_jobs(source, settings), IDS).record
    assert record["worse"]
    assert record["divergence"] > record["uniform_divergence"]
    assert warning(record) in seen
    assert "worse than uniform" in warning(record)
    assert warning({**record, "worse": False}) == ""


def test_experts_of_a_layer_change_together() -> None:
    model = build("mixtral")
    source, settings = ModelSource(model), load_recipe({"pattern": "0.5/matrix", "method": "magnitude"})
    jobs = plan_jobs(source, settings)
    pool = find_pool(source, jobs)
    assert max(len(unit.places) for unit in pool.units) == 4
    assert len({(unit.layer, unit.kind) for unit in pool.units}) == len(pool.units)
    assert sum(len(unit.places) for unit in pool.units) == sum(map(len, jobs)) == len(pool.places)


def test_globs_set_what_they_match_and_the_others_make_up_for_it(llama: Path) -> None:
    source, settings, found = decided(llama, {"*.mlp.*": 0.625, "*.v_proj": 0.25}, "0.5/matrix")
    pool = find_pool(source, plan_jobs(source, settings))
    by_kind = {(unit["kind"].split(".")[-1]): unit["sparsity"] for unit in found.record["units"]}
    assert by_kind["up_proj"] == pytest.approx(0.625, abs=0.002)
    assert by_kind["v_proj"] == pytest.approx(0.25, abs=0.002)
    rest = {unit.size for unit in pool.units}
    assert rest
    assert by_kind["q_proj"] == pytest.approx(by_kind["o_proj"], abs=0.002)
    assert by_kind["q_proj"] < 0.5


@pytest.mark.parametrize(
    ("globs", "message"),
    [
        ({"*.nothing": 0.5}, "'\\*.nothing' matches none"),
        ({"*": 0.6}, "match every matrix"),
        ({"*.mlp.*": 1.0}, "the globs set"),
    ],
)
def test_globs_that_cannot_hold_are_refused(llama: Path, globs: dict[str, float], message: str) -> None:
    source = CheckpointSource(llama)
    pool = find_pool(source, plan_jobs(source, load_recipe({"pattern": 0.3, "method": "wanda"})))
    with pytest.raises(RecipeError, match=message):
        glob_offsets(pool, list(globs.items()))


def test_matrices_with_a_pattern_of_their_own_stay_as_they_are(llama: Path) -> None:
    rules = [{"match": "*.k_proj", "pattern": "2:4"}, {"match": "*.q_proj", "pattern": "dense"}]
    source, settings, found = decided(llama, {"dlp": {"spread": 0.3}}, rules=rules)
    assert not any("q_proj" in name or "k_proj" in name for name in found.choices)
    assert found.choices
    with pytest.raises(RecipeError, match="an allocation over 0 matrices"):
        decided(llama, "owl", rules=[{"match": "*", "pattern": "dense"}])
    del source, settings
