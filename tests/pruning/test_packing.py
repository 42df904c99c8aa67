import json
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import contents, same, tensor_bytes, tensors, unlisted
from packed_models import prune_files
from safetensors.torch import load_file, save_file
from tiny_models import build, random_ids, save
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmprune.errors import CheckpointError, FormatError, LlmpruneError, PatternError, ResumeError
from llmprune.progress import Progress
from llmprune.pruning import packing
from llmprune.pruning.packing import PackReport, PackRow, pack, unpack
from llmprune.storage import files, folders
from llmprune.storage.detection import detect_pattern
from llmprune.storage.files import Stored, read_json
from llmprune.storage.packed_config import NOTICE, NOTICE_KEY, QUANT_METHOD

SHARDED = {"max_shard_size": "40KB"}
# Large enough that blocks are not mistaken for whole rows or columns.
SIZES = {"hidden_size": 64, "intermediate_size": 96}
# One pattern for each kind of matrix; what is not named stays as it is.
MIXED = {"q_proj": "2:4", "o_proj": "0.5@16x16", "gate_proj": "0.6", "up_proj": "7:8", "down_proj": "0.05"}


def pruned(folder: Path, patterns: dict[str, str], family: str = "llama", **options: Any) -> Path:
    """A tiny model in bfloat16, saved and pruned."""
    sizes = SIZES if family == "llama" else {}
    save(build(family, torch.bfloat16, **sizes), folder, **options)
    prune_files(folder, patterns)
    return folder


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A 2:4 checkpoint in several shards, with what llmprune leaves beside it."""
    folder = pruned(tmp_path / "dense", {"proj": "2:4"}, **SHARDED)
    for name in ("report.json", "recipe.yaml", "README.md", ".llmprune.json", "notes.txt"):
        (folder / name).write_text(name)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def rows_by_name(report: PackReport) -> dict[str, PackRow]:
    assert len({row.matrix for row in report.rows}) == len(report.rows)
    return {row.matrix: row for row in report.rows}


@pytest.mark.parametrize("options", [{}, SHARDED], ids=["one file", "shards"])
@pytest.mark.parametrize(
    ("pattern", "format"),
    [("2:4", "auto"), ("2:4", "nm"), ("2:4", "bitmask"), ("0.5@16x16", "block"), ("0.6", "auto"), ("3:8", "auto")],
)
def test_unpacking_gives_every_file_back(tmp_path: Path, pattern: str, format: Any, options: dict[str, str]) -> None:
    folder = pruned(tmp_path / "dense", {"proj": pattern}, **options)
    before = contents(folder)
    report = pack(folder, tmp_path / "packed", format)
    assert {row.layout == "dense" for row in report.rows if "proj" in row.matrix} == {False}
    assert contents(folder) == before
    again = unpack(tmp_path / "packed", tmp_path / "again")
    assert unlisted(tmp_path / "again") == before
    packed = [row for row in report.rows if row.layout != "dense"]
    assert sorted(again.rows, key=lambda row: row.matrix) == sorted(packed, key=lambda row: row.matrix)


def test_two_of_four_takes_nine_sixteenths(dense: Path, tmp_path: Path) -> None:
    report = pack(dense, tmp_path / "packed")
    packed = [row for row in report.rows if row.layout == "nm"]
    assert len(packed) == 14
    assert all(row.packed_bytes == 0.5625 * row.dense_bytes for row in packed)
    assert report.ratio == 0.5625
    assert repr(report).startswith(f"PackReport({tmp_path / 'packed'}, 14 matrices packed, ")
    assert report.dense_bytes == sum(tensor.nbytes for key, tensor in tensors(dense).items() if "proj.weight" in key)
    sizes = tensor_bytes(dense), tensor_bytes(tmp_path / "packed")
    assert (report.dense_checkpoint_bytes, report.packed_checkpoint_bytes) == sizes
    again = unpack(tmp_path / "packed", tmp_path / "again")
    assert (again.ratio, again.dense_bytes, again.packed_bytes) == (0.5625, report.dense_bytes, report.packed_bytes)
    assert again.dense_checkpoint_bytes == report.dense_checkpoint_bytes
    assert again.packed_checkpoint_bytes == report.packed_checkpoint_bytes
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.to_dict()["matrices"][0].keys() == {"matrix", "layout", "dense_bytes", "packed_bytes", "reason"}


def test_the_packed_model_computes_the_same(dense: Path, tmp_path: Path) -> None:
    pack(dense, tmp_path / "packed")
    ids = random_ids(2, 12)
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, tmp_path / "packed"))
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)


def test_what_the_packed_folder_holds(dense: Path, tmp_path: Path) -> None:
    pack(dense, tmp_path / "packed")
    assert set(unlisted(tmp_path / "packed")) == set(unlisted(dense)) - {"notes.txt"}
    config, original = read_json(tmp_path / "packed" / "config.json"), read_json(dense / "config.json")
    record = config.pop("quantization_config")
    assert config.pop(NOTICE_KEY) == NOTICE
    assert config == original
    assert (record["quant_method"], record["version"], len(record["modules"])) == (QUANT_METHOD, 1, 14)
    assert record["modules"]["model.layers.1.mlp.down_proj"] == {
        "layout": "nm", "shape": [64, 96], "keep": 2, "of": 4,
    }  # fmt: skip
    index = read_json(tmp_path / "packed" / files.INDEX_NAME)
    assert index["metadata"]["total_size"] == tensor_bytes(tmp_path / "packed")
    stored = {key: file.name for file in (tmp_path / "packed").glob("*.safetensors") for key in load_file(file)}
    assert index["weight_map"] == stored
    assert "model.layers.1.mlp.down_proj.meta" in stored
    assert "model.layers.1.mlp.down_proj.weight" not in stored


def test_every_matrix_gets_the_layout_that_suits_it(tmp_path: Path) -> None:
    rows = rows_by_name(pack(pruned(tmp_path / "dense", MIXED), tmp_path / "packed", "auto"))
    found = {row.matrix.removeprefix("model.layers.0."): (row.layout, row.reason) for row in rows.values()}
    assert found["self_attn.q_proj.weight"] == ("nm", "")
    assert found["self_attn.k_proj.weight"] == ("dense", "not pruned")
    assert found["self_attn.o_proj.weight"] == ("block", "")
    assert found["mlp.gate_proj.weight"] == ("bitmask", "")
    # 7:8 would need 7/8 of the weights and 3 bits for each.
    assert found["mlp.up_proj.weight"] == ("bitmask", "")
    assert found["mlp.down_proj.weight"] == ("dense", "bitmask would not be smaller")
    assert found["model.embed_tokens.weight"] == ("dense", "outside the decoder layers")
    assert found["lm_head.weight"] == ("dense", "outside the decoder layers")
    assert all(row.dense_bytes == row.packed_bytes for row in rows.values() if row.layout == "dense")
    assert not any("norm" in name or "bias" in name for name in rows)


@pytest.mark.parametrize(
    ("format", "packed", "reason"),
    [
        ("nm", {"q_proj"}, "its zeros are 0.5@16x16"),
        ("block", {"o_proj"}, None),
        ("bitmask", {"q_proj", "o_proj", "gate_proj", "up_proj"}, None),
    ],
)
def test_a_format_leaves_other_patterns_dense(
    tmp_path: Path, format: Any, packed: set[str], reason: str | None
) -> None:
    rows = rows_by_name(pack(pruned(tmp_path / "dense", MIXED), tmp_path / "packed", format))
    assert {name.split(".")[-2] for name, row in rows.items() if row.layout != "dense"} == packed
    assert {row.layout for row in rows.values()} == {format, "dense"}
    if reason:
        assert rows["model.layers.1.self_attn.o_proj.weight"].reason == reason
    unpack(tmp_path / "packed", tmp_path / "again")
    assert unlisted(tmp_path / "again") == contents(tmp_path / "dense")


def test_two_of_four_is_found_behind_further_zeros(tmp_path: Path) -> None:
    folder = pruned(tmp_path / "dense", {"proj": "2:4"})
    prune_files(folder, {"proj": "0.75"})
    rows = rows_by_name(pack(folder, tmp_path / "packed", "nm"))
    assert rows["model.layers.0.mlp.up_proj.weight"].layout == "nm"
    assert rows["model.layers.0.mlp.up_proj.weight"].packed_bytes == 0.5625 * 96 * 64 * 2


def test_groups_are_found_beside_zero_rows(tmp_path: Path) -> None:
    folder = pruned(tmp_path / "dense", {"proj": "3:8"})
    file, key = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    content = load_file(file)
    content[key][:32] = 0
    save_file(content, file, metadata={"format": "pt"})
    assert detect_pattern(content[key]) == "3:8, 32 zero rows"
    pack(folder, tmp_path / "packed", "nm")
    record = read_json(tmp_path / "packed" / "config.json")["quantization_config"]["modules"]
    assert record["model.layers.0.mlp.up_proj"] == {"layout": "nm", "shape": [96, 64], "keep": 3, "of": 8}


def test_zeros_lose_their_sign(tmp_path: Path) -> None:
    folder = pruned(tmp_path / "dense", {"proj": "2:4"})
    positive = tensors(folder)
    prune_files(folder, {"proj": "2:4"}, zero=-0.0)
    negative = tensors(folder)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(negative, positive["model.layers.0.mlp.up_proj.weight"])
    assert not same(negative, positive["model.layers.0.mlp.up_proj.weight"])
    pack(folder, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert all(same(tensor, positive[key]) for key, tensor in tensors(tmp_path / "again").items())


@pytest.mark.parametrize(
    ("family", "matrix", "reason"),
    [
        ("gpt2", "c_fc", "not the weight of a single prunable Linear"),
        ("mixtral", "experts", "not the weight of a single prunable Linear"),
        (
            "gemma3-vision",
            "language_model.model.layers.0.mlp.up_proj",
            "stored under a different name than in",
        ),
    ],
)
def test_matrices_that_a_packed_linear_cannot_replace_stay_dense(
    tmp_path: Path, family: str, matrix: str, reason: str
) -> None:
    folder = pruned(tmp_path / "dense", {"layers": "2:4", "h.": "2:4"}, family)
    if family != "mixtral":
        with pytest.raises(PatternError, match=f"packed as auto: {reason}"):
            pack(folder, tmp_path / "packed")
        return
    rows = [row for row in pack(folder, tmp_path / "packed").rows if matrix in row.matrix]
    assert rows
    assert {(row.layout, row.reason) for row in rows} == {("dense", reason)}


@pytest.mark.parametrize(("pattern", "format"), [("2:4", "block"), ("0.5", "nm"), ("0", "auto"), ("0.02", "bitmask")])
def test_a_checkpoint_that_cannot_be_packed_is_refused_before_anything_is_written(
    tmp_path: Path, pattern: str, format: Any
) -> None:
    folder = pruned(tmp_path / "dense", {"proj": pattern})
    with pytest.raises(PatternError, match=f"no matrix of .* can be packed as {format}") as caught:
        pack(folder, tmp_path / "packed", format)
    assert caught.value.expected
    assert caught.value.fix
    assert not (tmp_path / "packed").exists()


# What the run is stopped at: a function of `packing`, and which of its calls.
STOPS = {"second shard": ("write_shard", 2), "index": ("write_json", 1), "companions": ("copy_companions", 1),
         "config": ("write_config", 1)}  # fmt: skip


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_an_interrupted_run_leaves_what_was_there(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str, direction: str
) -> None:
    source, target, run = dense, tmp_path / "target", pack
    if direction == "unpack":
        source, run = pack(dense, tmp_path / "packed").folder, unpack  # type: ignore[assignment]
    name, call = STOPS[stop]
    original, calls = getattr(packing, name), []

    def interrupted(*arguments: Any, **options: Any) -> object:
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(packing, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source, target)
    assert contents(target) == {}
    earlier = save(build("gpt2"), target)
    before = contents(earlier)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(source, target, overwrite=True)
    assert contents(target) == before
    monkeypatch.undo()
    for name in set(before) - {"model.safetensors", "config.json"}:
        (target / name).unlink()
    run(source, target, overwrite=True)
    assert set(unlisted(target)) == set(unlisted(source)) - {"notes.txt"}
    AutoModelForCausalLM.from_pretrained(target)


def test_one_shard_is_in_memory_at_a_time(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    read, write = Stored.__getitem__, packing.write_shard

    def noted_read(stored: Stored, index: object) -> Tensor:
        steps.append(f"read {stored.file.name}")
        return read(stored, index)

    def noted_write(file: Path, content: dict[str, Tensor]) -> str:
        steps.append(f"write {file.name}")
        return write(file, content)

    monkeypatch.setattr(Stored, "__getitem__", noted_read)
    monkeypatch.setattr(packing, "write_shard", noted_write)
    shards = sorted(file.name for file in dense.glob("*.safetensors"))
    expected = [f"{step} {shard}" for shard in shards for step in ("read", "write")]
    pack(dense, tmp_path / "packed")
    # The patterns are found first, from the same files.
    assert [step for step, _ in groupby(steps)][-len(expected) :] == expected
    steps.clear()
    unpack(tmp_path / "packed", tmp_path / "again")
    assert [step for step, _ in groupby(steps)] == expected


def test_progress_is_told(dense: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    pack(dense, tmp_path / "packed", watch=told.append)
    assert list(dict.fromkeys(progress.stage for progress in told)) == ["finding patterns", "packing"]
    shards = len(list(dense.glob("*.safetensors")))
    assert [progress.layer for progress in told if progress.stage == "packing"] == list(range(shards + 1))
    assert {progress.layers for progress in told if progress.stage == "packing"} == {shards}
    told.clear()
    unpack(tmp_path / "packed", tmp_path / "again", watch=told.append)
    assert {progress.stage for progress in told} == {"unpacking"}


def test_the_default_output_lies_beside_the_source(dense: Path) -> None:
    report = pack(dense)
    assert report.folder == dense.with_name("dense-packed")
    assert (report.folder / "config.json").exists()


def test_the_default_output_of_a_link_lies_beside_the_link(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latest").symlink_to(dense)
    assert pack(tmp_path / "latest").folder == tmp_path / "latest-packed"
    assert not dense.with_name("dense-packed").exists()
    monkeypatch.chdir(tmp_path / "latest")
    assert pack(".").folder.name == "dense-packed"


def test_what_cannot_be_packed_or_unpacked(dense: Path, tmp_path: Path) -> None:
    packed, new = tmp_path / "packed", tmp_path / "new"
    pack(dense, packed)
    (tmp_path / "empty").mkdir()
    (tmp_path / "weightless").mkdir()
    shutil.copy(dense / "config.json", tmp_path / "weightless")
    refusals: list[tuple[type[LlmpruneError], str, Callable[[], object]]] = [
        (CheckpointError, "no folder", lambda: pack(tmp_path / "absent", new)),
        (CheckpointError, "no folder", lambda: unpack(tmp_path / "absent", new)),
        (CheckpointError, "no config.json", lambda: pack(tmp_path / "empty", new)),
        (CheckpointError, "no weights", lambda: pack(tmp_path / "weightless", new)),
        (CheckpointError, "already packed", lambda: pack(packed, new)),
        (CheckpointError, "not packed", lambda: unpack(dense, new)),
        (ResumeError, "the model itself", lambda: pack(dense, dense)),
        (ResumeError, "the model itself", lambda: pack(dense, dense / ".." / "dense", overwrite=True)),
        (ResumeError, "the model itself", lambda: unpack(packed, packed, overwrite=True)),
        (ResumeError, "not empty", lambda: pack(dense, packed)),
        (ResumeError, "not empty", lambda: unpack(packed, dense)),
        (PatternError, "format 'csr'", lambda: pack(dense, new, "csr")),  # type: ignore[arg-type]
        (PatternError, "format 'dense'", lambda: pack(dense, new, "dense")),
    ]
    before = contents(tmp_path)
    for kind, message, run in refusals:
        with pytest.raises(kind, match=message):
            run()
    assert contents(tmp_path) == before
    assert not new.exists()


def test_a_folder_in_use_is_refused_at_once(dense: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    with folders.locked(tmp_path / "packed"), pytest.raises(ResumeError, match="another run"):
        pack(dense, tmp_path / "packed", watch=told.append)
    assert not told


def test_overwriting_replaces_the_checkpoint_and_nothing_else(dense: Path, tmp_path: Path) -> None:
    # transformers would read its single file before the new index.
    earlier = pack(pruned(tmp_path / "one file", {"proj": "0.6"}), tmp_path / "packed").folder
    (earlier / "mine.txt").write_text("mine")
    pack(dense, earlier, overwrite=True)
    pack(dense, tmp_path / "fresh")
    assert contents(earlier) == {**contents(tmp_path / "fresh"), "mine.txt": b"mine"}


def test_too_little_space_is_refused_before_anything_is_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = pack(dense, tmp_path / "packed")
    usage = shutil.disk_usage(tmp_path)
    free = [0]
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage._replace(free=free[0]))
    monkeypatch.setattr(folders, "_BESIDE_BYTES", 0)
    for run, needed in (
        (lambda folder: pack(dense, folder), report.packed_checkpoint_bytes),
        (lambda folder: unpack(tmp_path / "packed", folder), report.dense_checkpoint_bytes),
    ):
        free[0] = needed - 1
        with pytest.raises(CheckpointError, match="are free under"):
            run(tmp_path / "new")
        assert not (tmp_path / "new").exists()
        free[0] = needed
        run(tmp_path / "new")
        shutil.rmtree(tmp_path / "new")


@pytest.mark.parametrize("damage", ["index", "shape", "missing"])
def test_a_damaged_matrix_is_refused_by_name(dense: Path, tmp_path: Path, damage: str) -> None:
    packed = tmp_path / "packed"
    pack(dense, packed)
    key = "model.layers.1.mlp.down_proj.meta"
    file = next(file for file in packed.glob("*.safetensors") if key in load_file(file))
    content = load_file(file)
    if damage == "index":
        content[key][3, 2] = 0
    elif damage == "shape":
        content[key] = content[key][:-1].clone()
    else:
        del content[key]
    save_file(content, file, metadata={"format": "pt"})
    with pytest.raises((FormatError, CheckpointError), match=r"model\.layers\.1\.mlp\.down_proj") as caught:
        unpack(packed, tmp_path / "again")
    assert caught.value.expected
    assert not (tmp_path / "again" / "config.json").exists()
