"""A run that is killed at any moment and resumed gives the same bytes as one that was left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import contents, tensors
from runs import Whole, assert_equal_to, assert_incomplete_or_whole, note_solved, uninterrupted
from tiny_models import build, recipe, save

from llmprune import prune
from llmprune.pruning import layers
from llmprune.storage import files
from llmprune.storage.files import INDEX_NAME
from llmprune.storage.folders import MANIFEST_NAME, STAGING_NAME
from llmprune.storage.report import load_report
from llmprune.stream.resident import ResidentLayer

pytestmark = pytest.mark.slow
# Instead of a number: the kill comes from outside, at a moment that no hook sees.
WHILE_WRITING = 0
# Runs are killed at every step of the first layer and of the last; each more would take as long again.
LAYERS = 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    # Measuring takes long, and writes nothing.
    with uninterrupted(tmp_path_factory.mktemp("whole"), LAYERS, evaluated=False) as run:
        yield run


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return note_solved(monkeypatch)


class KillAt:
    """Ends the process by SIGKILL right before the n-th change below a folder; also in the middle of shards."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.left = str(folder), number

    def watch(self) -> None:

        save_file = files.save_file

        def in_two_halves(content: Any, file: Path, **options: Any) -> None:
            save_file(content, file, **options)
            data = file.read_bytes()
            os.truncate(file, len(data) // 2)
            file.write_bytes(data)

        files.save_file = in_two_halves
        sys.addaudithook(self.step)

    def step(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not arguments or not str(arguments[0]).startswith(self.folder):
            return
        reads = event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod", "os.truncate") and not reads:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run one job a line of stdin in a fork of its own; answers with how it ended. Jobs are JSON."""
    build("llama")  # so that the forks need not import its modules
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            run_job(job)
        if job["kill_at"] == WHILE_WRITING:
            kill_while_writing(child, Path(job["output"]) / STAGING_NAME)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def kill_while_writing(child: int, folder: Path) -> None:
    """End the child by SIGKILL as soon as the file exists that safetensors itself writes a shard into."""
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if folder.is_dir() and any(name.startswith(".tmp") for name in os.listdir(folder)):  # noqa: PTH208 - faster
            os.kill(child, signal.SIGKILL)
            return


def run_job(job: dict[str, Any]) -> None:
    solve_layer = layers.solve_layer

    def note(layer: ResidentLayer, *arguments: Any) -> Any:
        rows = solve_layer(layer, *arguments)
        with Path(job["solved"]).open("a") as log:
            log.write(f"{layer.name}\n")
        return rows

    layers.solve_layer = note
    if job["kill_at"] != WHILE_WRITING:
        KillAt(job["output"], job["kill_at"]).watch()
    prune(job["source"], job["recipe"], job["output"], resume=job["resume"], overwrite=job["overwrite"])
    os._exit(0)


class Runner:
    """Hands jobs to the process in which `main` runs."""

    def __init__(self, whole: Whole, process: "subprocess.Popen[str]") -> None:
        assert process.stdin
        assert process.stdout
        self.whole, self.jobs, self.answers = whole, process.stdin, process.stdout

    def __call__(
        self,
        output: Path,
        kill_at: int,
        *,
        resume: bool = False,
        overwrite: bool = False,
        source: Path | None = None,
        settings: dict[str, Any] | None = None,
    ) -> tuple[int, list[str]]:
        """How a run ended (-9: killed), and the layers that it solved."""
        log = output.with_name(f"{output.name}.solved")
        log.write_text("")
        job = {
            "source": str(source or self.whole.source),
            "recipe": settings or self.whole.recipe,
            "resume": resume,
            "solved": str(log),
        }
        job["overwrite"] = overwrite
        self.jobs.write(json.dumps({**job, "output": str(output), "kill_at": kill_at}) + "\n")
        self.jobs.flush()
        return int(self.answers.readline()), log.read_text().split()


@pytest.fixture(scope="module")
def runner(whole: Whole) -> Iterator[Runner]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    start = [sys.executable, "-c", "import test_killed; test_killed.main()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(start, env=environment, **pipes) as process:
        yield Runner(whole, process)
    assert process.returncode == 0


def state(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes; the size of what holds times varies from run to run."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    timed = (MANIFEST_NAME, "report.json", "report.html")
    return [
        (str(file.relative_to(folder)), 0 if any(name in file.name for name in timed) else file.stat().st_size)
        for file in files
    ]


def test_killed_before_every_third_change_and_resumed(
    whole: Whole, runner: Runner, solved: list[str], tmp_path: Path
) -> None:
    lost: set[int] = set()
    committed_at: set[int] = set()
    seen: list[tuple[str, int]] = []
    for kill_at in range(1, 200, 3):  # an odd number: torn and whole files take turns
        folder = tmp_path / str(kill_at) / "pruned"
        folder.parent.mkdir()
        ended, solved_before = runner(folder, kill_at)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        if seen == (seen := state(folder)):
            continue
        places = (folder, folder / STAGING_NAME)
        manifest = next((place / MANIFEST_NAME for place in places if (place / MANIFEST_NAME).exists()), folder)
        committed = len(json.loads(manifest.read_text())["layers"]) if manifest.is_file() else 0
        assert_incomplete_or_whole(whole, folder)
        solved.clear()
        report = prune(whole.source, whole.recipe, folder, resume=True)
        assert_equal_to(whole, folder, report)
        assert solved == [f"model.layers.{number}" for number in range(committed, LAYERS)]
        lost.add(len(solved_before) - committed)
        committed_at.add(committed)
    # Every shard and every other file was interrupted, and no kill cost more than one layer.
    assert kill_at > 3 * len(contents(whole.folder))
    assert lost == {0, 1}
    assert committed_at == set(range(LAYERS + 1))


def test_killed_while_it_replaces_a_checkpoint(whole: Whole, runner: Runner, tmp_path: Path) -> None:
    """At every moment the old checkpoint is whole, or the new one is or can be resumed."""
    old = save(build("gpt2"), tmp_path / "old")
    old_recipe = dict(recipe(method="magnitude", evaluation=None, held_back=0))
    prune(old, old_recipe, tmp_path / "earlier")
    before, ways = contents(tmp_path / "earlier"), set()
    seen: list[tuple[str, int]] = []
    # From shortly before the exchange on, before every other change: until then, the old files are not touched.
    for kill_at in range(46, 300, 2):
        folder = tmp_path / str(kill_at) / "pruned"
        shutil.copytree(tmp_path / "earlier", folder)
        ended, _ = runner(folder, kill_at, overwrite=True)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        if seen == (seen := state(folder)):
            continue
        now = contents(folder)
        if (folder / INDEX_NAME).exists() and (folder / INDEX_NAME).read_bytes() == before[INDEX_NAME]:
            assert {name: now[name] for name in before} == before
            ways.add("old")
        else:
            assert_incomplete_or_whole(whole, folder)
            ways.add("new" if (folder / INDEX_NAME).exists() else "between")
        assert_equal_to(whole, folder, prune(whole.source, whole.recipe, folder, resume=True))
    assert ended == 0
    assert_equal_to(whole, folder, load_report(folder))
    assert ways == {"old", "between", "new"}


def test_killed_again_and_again(whole: Whole, runner: Runner, tmp_path: Path) -> None:
    folder, total, kills = tmp_path / "pruned", 0, 0
    for kill_at in range(12, 80, 2):
        ended, solved_now = runner(folder, kill_at, resume=True)
        total += len(solved_now)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        kills += 1
        assert_incomplete_or_whole(whole, folder)
    assert_equal_to(whole, folder, load_report(folder))
    assert kills >= LAYERS
    assert total <= LAYERS + kills


# --- what resuming finds


@pytest.mark.parametrize("after", ["resume", "overwrite"])
def test_killed_inside_of_the_library_that_writes(whole: Whole, runner: Runner, tmp_path: Path, after: str) -> None:
    """A shard of 25 MB takes long enough for a kill in the middle of it; its file has a name that is not ours."""
    folder, wide = tmp_path / "pruned", build("llama", torch.bfloat16, hidden_size=256, intermediate_size=16384)
    source, settings = save(wide, tmp_path / "dense"), {**whole.recipe, "method": "magnitude", "evaluation": None}
    for _ in range(5):
        ended, _ = runner(folder, WHILE_WRITING, source=source, settings=settings)
        left = [file.name for file in folder.rglob(".tmp*")]
        if left:
            break
        shutil.rmtree(folder, ignore_errors=True)  # the kill came just after the file was renamed
    assert ended == -signal.SIGKILL
    assert len(left) == 1
    prune(source, settings, folder, resume=after == "resume", overwrite=after == "overwrite")
    assert [file.name for file in folder.rglob("*") if file.name.startswith(".") and file.name != MANIFEST_NAME] == []
    assert set(tensors(folder)) == set(wide.state_dict())
