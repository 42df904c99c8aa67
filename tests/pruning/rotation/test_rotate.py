"""Rotated checkpoints: stock, with the same logits; interrupted, resumed, refused, and pruned by a recipe."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, marked, random_ids, recipe, save
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from llmprune import TextSpec, dry_run, prune, rotate
from llmprune.errors import CheckpointError, LlmpruneError, NumericsError, PatternError, RecipeError, ResumeError
from llmprune.progress import Progress
from llmprune.pruning import on_disk
from llmprune.pruning.rotation import check
from llmprune.pruning.rotation import rotate as rotating
from llmprune.pruning.rotation import terms as rotation_terms
from llmprune.pruning.rotation.plan import plan_rotation
from llmprune.pruning.rotation.report import load_rotation_report
from llmprune.pruning.rotation.rotate import lone_job, open_rotatable
from llmprune.pruning.rotation.terms import Terms
from llmprune.pruning.sensitivity import sensitivity
from llmprune.rotation.search import learn
from llmprune.storage.files import read_index
from llmprune.storage.folders import STAGING_NAME
from llmprune.stream.stream import Stream, StreamSettings

TEXT = TextSpec("self", samples=4, length=24)


def logits(folder: Path) -> Tensor:
    """Of the stock model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = model(random_ids(3, 20)).logits
    return found


def contents(folder: Path) -> dict[str, Tensor]:
    return {key: stored[...] for key, stored in read_index(folder).items()}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama"), tmp_path_factory.mktemp("dense") / "llama")


FAMILIES = ["llama", "mixtral", "qwen2", "qwen3", "gemma", "phi3", "deepseek_v3", "gpt_oss", "jetmoe"]


@pytest.mark.parametrize("family", marked(FAMILIES))
def test_the_stock_model_computes_the_same(family: str, tmp_path: Path) -> None:
    folder = save(build(family), tmp_path / "dense")
    report = rotate(folder, tmp_path / "rotated", {"kind": "random", "untie": True}, TEXT)
    torch.testing.assert_close(logits(tmp_path / "rotated"), logits(folder), rtol=1e-4, atol=1e-4)
    assert report.logits.relative < 1e-5
    assert report.logits.tokens == 4 * 24
    before, after = contents(folder), contents(tmp_path / "rotated")
    assert set(after) >= set(before)
    embeddings = next(key for key in before if "embed_tokens" in key)
    assert not torch.allclose(after[embeddings], before[embeddings], atol=0.01)
    assert {key: tensor.dtype for key, tensor in after.items() if key in before} == {
        key: tensor.dtype for key, tensor in before.items()
    }


def test_a_learned_rotation_lowers_the_loss(dense: Path, tmp_path: Path) -> None:
    report = rotate(dense, tmp_path / "one", {"steps": 4}, TEXT)
    assert report.loss is not None
    assert report.loss[1] < report.loss[0]
    assert report.best_step == 4
    assert report.rotated_values == 2
    assert load_rotation_report(tmp_path / "one") == report
    assert {path.name for path in (tmp_path / "one").iterdir() if path.name.startswith(".")} == {".llmprune.json"}
    rotate(dense, tmp_path / "two", {"steps": 4}, TEXT)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_sixteen_bits_are_rounded_once(tmp_path: Path) -> None:
    folder = save(build("llama", torch.bfloat16), tmp_path / "dense")
    report = rotate(folder, tmp_path / "rotated", {"kind": "hadamard"}, TEXT)
    assert {tensor.dtype for tensor in contents(tmp_path / "rotated").values()} == {torch.bfloat16}
    assert 1e-4 < report.logits.relative < report.logits.tolerance
    # Rotated back, every weight of a matrix is as near as one rounding of numbers of its size.
    before, after = (contents(path)["model.embed_tokens.weight"].float() for path in (folder, tmp_path / "rotated"))
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), rtol=4e-3, atol=0)


