"""A run that is killed at any moment and resumed gives the same bytes as one that was left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from folders import contents, tensors, untimed, weights_and_texts
from safetensors.torch import load_file, save_file
from tiny_models import build, recipe, save
from transformers import AutoModelForCausalLM

from llmprune import output, pipeline, prune
from llmprune.checkpoint import INDEX_NAME, read_index
from llmprune.errors import ResumeError
from llmprune.output import MANIFEST_NAME
from llmprune.report import Report, load_report
from llmprune.stream import ResidentLayer

LAYERS = 3


class Whole(NamedTuple):
    """An uninterrupted run."""

    source: Path
    recipe: dict[str, Any]
    folder: Path
    report: Report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    folder = tmp_path_factory.mktemp("whole")
    model = build("llama", torch.bfloat16, num_hidden_layers=LAYERS)
    source = save(model, folder / "dense")
    text = " ".join(f"w{number % 120 + 4}" for number in range(700))
    (folder / "text.txt").write_text(text)
    calibration = {"source": str(folder / "text.txt"), "samples": 4, "length": 16}
    settings = dict(recipe(calibration=calibration, evaluation={"samples": 1, "source": str(folder / "text.txt")}))
    before = contents(source)
    report = prune(source, settings, folder / "pruned")
    yield Whole(source, settings, folder / "pruned", report)
    assert contents(source) == before


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that are solved in this process, in order."""
    names: list[str] = []
    solve_layer = pipeline.solve_layer

    def note(layer: ResidentLayer, *arguments: Any) -> Any:
        rows = solve_layer(layer, *arguments)
        names.append(layer.name)
        return rows

    monkeypatch.setattr(pipeline, "solve_layer", note)
    return names


def assert_equal_to(whole: Whole, folder: Path, report: Report) -> None:
    assert weights_and_texts(folder) == weights_and_texts(whole.folder)
    assert untimed(report) == untimed(whole.report)
    assert untimed(load_report(folder)) == untimed(whole.report)
    assert json.loads((folder / MANIFEST_NAME).read_text())["complete"] is True


def assert_incomplete_or_whole(whole: Whole, folder: Path) -> None:
    """Nobody mistakes an unfinished folder for a model."""
    if (folder / INDEX_NAME).exists():
        assert list(read_index(folder)) == list(read_index(whole.folder))
        assert {name: tensor.tolist() for name, tensor in tensors(folder).items()} == {
            name: tensor.tolist() for name, tensor in tensors(whole.folder).items()
        }
    else:
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)


# --- killed at every change that a run makes to its folder


class KillAt:
    """Ends the process by SIGKILL right before the n-th change below a folder; also in the middle of shards."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.left = str(folder), number

    def watch(self) -> None:
        from llmprune import checkpoint

        save_file = checkpoint.save_file

        def in_two_halves(content: Any, file: Path, **options: Any) -> None:
            save_file(content, file, **options)
            data = file.read_bytes()
            os.truncate(file, len(data) // 2)
            file.write_bytes(data)

        checkpoint.save_file = in_two_halves
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
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run_job(job: dict[str, Any]) -> None:
    solve_layer = pipeline.solve_layer

    def note(layer: ResidentLayer, *arguments: Any) -> Any:
        rows = solve_layer(layer, *arguments)
        with Path(job["solved"]).open("a") as log:
            log.write(f"{layer.name}\n")
        return rows

    pipeline.solve_layer = note
    KillAt(job["output"], job["kill_at"]).watch()
    prune(job["source"], job["recipe"], job["output"], resume=job["resume"])
    os._exit(0)


class Runner:
    """Hands jobs to the process in which `main` runs."""

    def __init__(self, whole: Whole, process: "subprocess.Popen[str]") -> None:
        assert process.stdin
        assert process.stdout
        self.whole, self.jobs, self.answers = whole, process.stdin, process.stdout

    def __call__(self, output: Path, kill_at: int, resume: bool = False) -> tuple[int, list[str]]:
        """How a run ended (-9: killed), and the layers that it solved."""
        log = output.with_name(f"{output.name}.solved")
        log.write_text("")
        job = {"source": str(self.whole.source), "recipe": self.whole.recipe, "resume": resume, "solved": str(log)}
        self.jobs.write(json.dumps({**job, "output": str(output), "kill_at": kill_at}) + "\n")
        self.jobs.flush()
        return int(self.answers.readline()), log.read_text().split()


@pytest.fixture(scope="module")
def runner(whole: Whole) -> Iterator[Runner]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    start = [sys.executable, "-c", "import test_resume; test_resume.main()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(start, env=environment, **pipes) as process:
        yield Runner(whole, process)
    assert process.returncode == 0


def state(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes; the size of what holds times varies from run to run."""
    files = sorted(folder.iterdir()) if folder.exists() else []
    timed = (MANIFEST_NAME, "report.json")
    return [(file.name, 0 if any(name in file.name for name in timed) else file.stat().st_size) for file in files]


