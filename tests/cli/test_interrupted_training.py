"""What `recover` and `train` say after Ctrl-C: what is there, and the command that goes on from it."""

from pathlib import Path

import pytest

from llmprune.cli import launching
from llmprune.storage.folders import MANIFEST_NAME, STAGING_NAME


def test_a_folder_that_was_begun_is_continued(tmp_path: Path) -> None:
    words, output = ["recover", "my model"], str(tmp_path)
    assert launching.interrupted("text", words, output) == "interrupted (text); nothing was written"
    assert launching.interrupted("", words, None) == "interrupted; nothing was written"
    (tmp_path / STAGING_NAME).mkdir()
    (tmp_path / STAGING_NAME / MANIFEST_NAME).touch()
    assert launching.interrupted("loading", words, output, "from there ") == (
        "interrupted (loading); continue from there with --resume and the same options: "
        f"llmprune recover 'my model' --output {output} ... --resume"
    )


@pytest.mark.parametrize(
    ("here", "started"),
    [("4", "torchrun --nproc-per-node 4 -m llmprune"), ("2", "torchrun --nnodes 2 --nproc-per-node 2 -m llmprune")],
)
def test_torchrun_is_part_of_the_command(monkeypatch: pytest.MonkeyPatch, here: str, started: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert launching.again(["train", "model"]) == f"{started} train model"
