"""Paths as users write them."""

from pathlib import Path

import pytest

from llmprune.errors import CheckpointError
from llmprune.paths import user_path

PACKAGE = Path(__file__).parents[1] / "llmprune"


def test_a_home_folder_is_filled_in_and_a_file_need_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/new/file", CheckpointError) == tmp_path / "new" / "file"
    assert user_path(Path("a"), CheckpointError) == Path("a")


@pytest.mark.parametrize("path", ["x" * 300, "/".join(["x" * 200] * 30), "a\0b", "loop", "loop/x"])
def test_what_no_file_can_be_called_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="not a path that this machine can have") as caught:
        user_path(path, CheckpointError, expected="a folder", fix="choose another")
    assert (caught.value.expected, caught.value.fix) == ("a folder", "choose another")
    assert len(caught.value.what) < 400


def test_an_unknown_home_folder_is_named() -> None:
    with pytest.raises(CheckpointError, match="~nobody-at-all/x starts with an unknown home folder"):
        user_path("~nobody-at-all/x", CheckpointError)


def test_there_is_one_place_that_fills_in_home_folders() -> None:
    found = {path.name for path in PACKAGE.rglob("*.py") if ".expanduser(" in path.read_text(encoding="utf-8")}
    assert found == {"paths.py"}
