"""State dicts of torch.save: what is read, what is refused with which advice, and that no code of a file runs."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from torch import nn

from llmprune.errors import CheckpointError
from llmprune.storage.state_dict import read_state_dict


class Command:
    """Runs a command of the system when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_read_as_they_were_saved(tmp_path: Path, zipped: bool) -> None:
    model = nn.Linear(3, 2).bfloat16()
    torch.save(model.state_dict(), tmp_path / "state.pt", _use_new_zipfile_serialization=zipped)
    found = read_state_dict(tmp_path / "state.pt")
    assert list(found) == ["weight", "bias"]
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_a_tied_tensor_is_read_once_and_equal_ones_are_not_tied(tmp_path: Path) -> None:
    shared = torch.ones(2, 3)
    state = {
        "a": shared,
        "b": shared,
        "view": shared[0],
        "other": torch.ones(2, 3),
        "none": torch.ones(0),
        "no": torch.ones(0),
    }
    torch.save(state, tmp_path / "state.pt")
    assert list(read_state_dict(tmp_path / "state.pt")) == ["a", "view", "other", "none", "no"]


def test_code_in_a_file_never_runs(tmp_path: Path) -> None:
    torch.save({"w": Command(f"touch {tmp_path / 'ran'}")}, tmp_path / "evil.pt")
    done = run("inspect", tmp_path / "evil.pt")
    assert done.exit_code == 1
    assert "has Python objects" in " ".join(done.stderr.split())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (nn.Linear(2, 2), r"Python objects \(torch\.nn\.modules\.linear\.Linear\).*whole model"),
        ({"model": {"w": torch.ones(2)}, "epoch": 3}, r"training with 'model', 'epoch'(.|\n)*\['model'\], 'state\.pt'"),
        ({"state_dict": {"w": torch.ones(2)}, "args": argparse.Namespace()}, r"argparse\.Namespace"),
        ({"w": torch.ones(2), "epoch": 3}, "'epoch' is a int"),
        ([torch.ones(2)], "but a list"),
        ({}, "it is empty"),
        ({1: torch.ones(2)}, "keys are not names"),
        ({"w": torch.eye(3).to_sparse()}, r"w in .*sparse_coo(.|\n)*to_dense"),
        ({"w": torch.empty(3, device="meta")}, "no values"),
    ],
)  # fmt: skip
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: object, said: str) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=said):
        read_state_dict(tmp_path / "file.pt")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.bin"
    torch.save(nn.Linear(30, 20).state_dict(), file)
    whole = file.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], bytes(range(256))):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_state_dict(file)
    with pytest.raises(CheckpointError, match="No such file"):
        read_state_dict(tmp_path / "absent.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, match="not a file"):
        read_state_dict(tmp_path / "pipe.pt")
