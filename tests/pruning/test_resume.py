"""What resuming finds, mends and refuses."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import contents, tensors, untimed, weights_and_texts
from runs import LAYERS, Whole, assert_equal_to, note_solved, uninterrupted
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmprune import prune
from llmprune.errors import CheckpointError, ResumeError
from llmprune.progress import Progress
from llmprune.pruning import layers, on_disk
from llmprune.storage import manifest as manifests
from llmprune.storage import source_watch
from llmprune.storage.files import INDEX_NAME
from llmprune.storage.folders import MANIFEST_NAME, STAGING_NAME
from llmprune.storage.report import load_report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with uninterrupted(tmp_path_factory.mktemp("whole")) as run:
        yield run


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return note_solved(monkeypatch)


def interrupted(whole: Whole, folder: Path, layers: int) -> Path:
    """What a run leaves that was killed after this many layers."""
    new = folder / STAGING_NAME
    shutil.copytree(whole.folder, new)
    manifest = json.loads((new / MANIFEST_NAME).read_text())
    done = dict(list(manifest["layers"].items())[:layers])
    (new / MANIFEST_NAME).write_text(json.dumps({**manifest, "complete": False, "ends": {}, "layers": done}))
    kept = {MANIFEST_NAME, "recipe.yaml", *(layer["shard"] for layer in done.values())}
    for file in new.iterdir():
        if file.name not in kept:
            file.unlink()
    return folder


def test_a_finished_run_is_not_done_again(whole: Whole, solved: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(whole.folder)
    monkeypatch.setattr(on_disk.CheckpointSource, "load_layer", None)
    monkeypatch.setattr(on_disk.CheckpointSource, "load_ends", None)
    told = list[Progress]()
    report = prune(whole.source, whole.recipe, whole.folder, resume=True, watch=told.append)
    assert report == whole.report
    assert solved == []
    assert contents(whole.folder) == before
    assert told[-1].stage == "nothing to do: the run in this folder is finished"


def test_resume_begins_where_there_is_nothing(whole: Whole, tmp_path: Path) -> None:
    report = prune(whole.source, whole.recipe, tmp_path / "new", resume=True)
    assert_equal_to(whole, tmp_path / "new", report)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [flip, Path.unlink, lambda file: os.truncate(file, 100)], ids=["flip", "gone", "cut"]
)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_damaged_layer_is_done_again_and_so_is_what_follows(
    whole: Whole, solved: list[str], tmp_path: Path, layer: int, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "pruned"
    shutil.copytree(whole.folder, folder)
    damage(folder / f"model-0000{layer + 2}-of-00004.safetensors")
    report = prune(whole.source, whole.recipe, folder, resume=True)
    assert solved == [f"model.layers.{number}" for number in range(layer, LAYERS)]
    assert_equal_to(whole, folder, report)


@pytest.mark.parametrize("name", ["model-00001-of-00004.safetensors", INDEX_NAME, "config.json", "report.json"])
def test_what_is_missing_beside_the_layers_is_written_again(
    whole: Whole, solved: list[str], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "pruned"
    shutil.copytree(whole.folder, folder)
    (folder / name).unlink()
    report = prune(whole.source, whole.recipe, folder, resume=True)
    assert solved == []
    assert_equal_to(whole, folder, report)


def test_a_config_that_does_not_belong_to_the_weights_is_written_again(whole: Whole, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    shutil.copytree(whole.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 8}))
    assert_equal_to(whole, folder, prune(whole.source, whole.recipe, folder, resume=True))


def test_a_damaged_folder_does_not_load_while_it_is_mended(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pruned"
    shutil.copytree(whole.folder, folder)
    flip(folder / "model-00002-of-00004.safetensors")

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(layers, "solve_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        prune(whole.source, whole.recipe, folder, resume=True)
    assert not (folder / INDEX_NAME).exists()


def test_half_written_files_are_written_again(whole: Whole, tmp_path: Path) -> None:
    """A text file can be cut short as well, under its temporary name, and a copied one under its own.

    So can a shard, under the name that safetensors gives it until it is written.
    """
    folder = interrupted(whole, tmp_path / "pruned", LAYERS)
    new = folder / STAGING_NAME
    (new / ".tmpI9rmZY").write_bytes(bytes(10))
    for file in whole.folder.iterdir():
        (new / f".{file.name}.partial").write_bytes(file.read_bytes()[:5])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (new / name).write_bytes((whole.folder / name).read_bytes()[:5])
    report = prune(whole.source, whole.recipe, folder, resume=True)
    assert_equal_to(whole, folder, report)


# --- what resuming refuses


def change_weights(whole: Whole, folder: Path) -> Path:
    changed = folder / "dense"
    shutil.copytree(whole.source, changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].neg_()
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    return changed


@pytest.mark.parametrize("layers", [1, LAYERS])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": {"pattern": "2:4"}}, "recipe.pattern was 0.5 and is now 2:4"),
        ({"recipe": {"method": {"sparsegpt": {"damping": 0.02}}}}, "recipe.method.sparsegpt.damping was 0.01"),
        ({"recipe": {"exclude": ["*.o_proj"]}}, "recipe.exclude was"),
        ({"recipe": {"batch_size": 3}}, "recipe.batch_size was 2 and is now 3"),
        ({"text": "w9 "}, "tokens.calibration was"),
        ({"weights": True}, "source was"),
        ({"version": {"llmprune": "9"}}, "version.llmprune was .* and is now 9"),
        ({"device": "another"}, "device was .* and is now another"),
        ({"compute_dtype": "another"}, "compute_dtype was .* and is now another"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_changed_run_is_refused_by_name(
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layers: int,
    change: dict[str, Any],
    named: str,
) -> None:
    folder = interrupted(whole, tmp_path / "pruned", layers)
    before = contents(folder)
    settings, source = {**whole.recipe, **change.get("recipe", {})}, whole.source
    text = Path(whole.recipe["calibration"]["source"])
    original = text.read_text()
    if "weights" in change:
        source = change_weights(whole, tmp_path)
    if "version" in change:
        known = on_disk.versions()
        monkeypatch.setattr(on_disk, "versions", lambda: known | change["version"])
    if "device" in change:
        monkeypatch.setattr(on_disk, "describe_device", lambda device: change["device"])
    if "compute_dtype" in change:
        monkeypatch.setattr(on_disk, "dtype_name", lambda dtype: change["compute_dtype"])
    text.write_text(change.get("text", "") + original)
    try:
        with pytest.raises(ResumeError, match=f"cannot be resumed: {named}") as caught:
            prune(source, settings, folder, resume=True)
    finally:
        text.write_text(original)
    assert "--overwrite" in caught.value.fix
    assert contents(folder) == before


@pytest.mark.parametrize("change", [{"recipe": {"pattern": "2:4"}}, {"version": {"llmprune": "9"}}], ids=str)
def test_a_changed_run_is_refused_before_its_text_is_read(
    whole: Whole, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    known = on_disk.versions() | change.get("version", {})
    monkeypatch.setattr(on_disk, "versions", lambda: known)
    monkeypatch.setattr(on_disk.Run, "texts", None)
    with pytest.raises(ResumeError, match="cannot be resumed"):
        prune(whole.source, {**whole.recipe, **change.get("recipe", {})}, whole.folder, resume=True)


@pytest.mark.parametrize("layers", [1, None], ids=["interrupted", "finished"])
def test_another_evaluation_is_no_other_run(
    whole: Whole, solved: list[str], tmp_path: Path, layers: int | None
) -> None:
    folder = tmp_path / "pruned"
    if layers is None:
        shutil.copytree(whole.folder, folder)
    else:
        interrupted(whole, folder, layers)
    before, told = tensors(whole.folder), list[Progress]()
    settings = {**whole.recipe, "evaluation": {**whole.recipe["evaluation"], "samples": 2}}
    report = prune(whole.source, settings, folder, resume=True, watch=told.append)
    assert solved == [f"model.layers.{number}" for number in range(layers or LAYERS, LAYERS)]
    said = [progress.stage for progress in told if "evaluated again" in progress.stage]
    assert len(said) == 1
    assert "recipe.evaluation.samples was 1 and is now 2" in said[0]
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors(folder).items())
    again = prune(whole.source, settings, tmp_path / "at once")
    assert untimed(report) == untimed(load_report(folder)) == untimed(again)
    assert weights_and_texts(folder) == weights_and_texts(tmp_path / "at once")
    assert prune(whole.source, settings, folder, resume=True) == report


def test_an_evaluation_that_is_left_out_leaves_the_report(whole: Whole, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    shutil.copytree(whole.folder, folder)
    report = prune(whole.source, {**whole.recipe, "evaluation": None}, folder, resume=True)
    assert report.header["evaluation"] is None
    assert load_report(folder) == report
    assert "perplexity" not in (folder / "README.md").read_text()


def test_a_source_that_changes_during_a_run_is_noticed_and_what_came_before_is_kept(
    whole: Whole, solved: list[str], tmp_path: Path
) -> None:
    source, folder = tmp_path / "dense", tmp_path / "pruned"
    shutil.copytree(whole.source, source)
    weights = (source / "model.safetensors").read_bytes()

    def change(progress: Progress) -> None:
        if progress.stage == "pruning" and progress.layer == 1 and progress.step == "statistics":
            (source / "model.safetensors").write_bytes(weights[:-2000] + bytes(2000))

    with pytest.raises(CheckpointError, match=r"dense/model\.safetensors has changed while it was read"):
        prune(source, whole.recipe, folder, watch=change)
    assert not (folder / INDEX_NAME).exists()
    with pytest.raises(ResumeError, match="source was"):
        prune(source, whole.recipe, folder, resume=True)
    (source / "model.safetensors").write_bytes(weights)
    solved.clear()
    prune(source, whole.recipe, folder, resume=True)
    assert solved == ["model.layers.1", "model.layers.2"]
    assert all(torch.equal(tensor, tensors(whole.folder)[key]) for key, tensor in tensors(folder).items())


def test_a_change_that_is_seen_only_at_the_end_leaves_nothing_to_resume(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = tmp_path / "dense", tmp_path / "pruned"
    shutil.copytree(whole.source, source)
    shutil.copytree(whole.folder, folder)
    before = contents(folder)
    monkeypatch.setattr(source_watch, "_look", lambda file: ())
    weights = (source / "model.safetensors").read_bytes()

    def change(progress: Progress) -> None:
        (source / "model.safetensors").write_bytes(weights[:-2000] + bytes(2000))

    with pytest.raises(CheckpointError, match="has changed while it was read"):
        prune(source, whole.recipe, folder, overwrite=True, watch=change)
    assert contents(folder) == before


def test_every_difference_is_named_within_a_key(whole: Whole, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "pruned", 1)
    with pytest.raises(ResumeError, match=r"recipe\.pattern was .*; recipe\.held_back was 1 and is now 2"):
        prune(whole.source, {**whole.recipe, "pattern": 0.6, "held_back": 2}, folder, resume=True)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("/a/long/path/that/both/of/them/share/to/A/text.jsonl", "/a/long/path/that/both/of/them/share/to/B/c.txt",
         "was …/share/to/A/text.jsonl and is now …/share/to/B/c.txt"),
        ("ab", "abc", "was ab and is now abc"),
        ("x" * 60, "x" * 60 + "y", "was …" + "x" * 10 + " and is now …" + "x" * 10 + "y"),
        ("A" + "x" * 60, "B", f"was A{'x' * 39}… and is now B"),
        ("x" * 60 + "A" + "y" * 60, "short", "was " + "x" * 40 + "… and is now short"),
    ],
)  # fmt: skip
def test_a_difference_is_shown_where_it_is(before: str, now: str, said: str) -> None:
    assert manifests._difference("source", before, now) == f"source {said}"


def test_another_description_is_no_other_run(whole: Whole, solved: list[str], tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "pruned", 2)
    prune(whole.source, {**whole.recipe, "description": "in other words"}, folder, resume=True)
    assert solved == ["model.layers.2"]
    assert tensors(folder).keys() == tensors(whole.folder).keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "has format None"),
        ('{"format": 99}', "has format 99"),
    ],
)
def test_a_damaged_record_is_a_typed_error(whole: Whole, tmp_path: Path, text: str, message: str) -> None:
    folder = interrupted(whole, tmp_path / "pruned", 1)
    (folder / STAGING_NAME / MANIFEST_NAME).write_text(text)
    with pytest.raises(ResumeError, match=message) as caught:
        prune(whole.source, whole.recipe, folder, resume=True)
    assert "--overwrite" in caught.value.fix


def test_a_model_in_memory_cannot_be_resumed(whole: Whole, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="in memory"):
        prune(AutoModelForCausalLM.from_pretrained(whole.source), whole.recipe, tmp_path, resume=True)


def test_the_manifest_is_read_by_its_format(whole: Whole) -> None:
    manifest = json.loads((whole.folder / MANIFEST_NAME).read_text())
    assert set(manifest) == {
        "format",
        "keys",
        "complete",
        "ends",
        "described",
        "decisions",
        "layers",
        "files",
        "processes",
        "notes",
    }
    assert list(manifest["keys"]) == ["recipe", "tokens", "source", "version", "device", "compute_dtype"]
    assert manifests.MANIFEST_NAME == ".llmprune.json"


@pytest.mark.parametrize("finished", [False, True])
def test_another_number_of_processes_may_have_another_number_of_threads(
    whole: Whole, tmp_path: Path, solved: list[str], monkeypatch: pytest.MonkeyPatch, *, finished: bool
) -> None:
    folder = tmp_path / "run"
    manifest = shutil.copytree(whole.folder, folder) / MANIFEST_NAME if finished else None
    manifest = manifest or interrupted(whole, folder, 2) / STAGING_NAME / MANIFEST_NAME
    begun = json.loads(manifest.read_text())
    begun["keys"]["device"] = re.sub(r"\d+ threads?$", "77 threads", begun["keys"]["device"])
    told = list[Progress]()
    for processes, device in ((1, ""), (2, " of another kind")):
        keys = {**begun["keys"], "device": begun["keys"]["device"].replace(" CPU", f" CPU{device}")}
        manifest.write_text(json.dumps({**begun, "keys": keys, "processes": processes}))
        with pytest.raises(ResumeError, match="device was"):
            prune(whole.source, whole.recipe, folder, resume=True)
    manifest.write_text(json.dumps({**begun, "processes": 2}))
    monkeypatch.setattr(on_disk, "_evaluate_again", None)
    prune(whole.source, whole.recipe, folder, resume=True, watch=told.append)
    assert any("continued with 1: what is left may differ" in step.stage for step in told) == (not finished)
    assert len(load_report(folder).notes) == (not finished)
    assert bool(solved) == (not finished)
