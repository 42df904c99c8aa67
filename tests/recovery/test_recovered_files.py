"""What `recover` leaves beside the weights: rows of the matrices, a recipe that repeats it, a card, and all seconds."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command_line import run
from huggingface_hub import ModelCard
from tiny_models import build, save
from word_texts import words

from llmprune import TextSpec, prune, recover
from llmprune.errors import RecipeError, RecoveryError
from llmprune.progress import Progress
from llmprune.recovery.options import RecoveryOptions
from llmprune.storage.report import Report
from llmprune.timing import Stages

OPTIONS = {"learning_rate": 1e-2, "epochs": 0.5, "held_back": 4, "evaluations": 2}


class Made(NamedTuple):
    """A dense model, a text, the pruned model, the recovered one, its report, and what was told meanwhile."""

    dense: Path
    text: TextSpec
    pruned: Path
    recovered: Path
    report: Report
    told: list[Progress]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("recovered")
    dense, text = save(build("llama", torch.bfloat16), folder / "dense"), words(folder / "text.txt", 400)
    settings = {"source": text.source, "samples": 4, "length": 16}
    recipe = {"pattern": "2:4", "method": "magnitude", "exclude": ["*.k_proj"], "calibration": settings}
    prune(dense, {**recipe, "evaluation": None}, folder / "pruned")
    told: list[Progress] = []
    report = recover(folder / "pruned", folder / "out", text, dense, OPTIONS, evaluation=text, watch=told.append)
    return Made(dense, text, folder / "pruned", folder / "out", report, told)


def test_the_report_has_the_matrices_that_pruning_has_zeroed(made: Made) -> None:
    """And not those that it had excluded."""
    report = made.report
    assert (report.sparsity, len(report.rows)) == (0.5, 12)
    assert {(row.pattern, row.method) for row in report.rows} == {("2:4", "magnitude")}
    assert sum(row.zeros for row in report.rows) == report.header["recovery"]["zeros"]["after"]
    summary = json.loads((made.recovered / "report.json").read_text())["summary"]
    assert (summary["sparsity"], summary["matrices"]) == (0.5, 12)
    assert "recovered, 12 matrices, sparsity 50.0%, perplexity " in repr(report)
    page = (made.recovered / "report.html").read_text()
    assert "magnitude 2:4, recovered" in page
    assert "nothing removed" not in page
    assert "dense model" in page


def test_a_pruned_model_without_a_report_is_read_for_its_pattern(made: Made, tmp_path: Path) -> None:
    bare = shutil.copytree(made.pruned, tmp_path / "bare", ignore=shutil.ignore_patterns("report.*"))
    report = recover(bare, tmp_path / "out", made.text, None, {**OPTIONS, "loss": "cross-entropy", "epochs": 0.1})
    assert (report.sparsity, len(report.rows)) == (0.5, 12)
    assert {(row.pattern, row.method) for row in report.rows} == {("2:4", "unknown")}
    assert report.header["recovery"]["pruned_by"] is None


def test_the_recipe_repeats_the_run(made: Made, tmp_path: Path) -> None:
    options = RecoveryOptions.read(made.recovered / "recipe.yaml")
    assert options == RecoveryOptions.read(made.report.header["recovery"]["options"])
    card = ModelCard.load(made.recovered / "README.md").text
    (command,) = [line for line in card.splitlines() if line.startswith("llmprune recover")]
    assert "--recipe recipe.yaml --teacher" in command
    words_ = command.split()[1:-1]
    words_[words_.index("recipe.yaml")] = str(made.recovered / "recipe.yaml")
    done = run(*words_, tmp_path / "again")
    assert done.exit_code == 0, done.stderr
    for file in made.recovered.glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_options_that_are_given_precede_those_of_the_recipe(made: Made) -> None:
    words_ = ["recover", made.pruned, "--teacher", made.dense, "--text", made.text.source, "--max-seq-length", 16]
    words_ += ["--recipe", made.recovered / "recipe.yaml", "--dry-run", "--json"]
    steps = [json.loads(run(*words_, *more).stdout)["steps"] for more in ((), ("--epochs", 3))]
    assert steps == [2, 12]  # of half an epoch, and of three


def test_files_that_hold_no_options_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'missing\.yaml'"):
        RecoveryOptions.read("missing.yaml")
    with pytest.raises(RecoveryError, match="unknown option"):
        RecoveryOptions.read(made.pruned / "recipe.yaml")


def test_zeros_are_counted_with_a_bar(made: Made) -> None:
    for stage in ("counting zeros before", "counting zeros after"):
        told = [one for one in made.told if one.stage == stage]
        assert told[-1].layer == told[-1].layers == len(told) > 12


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


def test_the_seconds_of_an_interrupted_process_count(made: Made, tmp_path: Path, monkeypatch: Any) -> None:
    """Up to its last saved state."""

    def kill(progress: Progress) -> None:
        if progress.unit == "step" and progress.layer == 2:
            raise Killed

    spent = Stages.spent
    with monkeypatch.context() as patch:  # the first process has taken hours
        patch.setattr(Stages, "spent", lambda stages: {**spent(stages), "total": 7200.0, "train": 3600.0})
        with pytest.raises(Killed):
            recover(made.pruned, tmp_path / "out", made.text, made.dense, OPTIONS, watch=kill)
    seconds = recover(made.pruned, tmp_path / "out", made.text, made.dense, OPTIONS, resume=True).header["seconds"]
    assert 7200 < seconds["total"] < 7300
    assert 3600 < seconds["train"] < 3700