def test_killed_before_every_change_and_resumed(
    whole: Whole, runner: Runner, solved: list[str], tmp_path: Path
) -> None:
    lost: set[int] = set()
    committed_at: set[int] = set()
    seen: list[tuple[str, int]] = []
    for kill_at in range(1, 200):
        folder = tmp_path / str(kill_at) / "pruned"
        folder.parent.mkdir()
        ended, solved_before = runner(folder, kill_at)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        if seen == (seen := state(folder)):
            continue
        manifest = folder / MANIFEST_NAME
        committed = len(json.loads(manifest.read_text())["layers"]) if manifest.exists() else 0
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


def test_killed_again_and_again(whole: Whole, runner: Runner, tmp_path: Path) -> None:
    folder, total, kills = tmp_path / "pruned", 0, 0
    for kill_at in range(12, 40):
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


def interrupted(whole: Whole, folder: Path, layers: int) -> Path:
    """What a run leaves that was killed after this many layers."""
    shutil.copytree(whole.folder, folder)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    done = dict(list(manifest["layers"].items())[:layers])
    (folder / MANIFEST_NAME).write_text(json.dumps({**manifest, "complete": False, "ends": {}, "layers": done}))
    kept = {MANIFEST_NAME, "recipe.yaml", *(layer["shard"] for layer in done.values())}
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()
    return folder


