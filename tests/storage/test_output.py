"""The output folder: what is refused, what is replaced, what a full disk leaves, and what a finished one holds."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from folders import bits, contents, tensors, untimed, weights_and_texts
from safetensors.torch import load_file
from tiny_models import build, recipe, save
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmprune import load_recipe, prune
from llmprune.errors import CheckpointError, ResumeError
from llmprune.storage import files, folders
from llmprune.storage.companions import copy_companions
from llmprune.storage.exchange import remove_result
from llmprune.storage.folders import MANIFEST_NAME, STAGING_NAME, require_space
from llmprune.storage.report import load_report

# What a user may keep beside a checkpoint, under names that look like those of its parts.
MINE = (
    "notes.txt", "vocab_notes.md", "tokenizer_research", "LICENSE-mine", "my.model", "lora.safetensors", ".x.partial",
    "data/model.safetensors", "model-00009-of-00009.safetensors",
)  # fmt: skip
TEXTS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")

QUICK = {"method": "magnitude", "calibration": {"samples": 1, "length": 8}, "held_back": 0}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint with negative zeros and every kind of companion; no test may change it."""
    model = build("llama", torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::7] = -0.0
    folder = save(model, tmp_path_factory.mktemp("checkpoint") / "dense")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("# the dense model")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


class Finished(NamedTuple):
    folder: Path
    recipe: dict[str, Any]


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished") / "pruned"
    settings = dict(recipe(evaluation={"samples": 2}, description="a test"))
    prune(source, settings, folder)
    return Finished(folder, settings)


def test_a_finished_folder_holds_all_of_a_model(source: Path, finished: Finished) -> None:
    names = set(contents(finished.folder))
    shards = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    ours = {"README.md", "recipe.yaml", "report.json", "report.html", MANIFEST_NAME, "model.safetensors.index.json"}
    ours |= {"calibration.jsonl"}
    companions = {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja", "LICENSE",
    }  # fmt: skip
    assert names == shards | ours | companions
    for name in companions:
        assert (finished.folder / name).read_bytes() == (source / name).read_bytes()
    assert (finished.folder / "README.md").read_bytes() != (source / "README.md").read_bytes()


def test_files_are_readable_by_everyone(finished: Finished) -> None:
    umask = os.umask(0)
    os.umask(umask)
    modes = {file.name: file.stat().st_mode & 0o777 for file in finished.folder.rglob("*") if file.is_file()}
    assert modes == {name: 0o644 if name.endswith(".safetensors") else 0o666 & ~umask for name in modes}


def test_the_index_names_every_tensor_where_it_is(source: Path, finished: Finished) -> None:
    index = json.loads((finished.folder / "model.safetensors.index.json").read_text())
    where = {key: file.name for file in finished.folder.glob("*.safetensors") for key in load_file(file)}
    assert index["weight_map"] == where
    assert set(where) == set(tensors(source))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(finished.folder).values())


def test_every_layer_has_a_shard_of_its_own(finished: Finished) -> None:
    layers = [f"model.layers.{number}." for number in (0, 1)]
    for number, shard in enumerate(sorted(finished.folder.glob("*.safetensors"))):
        keys = list(load_file(shard))
        assert keys
        expected = [number - 1] if number else []
        assert all([key.startswith(layer) for layer in layers] == [i in expected for i in (0, 1)] for key in keys)


def test_a_finished_folder_loads_with_stock_transformers(source: Path, finished: Finished) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished.folder)
    stored = tensors(finished.folder)
    assert model.dtype == torch.bfloat16
    assert set(stored) == set(model.state_dict())
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    dense = AutoTokenizer.from_pretrained(source)
    pruned = AutoTokenizer.from_pretrained(finished.folder)
    assert pruned("w5 w9").input_ids == dense("w5 w9").input_ids
    assert GenerationConfig.from_pretrained(finished.folder) == GenerationConfig.from_pretrained(source)


def test_negative_zeros_are_never_written(source: Path, finished: Finished, tmp_path: Path) -> None:
    prune(AutoModelForCausalLM.from_pretrained(source), recipe(), tmp_path / "from-memory")
    for folder in (finished.folder, tmp_path / "from-memory"):
        for name, tensor in tensors(folder).items():
            assert not (bits(tensor) == torch.iinfo(torch.int16).min).any(), f"{folder}: {name}"
    assert any((bits(tensor) == torch.iinfo(torch.int16).min).any() for tensor in tensors(source).values())


def test_the_written_recipe_repeats_the_run(source: Path, finished: Finished, tmp_path: Path) -> None:
    written = finished.folder / "recipe.yaml"
    assert load_recipe(written) == load_recipe(finished.recipe)
    again = prune(source, written, tmp_path / "again")
    assert weights_and_texts(tmp_path / "again") == weights_and_texts(finished.folder)
    assert untimed(again) == untimed(load_report(finished.folder))


