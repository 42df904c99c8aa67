"""Folders archived and extracted: every file comes back, interrupted runs go on, and nothing is overwritten."""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import contents
from packed_models import save_packed
from safetensors.torch import save_file
from tiny_models import build, save
from uneven_models import save_uneven

from llmprune import archive, extract
from llmprune.errors import CheckpointError, LlmpruneError, MissingPackageError, ResumeError
from llmprune.progress import Progress
from llmprune.storage.archives import contents as contents_of
from llmprune.storage.archives import records, writing
from llmprune.storage.files import read_index


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 kB, so that a tiny model has many."""
    monkeypatch.setattr(contents_of, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(contents_of, "_SMALL_BYTES", 256)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A 2:4 checkpoint with what may lie beside it."""
    folder = save_packed(tmp_path / "made") / "dense"
    for name in ("report.json", "notes.txt", ".llmprune.json", ".gitattributes"):
        (folder / name).write_text(name * 100)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (folder / "empty.txt").touch()
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_dense(folder: Path) -> Path:
    return save_packed(folder) / "dense"


def make_packed(folder: Path) -> Path:
    return save_packed(folder, "bitmask", "0.5") / "packed"


def make_shards(folder: Path) -> Path:
    return save(build("llama", torch.float16), folder / "shards", max_shard_size="40KB")


def make_uneven(folder: Path) -> Path:
    save_uneven(folder / "uneven")
    return folder / "uneven"


@pytest.mark.parametrize("make", [make_dense, make_packed, make_shards, make_uneven])
def test_every_file_comes_back(make: Callable[[Path], Path], tmp_path: Path, small_blocks: None) -> None:
    folder = make(tmp_path)
    before = contents(folder)
    report = archive(folder)
    assert report.archive == folder.with_name(f"{folder.name}.llmprune")
    extracted = extract(report.archive, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder) == before
    assert extracted.rows == report.rows
    assert {row.file: row.bytes for row in report.rows} == {name: len(content) for name, content in before.items()}
    assert report.coded_bytes < report.archive.stat().st_size
    assert sorted(tmp_path.rglob("*.partial")) == []


