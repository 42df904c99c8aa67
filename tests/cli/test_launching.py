"""One command in several processes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from tiny_models import build, save
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llmprune.cli import launching


def llmprune(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "llmprune", *words], capture_output=True, text=True, timeout=240, check=False
    )


def test_several_processes_say_each_thing_once(tmp_path: Path) -> None:
    source, output = save(build("llama"), tmp_path / "dense"), tmp_path / "out"
    texts = ["--set", "calibration={source: self, samples: 6, length: 16}", "--set", "evaluation=null"]
    options = ["--recipe", "wanda-50", "--set", "batch_size=1", "--output", str(output), "--json", "--device", "cpu"]
    done = llmprune("prune", str(source), *options, *texts, "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["sparsity"] == pytest.approx(0.5)
    assert done.stderr.count("writing the report") == 1


def test_what_is_wrong_is_said_once(tmp_path: Path) -> None:
    done = llmprune("prune", str(tmp_path / "gone"), "--output", str(tmp_path / "out"), "--processes=2", "--quiet")
    assert done.returncode == 1
    assert done.stderr.count("gone") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_torchrun_and_processes_are_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    launching.launch(1)
    with pytest.raises(typer.BadParameter, match="torchrun has started"):
        launching.launch(2)


def test_the_processes_get_the_same_command_without_their_number() -> None:
    words = ["prune", "m", "--processes", "2", "-o", "out", "--processes=3"]
    assert launching.without_number(words) == ["prune", "m", "-o", "out"]


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        (SignalException("Ctrl-C", signal.SIGINT), 130),
        (SignalException("the scheduler", signal.SIGTERM), 143),
        (ChildFailedError("llmprune", {1: ProcessFailure(1, 7, 1, "")}), 1),
        (ChildFailedError("llmprune", {1: ProcessFailure(1, 7, -9, "")}), 1),
        (None, 0),
    ],
    ids=["Ctrl-C", "terminated", "an error", "killed", "finished"],
)
def test_the_command_ends_as_its_processes_do(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ended: Exception | None, status: int
) -> None:
    def main(words: list[str]) -> None:
        assert words[:4] == ["--standalone", "--nproc-per-node=2", "-m", "llmprune"]
        if ended is not None:
            raise ended

    monkeypatch.setattr("torch.distributed.run.main", main)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(typer.Exit) as caught:
        launching.launch(2)
    assert caught.value.exit_code == status
    killed = isinstance(ended, ChildFailedError) and ended.get_first_failure()[1].exitcode < 0
    assert ("process 1 was ended by SIGKILL" in capfd.readouterr().err) == killed