def test_a_finished_run_is_not_done_again(whole: Whole, solved: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(whole.folder)
    monkeypatch.setattr(pipeline.CheckpointSource, "load_layer", None)
    monkeypatch.setattr(pipeline.CheckpointSource, "load_ends", None)
    report = prune(whole.source, whole.recipe, whole.folder, resume=True)
    assert report == whole.report
    assert solved == []
    assert contents(whole.folder) == before


def test_resume_begins_where_there_is_nothing(whole: Whole, tmp_path: Path) -> None:
    report = prune(whole.source, whole.recipe, tmp_path / "new", resume=True)
    assert_equal_to(whole, tmp_path / "new", report)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [flip, Path.unlink, lambda file: os.truncate(file, 100)], ids=["flip", "gone", "cut"]
)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_damaged_layer_is_done_again_and_so_is_what_follows(
    whole: Whole, solved: list[str], tmp_path: Path, layer: int, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "pruned"
    shutil.copytree(whole.folder, folder)
    damage(folder / f"model-0000{layer + 2}-of-00004.safetensors")
    report = prune(whole.source, whole.recipe, folder, resume=True)
    assert solved == [f"model.layers.{number}" for number in range(layer, LAYERS)]
    assert_equal_to(whole, folder, report)


@pytest.mark.parametrize("name", ["model-00001-of-00004.safetensors", INDEX_NAME, "report.json"])
def test_what_is_missing_beside_the_layers_is_written_again(
    whole: Whole, solved: list[str], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "pruned"
    shutil.copytree(whole.folder, folder)
    (folder / name).unlink()
    report = prune(whole.source, whole.recipe, folder, resume=True)
    assert solved == []
    assert_equal_to(whole, folder, report)


def test_a_damaged_folder_does_not_load_while_it_is_mended(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pruned"
    shutil.copytree(whole.folder, folder)
    flip(folder / "model-00002-of-00004.safetensors")

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "solve_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        prune(whole.source, whole.recipe, folder, resume=True)
    assert not (folder / INDEX_NAME).exists()


def test_half_written_files_are_written_again(whole: Whole, tmp_path: Path) -> None:
    """A text file can be cut short as well, under its temporary name, and a copied one under its own."""
    folder = interrupted(whole, tmp_path / "pruned", LAYERS)
    for file in whole.folder.iterdir():
        (folder / f".{file.name}.partial").write_bytes(file.read_bytes()[:5])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((whole.folder / name).read_bytes()[:5])
    report = prune(whole.source, whole.recipe, folder, resume=True)
    assert_equal_to(whole, folder, report)


# --- what resuming refuses


def change_weights(whole: Whole, folder: Path) -> Path:
    changed = folder / "dense"
    shutil.copytree(whole.source, changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].neg_()
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    return changed


@pytest.mark.parametrize("layers", [1, LAYERS])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": {"pattern": "2:4"}}, "recipe.pattern was 0.5 and is now 2:4"),
        ({"recipe": {"method": {"sparsegpt": {"damping": 0.02}}}}, "recipe.method.sparsegpt.damping was 0.01"),
        ({"recipe": {"exclude": ["*.o_proj"]}}, "recipe.exclude was"),
        ({"recipe": {"batch_size": 3}}, "recipe.batch_size was 2 and is now 3"),
        ({"recipe": {"evaluation": None}}, "recipe.evaluation was"),
        ({"text": "w9 "}, "tokens.calibration was"),
        ({"weights": True}, "source was"),
        ({"version": {"llmprune": "9"}}, "version.llmprune was .* and is now 9"),
        ({"device": "another"}, "device was .* and is now another"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_changed_run_is_refused_by_name(
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layers: int,
    change: dict[str, Any],
    named: str,
) -> None:
    folder = interrupted(whole, tmp_path / "pruned", layers)
    before = contents(folder)
    settings, source = {**whole.recipe, **change.get("recipe", {})}, whole.source
    text = Path(whole.recipe["calibration"]["source"])
    original = text.read_text()
    if "weights" in change:
        source = change_weights(whole, tmp_path)
    if "version" in change:
        known = pipeline.versions()
        monkeypatch.setattr(pipeline, "versions", lambda: known | change["version"])
    if "device" in change:
        monkeypatch.setattr(pipeline, "describe_device", lambda device: change["device"])
    text.write_text(change.get("text", "") + original)
    try:
        with pytest.raises(ResumeError, match=f"cannot be resumed: {named}") as caught:
            prune(source, settings, folder, resume=True)
    finally:
        text.write_text(original)
    assert "--overwrite" in caught.value.fix
    assert contents(folder) == before


def test_every_difference_is_named_within_a_key(whole: Whole, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "pruned", 1)
    with pytest.raises(ResumeError, match=r"recipe\.pattern was .*; recipe\.held_back was 1 and is now 2"):
        prune(whole.source, {**whole.recipe, "pattern": 0.6, "held_back": 2}, folder, resume=True)


def test_another_description_is_no_other_run(whole: Whole, solved: list[str], tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "pruned", 2)
    prune(whole.source, {**whole.recipe, "description": "in other words"}, folder, resume=True)
    assert solved == ["model.layers.2"]
    assert tensors(folder).keys() == tensors(whole.folder).keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"format": 2}', "has format 2"),
    ],
)
def test_a_damaged_record_is_a_typed_error(whole: Whole, tmp_path: Path, text: str, message: str) -> None:
    folder = interrupted(whole, tmp_path / "pruned", 1)
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(ResumeError, match=message) as caught:
        prune(whole.source, whole.recipe, folder, resume=True)
    assert "--overwrite" in caught.value.fix


def test_a_model_in_memory_cannot_be_resumed(whole: Whole, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="in memory"):
        prune(AutoModelForCausalLM.from_pretrained(whole.source), whole.recipe, tmp_path, resume=True)


def test_the_manifest_is_read_by_its_format(whole: Whole) -> None:
    manifest = json.loads((whole.folder / MANIFEST_NAME).read_text())
    assert set(manifest) == {"format", "keys", "complete", "ends", "layers"}
    assert list(manifest["keys"]) == ["recipe", "tokens", "source", "version", "device"]
    assert output.MANIFEST_NAME == ".llmprune.json"
