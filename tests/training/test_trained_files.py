"""What `train` leaves beside the weights: rows of the matrices, a recipe that repeats it, a card, and all seconds."""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command_line import run
from huggingface_hub import ModelCard
from labelled_texts import save_classifier, write_texts
from rich.console import Console
from tiny_models import build, save
from word_texts import words

from llmprune import TextSpec, compare, train
from llmprune.cli.tables.training import training_table
from llmprune.progress import Progress
from llmprune.storage.report import Report
from llmprune.timing import Stages
from llmprune.training import trainer
from llmprune.training.recipe import load_train_recipe

TRAINING = {"learning_rate": 1e-2, "batch_size": 8, "held_back": 8}
RECIPE = {"schedule": {"kind": "linear", "stages": 2, "end": 0.5, "every": 2}, "training": TRAINING}


class Made(NamedTuple):
    """A model, its text, and what came of it."""

    model: Path
    text: TextSpec
    output: Path
    report: Report


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("trained")
    model, text = save(build("llama", torch.float16), folder / "dense"), words(folder / "text.txt", 400)
    recipe = {**RECIPE, "exclude": ["*.k_proj"]}
    return Made(model, text, folder / "out", train(model, folder / "out", text, recipe, evaluation=text))


def test_the_report_has_the_matrices_that_the_recipe_prunes(made: Made) -> None:
    """Neither embeddings and head, nor what it excludes."""
    report = made.report
    assert (round(report.sparsity, 3), len(report.rows)) == (0.5, 12)
    assert {(row.pattern, row.method, row.error) for row in report.rows} == {("0.5/matrix", "magnitude", None)}
    zeros = {"count": sum(row.zeros for row in report.rows), "weights": 14336}
    assert report.header["training"]["zeros"] == zeros
    page = (made.output / "report.html").read_text()
    assert ": 50.0% of the weights in 12 matrices are zero (" in page
    assert "magnitude to 50% in 2 stages" in page
    assert "nothing removed" not in page
    assert "Sparsity 50.0% everywhere" in page
    assert "output error" not in page  # nothing was solved, layer by layer
    assert 'id="chart-peaks"' not in page
    assert "solved in" not in page
    assert report.notes == ()


def test_a_comparison_has_its_figures(made: Made) -> None:
    dense, trained = compare([made.output]).rows
    assert (dense.name, dense.stored_bytes, dense.perplexity) == ("dense", 24160 * 2, made.report.dense_perplexity)
    assert (trained.recipe, round(trained.sparsity or 0, 3)) == ("magnitude to 50% in 2 stages", 0.5)
    assert trained.nonzeros == 24160 - made.report.header["training"]["zeros"]["count"]


def test_the_card_has_a_command_that_repeats_the_run(made: Made, tmp_path: Path) -> None:
    recipe = load_train_recipe(made.output / "recipe.yaml")
    assert recipe == load_train_recipe({**RECIPE, "exclude": ["*.k_proj"]})
    card = ModelCard.load(made.output / "README.md")
    assert card.data.tags == ["llmprune", "pruned", "sparse", "magnitude"]
    assert card.data.pipeline_tag == "text-generation"
    assert "It loads with `AutoModelForCausalLM.from_pretrained`, like the original." in card.text
    assert f"| perplexity | {made.report.dense_perplexity:.3f} | {made.report.pruned_perplexity:.3f} |" in card.text
    (command,) = [line for line in card.text.splitlines() if line.startswith("llmprune train")]
    words_ = command.split()[1:-1]
    words_[words_.index("recipe.yaml")] = str(made.output / "recipe.yaml")
    done = run(*words_, tmp_path / "again")
    assert done.exit_code == 0, done.stderr
    for file in made.output.glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_classifier_has_a_card_of_its_own(tmp_path: Path) -> None:
    model, text = save_classifier(tmp_path / "dense"), write_texts(tmp_path / "train.jsonl", 60)
    report = train(model, tmp_path / "out", str(text), RECIPE, evaluation=str(text))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "`AutoModelForSequenceClassification.from_pretrained`" in card.text
    assert f"--text {text} --max-seq-length 32 --eval-dataset {text}" in card.text
    assert "accuracy: " in card.text
    assert "accuracy " in repr(report)
    assert ": 50.0% of the weights in " in card.text
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "perplexity" not in page.partition("<h2")[0] + page.partition('id="summary"')[2].partition('id="training"')[0]
    )


def test_soft_movement_says_what_it_did_not_prune(made: Made, tmp_path: Path) -> None:
    """Few steps are too few for its penalty: nothing is pruned, of half that the schedule names."""
    schedule = {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 1}
    recipe = {"rule": "soft-movement", "schedule": schedule, "training": TRAINING}
    report = train(made.model, tmp_path / "out", made.text, recipe)
    (note,) = report.notes
    assert report.sparsity < 0.4
    said = f"{report.sparsity:.1%} of the weights are zero, and the schedule ends at 50.0%"
    assert note.startswith(f"{said}: soft-movement prunes what its penalty drives below its threshold")
    assert note.endswith("; raise strength or threshold, or train longer")
    assert said in (tmp_path / "out" / "report.html").read_text()
    assert f"Note: {said}" in (tmp_path / "out" / "README.md").read_text()
    shown = Console(record=True, width=300, file=io.StringIO())
    shown.print(training_table(report, "out"))
    assert said in shown.export_text()


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


def test_the_seconds_of_an_interrupted_process_count(made: Made, tmp_path: Path, monkeypatch: Any) -> None:
    """Up to its last saved state."""

    def kill(progress: Progress) -> None:
        if progress.stage == trainer.STAGE and progress.layer == 3:
            raise Killed

    spent = Stages.spent
    with monkeypatch.context() as patch:  # the first process has taken hours
        patch.setattr(Stages, "spent", lambda stages: {**spent(stages), "total": 7200.0, "train": 3600.0})
        with pytest.raises(Killed):
            train(made.model, tmp_path / "out", made.text, RECIPE, watch=kill)
    seconds = train(made.model, tmp_path / "out", made.text, RECIPE, resume=True).header["seconds"]
    assert 7200 < seconds["total"] < 7300
    assert 3600 < seconds["train"] < 3700
    assert json.loads((tmp_path / "out" / "report.json").read_text())["seconds"] == seconds
