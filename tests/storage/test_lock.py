"""Two runs that want one output folder at the same time."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from folders import contents, weights_and_texts
from tiny_models import build, recipe, save
from transformers import AutoModelForCausalLM

from llmprune import prune
from llmprune.errors import LlmpruneError, ResumeError
from llmprune.pruning import on_disk
from llmprune.storage.folders import LOCK_NAME, locked, require_empty, require_free
from llmprune.storage.output import OutputFolder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama"), tmp_path_factory.mktemp("checkpoint") / "dense")


class Finished(NamedTuple):
    folder: Path
    recipe: dict[str, Any]


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished") / "pruned"
    prune(source, recipe(), folder)
    return Finished(folder, recipe())


def test_a_folder_in_use_is_refused_and_left_alone(source: Path, finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    shutil.copytree(finished.folder, folder)
    model = AutoModelForCausalLM.from_pretrained(source)
    with locked(folder):
        before = contents(folder)
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ResumeError, match="another run of llmprune is writing into"):
                prune(source, finished.recipe, folder, **options)
        with pytest.raises(ResumeError, match="another run of llmprune is writing into"):
            prune(model, finished.recipe, folder, overwrite=True)
        assert contents(folder) == before
    assert contents(folder) == contents(finished.folder)


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_runs_that_begin_together_one_goes_on(
    source: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Both find the folder free, and make their texts; the other comes while the first one opens or prunes."""
    folder = tmp_path / "pruned"
    refused: list[LlmpruneError] = []
    hooks = [(on_disk.OutputFolder, "open"), (on_disk.LayerDriver, "drive")]
    original = getattr(*hooks[first])

    def with_another(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        with monkeypatch.context() as patched:
            patched.setattr(on_disk, "require_free", lambda path: None)
            patched.setattr(on_disk, "require_empty", lambda path, **options: None)
            with pytest.raises(ResumeError, match="another run") as caught:
                prune(source, finished.recipe, folder)
        refused.append(caught.value)
        return original(*arguments, **options)

    monkeypatch.setattr(*hooks[first], with_another)
    prune(source, finished.recipe, folder)
    assert [error.fix for error in refused] == ["wait for it to end, or choose another output folder"]
    assert weights_and_texts(folder) == weights_and_texts(finished.folder)


def test_a_run_that_comes_too_late_does_not_replace_the_other(source: Path, finished: Finished, tmp_path: Path) -> None:
    """It found the folder empty, and while it made its text another one began and ended."""
    folder = tmp_path / "pruned"
    shutil.copytree(finished.folder, folder)
    with locked(folder), pytest.raises(ResumeError, match="is not empty"):
        OutputFolder.open(folder, {}, resume=False, overwrite=False)
    assert contents(folder) == contents(finished.folder)


def test_a_model_in_memory_does_not_replace_what_came_meanwhile(
    source: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pruned"
    original = on_disk.LayerDriver.drive

    def meanwhile(*arguments: Any) -> Any:
        shutil.copytree(finished.folder, folder)
        return original(*arguments)

    monkeypatch.setattr(on_disk.LayerDriver, "drive", meanwhile)
    with pytest.raises(ResumeError, match="is not empty"):
        prune(AutoModelForCausalLM.from_pretrained(source), finished.recipe, folder)
    assert contents(folder) == contents(finished.folder)


def test_a_lock_in_another_process_holds_and_dies_with_it(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from llmprune.storage.folders import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    start = [sys.executable, "-c", code, str(tmp_path / "pruned")]
    with subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ResumeError, match="another run"):
            require_free(tmp_path / "pruned")
        process.kill()
    assert list(contents(tmp_path / "pruned")) == [LOCK_NAME]
    require_empty(tmp_path / "pruned", resume=False, overwrite=False)
    with locked(tmp_path / "pruned"):
        pass
    assert contents(tmp_path / "pruned") == {}


def test_asking_whether_a_folder_is_free_creates_nothing(tmp_path: Path) -> None:
    require_free(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


# --- a disk that fills up on the way