def test_a_model_in_memory_is_saved_whole(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    settings = recipe(evaluation={"samples": 1})
    report = prune(model, settings, tmp_path / "new" / "pruned")
    folder = tmp_path / "new" / "pruned"
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"pruned"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(contents(folder))
    assert load_recipe(folder / "recipe.yaml") == load_recipe(settings)
    assert load_report(folder) == report
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ResumeError, match="is not empty"):
        prune(model, settings, folder)


# --- what is refused


def test_a_folder_with_a_stranger_s_files_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResumeError, match="is not empty") as caught:
        prune(source, recipe(), tmp_path)
    assert caught.value.fix == "choose another folder"
    with pytest.raises(ResumeError, match="no llmprune run to resume"):
        prune(source, recipe(), tmp_path, resume=True)
    with pytest.raises(ResumeError, match="holds files but no checkpoint"):
        prune(source, recipe(), tmp_path, overwrite=True)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_folder_with_a_run_of_ours_is_refused_with_both_ways_on(source: Path, finished: Finished) -> None:
    before = contents(finished.folder)
    with pytest.raises(ResumeError, match="is not empty") as caught:
        prune(source, recipe(), finished.folder)
    assert "--resume" in caught.value.fix
    assert "--overwrite" in caught.value.fix
    with pytest.raises(ResumeError, match="contradict"):
        prune(source, recipe(), finished.folder, resume=True, overwrite=True)
    assert contents(finished.folder) == before


def test_overwrite_replaces_a_checkpoint_and_nothing_else(source: Path, tmp_path: Path) -> None:
    """The old checkpoint is another tool's: all but weights and config.json stays, if need be under another name."""
    folder = tmp_path / "pruned"
    save(build("gpt2"), folder)
    texts = {name: (folder / name).read_bytes() for name in TEXTS}
    keep = dict.fromkeys((*MINE, "README.md", "README.md.kept"), b"mine")
    (folder / "data").mkdir()
    for name, content in keep.items():
        (folder / name).write_bytes(content)
    del keep["README.md"]
    keep |= {"README.md.kept-2": b"mine", **{f"{name}.kept": content for name, content in texts.items()}}
    prune(source, recipe(**QUICK), folder, overwrite=True)
    prune(source, recipe(**QUICK), tmp_path / "fresh")
    assert set(contents(folder)) == set(contents(tmp_path / "fresh")) | set(keep)
    assert weights_and_texts(folder) == {**weights_and_texts(tmp_path / "fresh"), **keep}
    # What the next run replaces is what the manifest lists.
    prune(source, recipe(**QUICK), folder, overwrite=True)
    assert weights_and_texts(folder) == {**weights_and_texts(tmp_path / "fresh"), **keep}


def test_overwrite_of_a_run_removes_its_files_and_no_others(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    prune(source, recipe(**QUICK), folder)
    for name in MINE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"mine")
    plain = save(build("gpt2"), tmp_path / "gpt2")
    prune(plain, recipe(**QUICK), folder, overwrite=True)
    prune(plain, recipe(**QUICK), tmp_path / "fresh")
    assert weights_and_texts(folder) == {**weights_and_texts(tmp_path / "fresh"), **dict.fromkeys(MINE, b"mine")}


