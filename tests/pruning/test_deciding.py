"""What is decided for single matrices holds for the run, is recorded, and is what a continued run goes by."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build, recipe, save

from llmprune import NM, Block, Unstructured, prune
from llmprune.errors import RecipeError
from llmprune.methods import METHODS
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.pruning import deciding
from llmprune.pruning.jobs import plan_jobs
from llmprune.recipe.recipe import load_recipe
from llmprune.structures.decisions import Decisions, MatrixChoice

UP, DOWN, QUERY = (f"model.layers.1.{name}" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"))
CHOICES = {
    UP: MatrixChoice(sparsity=0.75),
    DOWN: MatrixChoice(pattern=NM(2, 4), method=METHODS["sparsegpt"](damping=0.1)),
    QUERY: MatrixChoice(pattern=Block(0.5, (16, 16)), method=METHODS["magnitude"]()),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama"), tmp_path_factory.mktemp("models") / "llama")


def test_choices_come_before_the_recipe(llama: Path) -> None:
    jobs = plan_jobs(CheckpointSource(llama), load_recipe({"pattern": 0.5, "method": "wanda"}), CHOICES)[1]
    assert jobs[UP].pattern == Unstructured(0.75)
    assert jobs[UP].method_name == "wanda"
    assert (jobs[DOWN].pattern, jobs[DOWN].method) == (NM(2, 4), METHODS["sparsegpt"](damping=0.1))
    assert (str(jobs[QUERY].pattern), jobs[QUERY].method_name) == ("0.5@16x16", "magnitude")
    others = {(str(job.pattern), job.method_name) for name, job in jobs.items() if name not in CHOICES}
    assert others == {("0.5", "wanda")}


def test_what_stays_dense_is_not_chosen_for(llama: Path) -> None:
    settings = load_recipe({"pattern": 0.5, "method": "wanda", "exclude": [UP]})
    assert UP not in plan_jobs(CheckpointSource(llama), settings, CHOICES)[1]


def test_a_sparsity_needs_a_pattern_that_has_one(llama: Path) -> None:
    with pytest.raises(RecipeError, match=f"{UP}: sparsity 0.75 was chosen for the pattern 2:4"):
        plan_jobs(CheckpointSource(llama), load_recipe({"pattern": "2:4", "method": "wanda"}), CHOICES)


def test_decisions_survive_json() -> None:
    decisions = Decisions((0, 1), {1: {"ffn of x": 3}}, matrices=CHOICES)
    assert Decisions.from_dict(json.loads(json.dumps(decisions.to_dict()))) == decisions
    # Records of runs in which the recipe decides for all matrices stay as they were.
    assert "matrices" not in replace(decisions, matrices={}).to_dict()


def test_a_run_goes_by_its_record(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = recipe(pattern=0.5, method="wanda", structures={"depth": {"remove": 1}})
    decide, chosen = deciding.decide, {UP.replace("layers.1", "layers.0"): MatrixChoice(sparsity=0.75)}
    monkeypatch.setattr(deciding, "decide", lambda *given: replace(decide(*given), matrices=chosen))
    report = prune(llama, settings, tmp_path / "out")
    assert {row.name: row.sparsity for row in report.rows if row.sparsity != 0.5} == dict.fromkeys(chosen, 0.75)
    # Without its last shard the run is not complete, and nobody decides again.
    monkeypatch.setattr(deciding, "decide", None)
    shard = max((tmp_path / "out").glob("model-*.safetensors"))
    content = shard.read_bytes()
    shard.unlink()
    again = prune(llama, settings, tmp_path / "out", resume=True)
    assert shard.read_bytes() == content
    assert [row.zeros for row in again.rows] == [row.zeros for row in report.rows]