def test_what_lies_beside_the_weights_comes_too(dense: Path, tmp_path: Path) -> None:
    before = contents(dense)
    for name in (".git", ".cache"):
        (dense / name).mkdir()
        (dense / name / "object").write_text("x")
    (dense / "out.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "elsewhere.json").write_text("private")
    os.mkfifo(dense / "pipe")
    told: list[Progress] = []
    report = archive(dense, tmp_path / "a.llmprune", watch=told.append)
    extract(report.archive)
    assert contents(tmp_path / "a") == before
    said = [progress.stage for progress in told if "left out" in progress.stage]
    assert said == [
        ".cache was left out: it is a hidden folder", ".git was left out: it is a hidden folder",
        f"out.json was left out: it is a link that leads out of {dense}", "pipe was left out: it is not a file",
    ]  # fmt: skip


def test_folders_that_cannot_be_listed_are_refused(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (dense / "more").mkdir()
    (dense / "more" / "notes.txt").write_text("x")
    real = os.scandir

    def denied(path: str) -> object:
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(CheckpointError, match="more") as caught:
        archive(dense)
    assert "permissions" in str(caught.value.fix)
    assert list(dense.parent.glob("*.llmprune")) == []


def test_links_of_the_hub_cache_are_followed(dense: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in (path for path in dense.iterdir() if path.is_file()):
        shutil.copyfile(path, cache / "blobs" / path.name)
        (snapshot / path.name).symlink_to(cache / "blobs" / path.name)
    extract(archive(snapshot, tmp_path / "a.llmprune").archive)
    assert contents(tmp_path / "a") == contents(snapshot)


def test_sizes_are_those_of_the_archive(tmp_path: Path) -> None:
    folder = make_dense(tmp_path)
    shutil.rmtree(tmp_path / "packed")
    weight = torch.randn(512, 512)
    weight[weight.abs() < weight.abs().median()] = 0
    save_file({"w": weight.bfloat16()}, folder / "model.safetensors")
    report = archive(folder)
    assert report.dense_bytes == weight.numel() * 2
    assert 0.36 < report.weights_ratio < 0.385
    assert report.ratio == report.coded_bytes / report.bytes
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert repr(report).startswith(f"ArchiveReport({report.archive}, ")


def test_dense_bytes_are_those_without_packing(tmp_path: Path) -> None:
    made = save_packed(tmp_path)
    reports = [archive(made / name) for name in ("dense", "packed")]
    tensors = sum(stored.nbytes for stored in read_index(made / "dense").values())
    assert {report.dense_bytes for report in reports} == {tensors}
    assert {extract(report.archive, dry_run=True, output=tmp_path / "x").dense_bytes for report in reports} == {tensors}


def test_a_dry_run_writes_nothing(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = archive(dense, tmp_path / "a.llmprune")
    here = files(tmp_path)
    planned = archive(dense, tmp_path / "b.llmprune", dry_run=True)
    assert (planned.rows, planned.estimated) == (exact.rows, False)
    monkeypatch.setattr(writing, "_SAMPLED_BLOCKS", 3)
    guessed = archive(dense, tmp_path / "b.llmprune", dry_run=True)
    assert guessed.estimated
    assert [row.bytes for row in guessed.rows] == [row.bytes for row in exact.rows]
    assert extract(tmp_path / "a.llmprune", dry_run=True).rows == exact.rows
    assert files(tmp_path) == here


class Stopped(KeyboardInterrupt):
    """Ctrl-C."""


def stop_after(megabytes: int) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        if progress.unit == "MB" and progress.layer >= megabytes:
            raise Stopped

    return watch


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> dict[str, int]:
    """A megabyte is 4,096 bytes; counts how many blocks are coded and decoded."""
    counts = {"encode": 0, "decode": 0}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr("llmprune.storage.archives.counter._UNIT_BYTES", 4096)
    monkeypatch.setattr(writing, "encode", counting("encode", writing.encode))
    monkeypatch.setattr(records, "decode", counting("decode", records.decode))
    return counts


def test_an_interrupted_archive_goes_on(tmp_path: Path, counted: dict[str, int]) -> None:
    folder = make_shards(tmp_path)
    whole = archive(folder, tmp_path / "whole.llmprune")
    blocks = counted["encode"]
    assert blocks > 20
    counted["encode"] = 0
    with pytest.raises(Stopped):
        archive(folder, tmp_path / "a.llmprune", watch=stop_after(10))
    done = counted["encode"]
    assert 5 < done < blocks
    assert not (tmp_path / "a.llmprune").exists()
    assert archive(folder, tmp_path / "a.llmprune").rows == whole.rows
    # What was not yet on the disk is coded again.
    assert blocks <= counted["encode"] <= blocks + 1
    assert (tmp_path / "a.llmprune").read_bytes() == (tmp_path / "whole.llmprune").read_bytes()


@pytest.mark.parametrize("harm", ["file", "archive", "cut"])
def test_only_what_is_still_the_same_is_kept(tmp_path: Path, counted: dict[str, int], harm: str) -> None:
    folder = make_shards(tmp_path)
    with pytest.raises(Stopped):
        archive(folder, tmp_path / "a.llmprune", watch=stop_after(12))
    begun = tmp_path / ".a.llmprune.partial" / "content"
    written = begun.read_bytes()
    if harm == "file":
        (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    elif harm == "archive":
        begun.write_bytes(written[:9000] + bytes([written[9000] ^ 1]) + written[9001:])
    else:
        begun.write_bytes(written[:9000])
    extract(archive(folder, tmp_path / "a.llmprune").archive)
    assert contents(tmp_path / "a") == contents(folder)


def test_an_interrupted_extraction_goes_on(tmp_path: Path, counted: dict[str, int]) -> None:
    folder = make_shards(tmp_path)
    made = archive(folder, tmp_path / "a.llmprune").archive
    blocks = counted["encode"]
    with pytest.raises(Stopped):
        extract(made, watch=stop_after(12))
    assert not (tmp_path / "a").exists()
    with pytest.raises(Stopped):  # sooner than before: what is there stays
        extract(made, watch=stop_after(3))
    counted["decode"] = 0
    (tmp_path / ".a.partial" / "content" / "of-another-archive").write_text("x")
    extract(made)
    assert 0 < counted["decode"] < blocks - 8
    assert contents(tmp_path / "a") == contents(folder)
    assert sorted(tmp_path.glob("*.partial")) == []


def test_damage_of_what_was_extracted_is_repaired(tmp_path: Path, counted: dict[str, int]) -> None:
    folder = make_shards(tmp_path)
    made = archive(folder, tmp_path / "a.llmprune").archive
    with pytest.raises(Stopped):
        extract(made, watch=stop_after(12))
    for path in (tmp_path / ".a.partial" / "content").iterdir():
        path.write_bytes(b"x" + path.read_bytes()[1:] + b"longer")
    extract(made)
    assert contents(tmp_path / "a") == contents(folder)


def test_a_file_that_changes_meanwhile_is_noticed(dense: Path, tmp_path: Path) -> None:
    def change(progress: Progress) -> None:
        if progress.step == "config.json":
            (dense / "config.json").write_text("{}")

    with pytest.raises(CheckpointError, match=r"config.json has changed while it was read"):
        archive(dense, tmp_path / "a.llmprune", watch=change)
    assert not (tmp_path / "a.llmprune").exists()


def test_nothing_is_overwritten(dense: Path, tmp_path: Path) -> None:
    archive(dense, tmp_path / "a.llmprune")
    (tmp_path / "a").mkdir()
    before = contents(tmp_path)
    calls: list[Callable[[], Any]] = [
        lambda: archive(dense, tmp_path / "a.llmprune"),
        lambda: archive(dense, tmp_path / "a.llmprune", dry_run=True),
        lambda: archive(dense, dense / "inside.llmprune"),
        lambda: extract(tmp_path / "a.llmprune"),
    ]
    for call in calls:
        with pytest.raises(ResumeError) as caught:
            call()
        assert caught.value.fix
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: archive(folder / "none"), "no folder"),
        (lambda folder: archive(folder.parent), "has no config.json"),
        (lambda folder: extract(folder / "none.llmprune"), "cannot be read"),
        (lambda folder: extract(folder), "no folder to extract"),
        (lambda folder: extract(folder, folder.parent / "x"), "not a file"),
        (lambda folder: extract(folder / "config.json", folder.parent / "x"), "not an archive"),
        (lambda folder: extract(folder / "config.json"), "no folder to extract"),
    ],
)
def test_what_is_none_is_refused(dense: Path, call: Callable[[Path], Any], message: str) -> None:
    before = files(dense.parent)
    with pytest.raises(LlmpruneError, match=message) as caught:
        call(dense)
    assert caught.value.fix
    assert files(dense.parent) == before


def test_a_damaged_checkpoint_is_not_archived(dense: Path) -> None:
    (dense / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or corrupted"):
        archive(dense)


def test_names_that_are_no_text_are_refused(dense: Path) -> None:
    Path(os.fsdecode(bytes(dense) + b"/caf\xe9.txt")).touch()
    with pytest.raises(CheckpointError, match=r"is named 'caf\\udce9\.txt'"):
        archive(dense)


def test_a_full_disk_is_said_before_anything_is_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = archive(dense, tmp_path / "a.llmprune").archive
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match="are free under"):
        extract(made)
    assert files(tmp_path) == before


def test_without_zstd_the_package_is_named(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = "compression" if sys.version_info >= (3, 14) else "backports"
    monkeypatch.delattr(importlib.import_module(package), "zstd", raising=False)
    monkeypatch.setitem(sys.modules, f"{package}.zstd", None)
    for call in (archive, extract):
        with pytest.raises(MissingPackageError, match=rf"an archive needs .*{package}\.zstd"):
            call(dense)