def test_an_interrupted_run_goes_on_with_the_same_rotation(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = rotate(dense, tmp_path / "whole", {"steps": 3}, TEXT)
    commit = rotating.OutputFolder.commit

    def stop(self: Any, layer: str, *args: Any) -> Path:
        if layer.endswith(".1"):
            raise KeyboardInterrupt
        return commit(self, layer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(rotating.OutputFolder, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            rotate(dense, tmp_path / "cut", {"steps": 3}, TEXT)
    monkeypatch.setattr(rotating, "learn", None)  # not searched again
    report = rotate(dense, tmp_path / "cut", {"steps": 3}, TEXT, resume=True)
    assert report.loss == wanted.loss
    whole, cut = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_a_result_with_other_logits_is_refused(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = rotating.random_rotation

    def skewed(*args: Any) -> Any:
        found = draw(*args)
        found.stream[0] *= 1.5
        return found

    monkeypatch.setattr(rotating, "random_rotation", skewed)
    with pytest.raises(NumericsError, match="logits of the rotated checkpoint differ"):
        rotate(dense, tmp_path / "rotated", {"kind": "random"}, TEXT)
    assert not (tmp_path / "rotated" / "config.json").exists()


def test_the_tolerance_is_that_of_the_least_precise_weights(dense: Path) -> None:
    source = check.CheckpointSource(dense)
    assert check.logit_tolerance(source) == 1e-3
    key, stored = next(iter(source.stored.items()))
    source.stored[key] = type(stored)(key, stored.file, stored.shape, torch.bfloat16, stored.span)
    assert check.logit_tolerance(source) == pytest.approx(0.0625)


@pytest.mark.parametrize(
    ("options", "message"), [({"stpes": 3}, "stpes"), ({"steps": 0}, "steps"), ({"kind": "best"}, "kind")]
)
def test_unknown_options(options: dict[str, Any], message: str, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        rotate(dense, tmp_path / "rotated", options, TEXT)


def test_a_packed_checkpoint_is_refused(dense: Path, tmp_path: Path) -> None:
    settings = recipe(pattern="2:4", method="magnitude", format="nm")
    prune(dense, settings, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="is packed, and a rotation would fill its zeros"):
        rotate(tmp_path / "packed", tmp_path / "rotated", None, TEXT)


def test_refusals_come_before_anything_is_written(tmp_path: Path) -> None:
    folder = save(build("llama-tied"), tmp_path / "dense")
    with pytest.raises(LlmpruneError, match="tied embeddings"):
        rotate(folder, tmp_path / "rotated", None, TEXT)
    with pytest.raises(LlmpruneError, match="tied embeddings"):
        prune(folder, recipe(rotation={"steps": 1}), tmp_path / "pruned")
    assert not (tmp_path / "rotated").exists()
    assert not (tmp_path / "pruned").exists()


def test_the_plan_is_what_is_written(tmp_path: Path) -> None:
    folder = save(build("llama-tied"), tmp_path / "dense")
    plan = plan_rotation(folder, {"steps": 2, "untie": True}, TEXT)
    report = rotate(folder, tmp_path / "rotated", {"steps": 2, "untie": True}, TEXT)
    assert plan.disk_bytes == sum(stored.nbytes for stored in read_index(tmp_path / "rotated").values())
    assert plan.untied_bytes == report.untied_bytes == 128 * 32 * 4
    assert (plan.rotated_values, plan.layers, plan.tokens) == (3, 3, 4 * 24)
    assert plan_rotation(folder, {"kind": "random", "untie": True}, TEXT).term_bytes == 0


@pytest.mark.parametrize(("family", "most"), [("llama", 1024), ("llama", 16), ("mixtral", 16)])
def test_the_planned_operations_are_a_lower_bound_of_a_steps(
    family: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by torch in the loss before the first step and its gradient; rotations of values are left out."""
    dense = save(build(family), tmp_path / "dense")
    monkeypatch.setattr(rotation_terms, "MOST_LINES", most)
    monkeypatch.setattr(rotation_terms, "_STRIP", 8)
    plan = plan_rotation(dense, {"steps": 1}, TEXT)
    job = lone_job({"steps": 1}, StreamSettings())
    found = open_rotatable(dense, job)
    terms = Terms(found.residual, Stream(found.source, random_ids(4, 24), job.settings), job.patterns, job.watch)
    with FlopCounterMode(display=False) as counter:
        learn(plan.hidden_size, found.residual.head_sizes, plan.layers, terms.loss, steps=0)
    assert plan.term_bytes == terms.nbytes
    assert 0.8 * counter.get_total_flops() < plan.step_operations <= counter.get_total_flops()
    assert plan.seconds > 0


def test_a_recipe_rotates_and_then_prunes(dense: Path, tmp_path: Path) -> None:
    settings = recipe(rotation={"steps": 3}, evaluation={"source": "self", "samples": 2, "length": 16})
    seen: list[Progress] = []
    report = prune(dense, settings, tmp_path / "pruned", watch=seen.append)
    shares = next(progress.shares for progress in seen if progress.shares is not None)
    # The time left is estimated for the search as well, in the order in which stages come.
    told = [stage for stage in dict.fromkeys(progress.stage for progress in seen) if stage in shares]
    assert {"statistics", "rotation", "pruning"} <= set(told)
    assert told == [stage for stage in shares if stage in told]
    assert report.header["rotation"]["loss"][1] < report.header["rotation"]["loss"][0]
    assert report.sparsity == pytest.approx(0.5)
    written = json.loads((tmp_path / "pruned" / "report.json").read_text("utf-8"))
    assert written["rotation"]["logits"]["relative"] < 1e-4
    assert not list((tmp_path / "pruned").glob(".rotated"))
    # The same as in two steps.
    first = recipe(evaluation=None)["calibration"]
    rotate(dense, tmp_path / "rotated", {"steps": 3}, TextSpec(**{**first, "samples": 7}))
    assert contents(tmp_path / "pruned").keys() == contents(tmp_path / "rotated").keys()


def test_an_interrupted_recipe_goes_on_with_the_same_rotation(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(rotation={"steps": 2}, method="magnitude")

    def stop(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(on_disk.LayerDriver, "drive", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(dense, settings, tmp_path / "out")
    monkeypatch.setattr(rotating, "learn", None)  # not searched again
    report = prune(dense, settings, tmp_path / "out", resume=True)
    assert report.sparsity == pytest.approx(0.5)
    assert report.header["rotation"]["loss"][1] < report.header["rotation"]["loss"][0]


def test_a_dry_run_of_a_recipe_counts_the_rotated_copy(dense: Path) -> None:
    settings = recipe(method="magnitude")
    plain, turned = dry_run(dense, settings), dry_run(dense, {**settings, "rotation": {}})
    assert turned.disk_bytes == 2 * plain.disk_bytes
    assert any("rotated copy" in note for note in turned.notes)
    assert turned.around.rotation > 0
    assert turned.total_seconds > turned.around.rotation
    assert turned.memory.peak >= turned.memory.rotation > 0


def test_a_model_in_memory_is_rotated_and_pruned(tmp_path: Path) -> None:
    model = build("llama-tied")
    prune(model, recipe(method="magnitude", rotation={"kind": "random", "untie": True}))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.model.norm.weight, torch.ones(32))
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == pytest.approx(0.5)


def test_an_optional_rotation_is_left_out_where_it_is_not_possible(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = save(build("llama-tied"), tmp_path / "tied")
    settings = recipe(method="magnitude", rotation={"steps": 1, "optional": True})
    plain = prune(tied, recipe(method="magnitude"), tmp_path / "plain")
    report = prune(tied, settings, tmp_path / "out")
    notes = [note for note in report.header["notes"] if note not in plain.header["notes"]]
    assert [note.partition(" has ")[0] for note in notes] == ["pruned without a rotation: LlamaForCausalLM"]
    assert "rotation" not in report.header
    one, two = contents(tmp_path / "plain"), contents(tmp_path / "out")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert set(notes) <= set(dry_run(tied, settings).notes)
    # Where it is possible, it is made; but not in a model that the caller holds.
    assert "rotation" in prune(dense, settings, tmp_path / "rotated").header
    model = build("llama")
    gain = model.model.norm.weight.clone()
    said: list[str] = []
    prune(model, settings, watch=lambda progress: said.append(progress.stage))
    assert "pruned without a rotation, which is optional: the model is in memory" in said
    assert torch.equal(model.model.norm.weight, gain)
    sensitivity(dense, tmp_path / "curves", settings, levels=[0.5], watch=lambda progress: said.append(progress.stage))
    assert "measured without the rotation of the recipe, which is optional" in said


def test_a_rotation_is_learned_for_what_the_recipe_prunes(dense: Path, tmp_path: Path) -> None:
    """The layers and matrices that stay dense are no part of the loss; a pattern that fits nothing is refused."""
    patterns: list[Any] = []

    class Listening(Terms):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            patterns.extend([str(kept.pattern) for kept in layer] for layer in self._layers)

    rules = [{"match": "*.mlp.*", "pattern": "0.25"}]
    settings = recipe(pattern="2:4", exclude=["*.layers.1.*"], rules=rules, rotation={"steps": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotating, "Terms", Listening)
        prune(dense, settings, tmp_path / "out")
    assert patterns[1] == []
    assert sorted(patterns[0]) == 3 * ["0.25/matrix"] + 4 * ["2:4"]
    with pytest.raises(PatternError, match="2:7 fits no matrix"):
        rotate(dense, tmp_path / "rotated", {"pattern": "2:7"}, TEXT)


def test_a_pruned_source_is_refused_before_any_text(dense: Path, tmp_path: Path) -> None:
    prune(dense, recipe(method="magnitude", pattern="0.2"), tmp_path / "pruned")
    for attempt in (
        lambda: rotate(tmp_path / "pruned", tmp_path / "out", {"kind": "random"}, TEXT),
        lambda: plan_rotation(tmp_path / "pruned", {"kind": "random"}, TEXT),
        lambda: prune(tmp_path / "pruned", recipe(rotation={"kind": "random"}), tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match=r"is pruned: 20\.\d% of .* fill its zeros") as caught:
            attempt()
        assert "rotate the checkpoint that it was pruned from" in caught.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["source", "rotation"])
def test_what_changes_between_layers_is_noticed(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(build("llama"), tmp_path / "dense")
    layer_tensors = rotating.Turned.layer_tensors

    def change(self: Any, index: int) -> Any:
        found = layer_tensors(self, index)
        if index == 1 and damage == "source":
            with (folder / "model.safetensors").open("r+b") as handle:
                handle.seek(-8, 2)
                handle.write(bytes(8))
        elif index == 1:
            (tmp_path / "out" / STAGING_NAME / rotating._KEPT).write_bytes(b"damaged")
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(rotating.Turned, "layer_tensors", change)
    if damage == "source":
        with pytest.raises(CheckpointError, match="has changed while it was read"):
            rotate(folder, tmp_path / "out", {"kind": "random"}, TEXT)
        assert not (tmp_path / "out" / "config.json").exists()
        return
    with pytest.raises(KeyboardInterrupt):
        rotate(folder, tmp_path / "out", {"kind": "random"}, TEXT)
    with pytest.raises(ResumeError, match="is damaged"):
        rotate(folder, tmp_path / "out", {"kind": "random"}, TEXT, resume=True)


def test_another_number_of_processes_goes_on_with_other_threads(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = StreamSettings(torch.device("cpu"))
    job = rotating.lone_job({"kind": "random", "untie": True}, settings)
    rotatable = rotating.open_rotatable(dense, job)
    tokens = rotating._text(rotatable.source, dense, TEXT, job)
    go_on = partial(rotating.rotate_checkpoint, "model", rotatable, tokens, tmp_path / "out", job, resume=True)
    device = "x86_64 CPU, {}"
    monkeypatch.setattr(rotating, "describe_device", lambda _: device.format("1 thread"))
    report = go_on(processes=2)
    monkeypatch.setattr(rotating, "describe_device", lambda _: device.format("2 threads"))
    assert go_on(processes=1) == report
    with pytest.raises(ResumeError, match="device was x86_64 CPU, 1 thread and is now x86_64 CPU, 2 threads"):
        go_on(processes=2)
