"""What is noticed when a checkpoint changes while it is read."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmprune.errors import CheckpointError
from llmprune.storage import source_watch
from llmprune.storage.source_watch import SourceWatch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(8)}, tmp_path / "model.safetensors")
    return tmp_path


def replaced(file: Path) -> None:
    save_file({"a": torch.zeros(8)}, file.with_name("new"))
    file.with_name("new").replace(file)


def in_place(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        handle.write(b"\0\0\0\0")


@pytest.mark.parametrize("change", [replaced, in_place, Path.unlink, lambda file: os.truncate(file, 50)])
def test_a_changed_file_is_named(folder: Path, change: Callable[[Path], None]) -> None:
    watch = SourceWatch(folder)
    watch.require_unchanged(thorough=True)
    change(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed while it was read"):
        watch.require_unchanged()


def test_so_is_a_changed_config(folder: Path) -> None:
    watch = SourceWatch(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json has changed"):
        watch.require_unchanged()


def test_new_times_and_the_same_content_are_no_change(folder: Path) -> None:
    watch = SourceWatch(folder)
    os.utime(folder / "model.safetensors", (1, 1))
    shutil.copyfile(folder / "model.safetensors", folder / "copy")
    (folder / "copy").replace(folder / "model.safetensors")
    watch.require_unchanged()


def test_a_change_that_no_time_shows_is_found_in_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_watch, "_look", lambda file: ())
    watch = SourceWatch(folder)
    in_place(folder / "model.safetensors")
    watch.require_unchanged()
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed"):
        watch.require_unchanged(thorough=True)
