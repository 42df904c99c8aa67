"""One command in several processes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from command_line import run
from tiny_models import build, save
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llmprune import torchrun
from llmprune.cli import launching, main, options
from llmprune.cli.options import explained
from llmprune.errors import RecipeError


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
    assert done.stderr.count("Error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [("prune",), ("prune", "testbed", "--gone"), ("gone",), ("prune", "testbed", "--recipe", "gone.yaml", "-o", "out")],
)
def test_the_first_process_is_waited_for_before_another_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    waited: list[str] = []
    monkeypatch.setattr(sys, "argv", ["llmprune", *words])
    for module in (torchrun, options):
        monkeypatch.setattr(module, "let_first_speak", lambda: waited.append(capfd.readouterr().err))
    ends = []
    for size in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(SystemExit) as ended:
            main()
        ends.append((ended.value.code, waited.copy()))
        assert capfd.readouterr().err
    (alone, none), (following, said_before) = ends
    assert following == alone
    assert (none, said_before) == ([], [""])


def test_torchrun_and_processes_are_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [launching.number(processes) for processes in (None, 1, 3)] == [1, 1, 3]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [launching.number(processes) for processes in (None, 1)] == [2, 2]
    with pytest.raises(typer.BadParameter, match="torchrun has started"):
        launching.number(3)


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--processes", "1000"), "1000 processes for 4 batches"),
        (("--processes", "2", "--set", "batch_size=32"), "2 processes for 1 batch: 32 calibration sequences"),
        (("--processes", "2", "--set", "statistics.token_weight=clip"), "clip in 2 processes"),
        (("--processes", "2", "--device", "cuda"), "0 CUDA devices are visible"),
        (("--processes", "2", "--recipe", "gone.yaml"), "gone.yaml"),
        (("--processes", "2", "--set", "report_to=mlflow"), "report_to: mlflow needs the package mlflow"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_a_process_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: tuple[str, ...], what: str, more: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("llmprune.pruning.tracking.find_spec", lambda name: None)
    monkeypatch.setattr(launching, "launch", lambda processes, as_json: pytest.fail("started"))
    done = run("prune", "testbed", "--output", tmp_path / "out", "--device", "cpu", *options, *more)
    assert done.exit_code == 1
    assert what in done.stderr
    assert "fix: " in done.stderr or "gone" in what
    assert not (tmp_path / "out").exists()


def test_one_of_several_processes_shows_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = run("prune", "testbed", "--dry-run")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_an_error_of_one_process_alone_is_shown_once_the_first_one_has_gone_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(typer.Exit), explained(as_json=False):
        raise RecipeError("no recipe on this machine")
    assert sum(waited) >= 10, "the first process has time to say the same, and torchrun to end this one"
    assert "no recipe on this machine" in capfd.readouterr().err


@pytest.mark.parametrize("words", [("pack", "gone"), ("perplexity", "gone", "--text", "gone"), ("recipes", "--json")])
def test_what_every_process_would_do_alike_is_refused_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"start `llmprune {words[0]}` without it" in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_bug_is_printed_as_json_beside_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(ZeroDivisionError), explained(as_json=True):
        raise ZeroDivisionError("no rows")
    found = json.loads(capfd.readouterr().out)["error"]
    assert (found["kind"], found["what"]) == ("ZeroDivisionError", "no rows")
    assert bool(waited) == (rank == "1")
    with pytest.raises(typer.BadParameter), explained(as_json=True):
        raise typer.BadParameter("no number")
    assert not capfd.readouterr().out


def test_the_processes_share_the_threads_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.run.main", lambda words: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    for given, threads in ((None, "3"), ("5", "5")):
        monkeypatch.setenv("OMP_NUM_THREADS", given or "")
        if given is None:
            monkeypatch.delenv("OMP_NUM_THREADS")
        with pytest.raises(typer.Exit):
            launching.launch(2, as_json=False)
        assert os.environ["OMP_NUM_THREADS"] == threads


def test_a_process_that_torchrun_has_left_behind_ends(tmp_path: Path) -> None:
    program = (
        "import time; from llmprune import torchrun; torchrun._INTERVAL_SECONDS = 0.01; "
        "torchrun.end_with_torchrun(); open('begun', 'w').close(); time.sleep(60); open('end', 'w').close()"
    )
    shell = f'{shlex.quote(sys.executable)} -c "{program}" & echo $!; while [ ! -e begun ]; do sleep 0.01; done'
    environment = {**os.environ, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    # The output is at its end once both the shell and the process it has left behind have closed it.
    done = subprocess.run(
        ["sh", "-c", shell], cwd=tmp_path, env=environment, capture_output=True, timeout=50, check=False
    )
    assert done.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def test_the_processes_get_the_same_command_without_their_number() -> None:
    words = ["prune", "m", "--processes", "2", "-o", "out", "--processes=3"]
    assert launching.without_number(words) == ["prune", "m", "-o", "out"]


def failed(*exits: tuple[int, int]) -> ChildFailedError:
    """What torchrun raises: rank and exit code of each process, in the order in which they have ended."""
    return ChildFailedError("llmprune", {rank: ProcessFailure(rank, 6, code, "") for rank, code in exits})


@pytest.mark.parametrize(
    ("ended", "status", "said"),
    [
        (SignalException("Ctrl-C", signal.SIGINT), 130, ""),
        (SignalException("the scheduler", signal.SIGTERM), 143, ""),
        (failed((1, 1)), 1, ""),
        (failed((0, 1), (1, -15)), 1, ""),
        (failed((1, -15), (0, 1)), 1, "process 1 was ended by SIGTERM"),
        (failed((0, 1), (1, -9)), 1, "process 1 was ended by SIGKILL, as the system does when memory runs out"),
        (None, 0, ""),
    ],
    ids=["Ctrl-C", "terminated", "an error", "an error, then torchrun", "one terminated", "killed", "finished"],
)
def test_the_command_ends_as_its_processes_do(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ended: Exception | None, status: int, said: str
) -> None:
    def main(words: list[str]) -> None:
        assert words[:4] == ["--standalone", "--nproc-per-node=2", "-m", "llmprune"]
        if ended is not None:
            raise ended

    monkeypatch.setattr("torch.distributed.run.main", main)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(typer.Exit) as caught:
        launching.launch(2, as_json=True)
    assert caught.value.exit_code == status
    printed = capfd.readouterr()
    assert said in printed.err
    assert (json.loads(printed.out)["error"]["what"] if printed.out else "") == said
    assert ("ended by SIGTERM; continue with --resume" in printed.err) == (status == 143)