@pytest.mark.parametrize("name", ["../mine.txt", "/etc/hostname", "notes/../../mine.txt", 5, None])
def test_a_manifest_cannot_name_files_outside(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (folder / MANIFEST_NAME).write_text(json.dumps({"files": [name, "tokenizer.json"]}))
    (folder / "tokenizer.json").write_text("{}")
    remove_result(folder)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_overwrite_of_a_folder_by_a_model_in_memory_keeps_strangers(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    prune(source, recipe(**QUICK), folder)
    (folder / "notes.txt").write_text("mine")
    prune(AutoModelForCausalLM.from_pretrained(source), recipe(**QUICK), folder, overwrite=True)
    names = set(contents(folder))
    assert {"notes.txt", "model.safetensors"} <= names
    assert not names & {"model.safetensors.index.json", "model-00001-of-00003.safetensors", "chat_template.jinja.kept"}


def test_home_is_expanded(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    prune(source, recipe(**QUICK), "~/streamed")
    prune(AutoModelForCausalLM.from_pretrained(source), recipe(**QUICK), Path("~/in-memory"))
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"streamed", "in-memory"}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_home_that_is_not_known_is_a_typed_error(source: Path) -> None:
    with pytest.raises(ResumeError, match="~no-such-user/x starts with an unknown home folder"):
        prune(source, recipe(), "~no-such-user/x")


@pytest.mark.parametrize("way", ["plain", "relative", "link", "dotted"])
def test_the_source_is_never_the_output(
    source: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    (tmp_path / "link").symlink_to(source)
    dotted = source / "original" / ".."
    outputs = {"plain": source, "relative": Path(source.name), "link": tmp_path / "link", "dotted": dotted}
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ResumeError, match="is the model itself"):
            prune(source, recipe(), outputs[way], **options)


def test_a_model_in_memory_does_not_overwrite_its_own_folder(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(ResumeError, match="is the model itself"):
        prune(model, recipe(), source, overwrite=True)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize("inside", ["", "folder", "deep/folder"])
def test_an_output_in_a_file_s_place_is_refused(source: Path, tmp_path: Path, inside: str, options: Any) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ResumeError, match="file is a file"):
        prune(source, recipe(), tmp_path / "file" / inside, **options)
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests may run as root, whom no mode stops.
    monkeypatch.setattr(folders.os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="is not writable"):
        prune(source, recipe(), tmp_path / "pruned")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder in which nobody can make a folder")
def test_a_folder_that_cannot_be_made_is_a_typed_error(source: Path) -> None:
    for model in (source, AutoModelForCausalLM.from_pretrained(source)):
        with pytest.raises(CheckpointError, match="/proc"):
            prune(model, recipe(**QUICK), "/proc/pruned")


def test_a_full_disk_is_noticed_before_the_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"1\.0 kB are free under") as caught:
        prune(source, recipe(), tmp_path / "deep" / "pruned")
    assert str(tmp_path) in caught.value.what
    with pytest.raises(CheckpointError, match="are free"):
        prune(AutoModelForCausalLM.from_pretrained(source), recipe(), tmp_path / "deep" / "pruned")
    assert not (tmp_path / "deep").exists()


def test_only_what_a_resumed_run_has_written_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(900))
    (tmp_path / STAGING_NAME).mkdir()
    (tmp_path / STAGING_NAME / "model.safetensors").write_bytes(bytes(400))
    (tmp_path / STAGING_NAME / "training" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / STAGING_NAME / "training" / "checkpoint-5" / "optimizer.pt").write_bytes(bytes(200))
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: type("usage", (), {"free": 400}))
    monkeypatch.setattr(folders, "_BESIDE_BYTES", 300)
    require_space(tmp_path, 700, resume=True)
    with pytest.raises(CheckpointError, match=r"1\.0 kB are free(.|\n)*for the states, its"):
        require_space(tmp_path, 701, resume=True, purpose="the states")
    require_space(tmp_path, 100)
    with pytest.raises(CheckpointError, match="400 B are free"):
        require_space(tmp_path, 101)
    # A finished run has nothing to write.
    shutil.rmtree(tmp_path / STAGING_NAME)
    (tmp_path / MANIFEST_NAME).touch()
    require_space(tmp_path, 5000, resume=True)


# --- two runs at once


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_disk_that_fills_up_leaves_a_folder_to_resume(
    source: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int
) -> None:
    written: list[Path] = []
    save_file = files.save_file

    def half(content: Any, file: Path, **options: Any) -> None:
        save_file(content, file, **options)
        if len(written) == shard:
            os.truncate(file, file.stat().st_size // 2)
            raise full()
        written.append(file)

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        prune(source, finished.recipe, tmp_path)
    assert "--resume" in caught.value.fix
    assert not list(tmp_path.rglob(".*.partial"))
    assert len(list((tmp_path / STAGING_NAME).glob("*.safetensors"))) == shard
    monkeypatch.undo()
    prune(source, finished.recipe, tmp_path, resume=True)
    assert weights_and_texts(tmp_path) == weights_and_texts(finished.folder)


@pytest.mark.parametrize("function", ["publish", "copyfile"])
def test_small_files_that_do_not_fit_are_typed_errors(
    source: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise full()

    monkeypatch.setattr(*{"publish": (files, "publish"), "copyfile": (shutil, "copyfile")}[function], refuse)
    with pytest.raises(CheckpointError, match="No space left on device"):
        prune(source, finished.recipe, tmp_path)
    assert not list(tmp_path.rglob(".*.partial"))
    monkeypatch.undo()
    prune(source, finished.recipe, tmp_path, resume=True)
    assert weights_and_texts(tmp_path) == weights_and_texts(finished.folder)


def test_a_full_disk_leaves_nothing_of_a_model_in_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)

    def refuse(*arguments: object, **options: object) -> None:
        raise full()

    monkeypatch.setattr(type(model), "save_pretrained", refuse)
    with pytest.raises(CheckpointError, match="No space left on device"):
        prune(model, recipe(**QUICK), tmp_path / "pruned")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["pruned"]


# --- the parts


def test_copying_goes_no_deeper_than_it_must(source: Path, tmp_path: Path) -> None:
    copy_companions(source, tmp_path)
    assert not {"pytorch_model.bin", "model.safetensors", "README.md", "original/params.json"} & set(contents(tmp_path))
