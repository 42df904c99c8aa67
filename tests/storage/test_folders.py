"""Folders that results go into: what of them is removed, and what counts as empty."""

from pathlib import Path

import pytest
from folders import contents

from llmprune.errors import CheckpointError, LlmpruneError, ResumeError
from llmprune.storage.exchange import remove_result
from llmprune.storage.folders import MANIFEST_NAME, STAGING_NAME, require_empty


def test_removing_leaves_folders_and_links_targets(tmp_path: Path) -> None:
    (tmp_path / "kept.safetensors").write_text("x")
    folder = tmp_path / "folder"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "config.json").write_text("x")
    (folder / "model.safetensors").symlink_to(tmp_path / "kept.safetensors")
    remove_result(folder)
    assert set(contents(tmp_path)) == {"kept.safetensors", "folder/tokenizer/config.json"}
    assert not (folder / "model.safetensors").exists()


def test_what_a_killed_start_leaves_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / STAGING_NAME).mkdir()
    (tmp_path / STAGING_NAME / f".{MANIFEST_NAME}.partial").write_text('{"for')
    for resume in (False, True):
        require_empty(tmp_path, resume=resume, overwrite=False)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ResumeError):
        require_empty(tmp_path, resume=False, overwrite=False)


def test_errors_are_one_family() -> None:
    assert issubclass(ResumeError, LlmpruneError)
    assert issubclass(CheckpointError, LlmpruneError)
