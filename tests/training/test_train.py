"""`train` as a whole, on a causal LM and on a classifier: stages, curve, files, and what an interrupted run leaves."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command_line import run
from folders import contents
from labelled_texts import build_classifier, save_classifier, write_texts
from safetensors.torch import save_file
from tiny_models import build, save
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from word_texts import words

from llmprune import TextSpec, compare, inspect_checkpoint, pack, plan_training, prune, train
from llmprune.errors import (
    CalibrationError,
    LlmpruneError,
    ModelError,
    NumericsError,
    PatternError,
    RecipeError,
    ResumeError,
    TrainingError,
)
from llmprune.progress import Progress
from llmprune.storage.files import read_index
from llmprune.storage.folders import MANIFEST_NAME, STAGING_NAME
from llmprune.storage.report import Report, load_report
from llmprune.training import trainer

TRAINING = {"learning_rate": 1e-2, "batch_size": 8, "held_back": 8}
RECIPE = {
    "rule": "magnitude", "schedule": {"kind": "linear", "stages": 4, "end": 0.6, "every": 5}, "training": TRAINING,
}  # fmt: skip
# What differs between two runs of the same: times and peaks.
TIMED = {"report.json", "report.html", MANIFEST_NAME}


class Made(NamedTuple):
    """A model, its text, and what came of it."""

    model: Path
    text: TextSpec
    output: Path
    report: Report


def zeros(folder: Path) -> float:
    """The share of zeros in the matrices of the layers."""
    rows = [row for row in inspect_checkpoint(folder).rows if ".layer" in row.name and len(row.shape) == 2]
    return sum(row.zeros for row in rows) / sum(row.elements for row in rows)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("training")
    model = save(build("llama", torch.bfloat16), folder / "dense")
    text = words(folder / "text.txt")
    before = contents(model)
    report = train(model, folder / "out", text, RECIPE, evaluation=TextSpec(text.source, length=16))
    yield Made(model, text, folder / "out", report)
    assert contents(model) == before


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("classifier")
    model = save_classifier(folder / "dense")
    text, test = write_texts(folder / "train.jsonl", 200), write_texts(folder / "test.jsonl", 64, seed=1)
    recipe = {
        "rule": "movement", "schedule": {"stages": 3, "end": 0.75, "every": 20},
        "training": {**TRAINING, "held_back": 40, "seed": 1},  # with a seed of 0, the tiny model learns nothing
    }  # fmt: skip
    report = train(model, folder / "out", str(text), recipe, evaluation=str(test))
    return Made(model, TextSpec(str(text)), folder / "out", report)


def test_each_stage_prunes_more_and_is_on_the_curve(causal: Made) -> None:
    curve = causal.report.header["training"]["curve"]
    assert [(point["stage"], point["step"]) for point in curve] == [(None, 0), (1, 5), (2, 10), (3, 15), (4, 20)]
    assert [point["sparsity"] for point in curve] == pytest.approx([0, 0.15, 0.3, 0.45, 0.6], abs=1e-3)
    assert zeros(causal.output) == pytest.approx(0.6, abs=1e-3)
    assert curve[-1]["perplexity"] < curve[0]["perplexity"]  # it has learned more than it has lost
    losses = causal.report.header["training"]["losses"]
    assert [point["step"] for point in losses] == list(range(1, 21))
    # The learning rate falls over each stage.
    rates = [point["learning_rate"] for point in losses]
    assert rates[1] > rates[4] < rates[6]


def test_the_curve_is_of_the_weights_that_are_written(causal: Made) -> None:
    """The last point, scored anew with transformers alone, in the bfloat16 that is stored."""
    model = AutoModelForCausalLM.from_pretrained(causal.output, dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(causal.model, dtype="float32")
    from llmprune.recovery.options import RecoveryOptions
    from llmprune.training.subjects.causal import CausalSubject

    options = RecoveryOptions(loss="cross-entropy", held_back=8)
    subject = CausalSubject(causal.model, causal.text, None, options, torch.device("cpu"), None)
    subject.read(lambda progress: None)
    rows = subject.rows[-8:]
    ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    curve = causal.report.header["training"]["curve"]
    with torch.no_grad():
        for scored, point in ((dense, curve[0]), (model, curve[-1])):
            logits = scored(input_ids=ids).logits[:, :-1].flatten(0, 1)
            nats = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
            assert nats.exp().item() == pytest.approx(point["perplexity"], rel=0.02)
            assert nats.item() == pytest.approx(point["loss"], rel=0.02)


def test_the_folder_is_a_checkpoint_with_a_report(causal: Made, tmp_path: Path) -> None:
    names = {file.name for file in causal.output.iterdir()}
    assert {"config.json", "tokenizer.json", "recipe.yaml", "report.json", "report.html", "README.md"} <= names
    assert STAGING_NAME not in names
    assert not any("checkpoint" in name for name in names)
    assert load_report(causal.output).header == json.loads(json.dumps(causal.report.header))
    training = causal.report.header["training"]
    assert causal.report.dense_perplexity == training["before"]
    assert causal.report.pruned_perplexity == training["after"]
    page = (causal.output / "report.html").read_text()
    assert 'id="chart-curve"' in page
    assert 'id="chart-loss"' in page
    assert "pruned in 4 stages while it trained (magnitude)" in page
    shutil.copytree(causal.output, tmp_path / "copy")
    assert len(compare([causal.output, tmp_path / "copy"]).rows) == 3  # and the dense model


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


def killed_at(step: int) -> Any:
    def watch(progress: Progress) -> None:
        if progress.stage == trainer.STAGE and progress.layer == step:
            raise Killed

    return watch


@pytest.mark.slow
@pytest.mark.parametrize(("step", "rule"), [(3, "magnitude"), (12, "magnitude"), (13, "movement")])
def test_a_killed_run_resumes_to_the_same_bytes(causal: Made, tmp_path: Path, step: int, rule: str) -> None:
    recipe = {**RECIPE, "rule": rule}

    def again(folder: Path, **options: Any) -> Report:
        return train(causal.model, folder, causal.text, recipe, **options)

    whole = again(tmp_path / "whole")
    with pytest.raises(Killed):
        again(tmp_path / "out", watch=killed_at(step))
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(ResumeError, match="--resume"):
        again(tmp_path / "out")
    with pytest.raises(ResumeError, match=r"recipe\.schedule\.end was 0\.6 and is now 0\.7"):
        train(causal.model, tmp_path / "out", causal.text, recipe, overrides=["schedule.end=0.7"], resume=True)
    steps: list[int] = []
    report = again(
        tmp_path / "out", resume=True, watch=lambda p: steps.append(p.layer) if p.stage == trainer.STAGE else None
    )
    assert steps[0] == 5 * (step // 5)  # the end of the last finished stage
    kept = {name: data for name, data in contents(tmp_path / "whole").items() if name not in TIMED}
    assert {name: data for name, data in contents(tmp_path / "out").items() if name not in TIMED} == kept
    assert report.header["training"]["curve"] == whole.header["training"]["curve"]
    # A finished run has nothing to do.
    assert again(tmp_path / "out", resume=True).header == load_report(tmp_path / "out").header


def test_a_run_that_was_killed_while_it_wrote_does_not_train_again(
    causal: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("llmprune.training.subjects.causal.write_result", fail)
        with pytest.raises(Killed):
            train(causal.model, tmp_path / "out", causal.text, RECIPE)
    monkeypatch.setattr(trainer.StagedTrainer, "train", fail)
    report = train(causal.model, tmp_path / "out", causal.text, RECIPE, resume=True)
    assert report.header["training"]["curve"] == causal.report.header["training"]["curve"]
    assert (tmp_path / "out" / "config.json").read_bytes() == (causal.output / "config.json").read_bytes()
    assert zeros(tmp_path / "out") == zeros(causal.output)


@pytest.mark.parametrize(("method", "pattern"), [("sparsegpt", None), ("wanda", "2:4")])
def test_a_one_shot_method_prunes_each_stage(causal: Made, tmp_path: Path, method: str, pattern: str | None) -> None:
    recipe = {
        "method": method, "calibration_samples": 4, "training": TRAINING, **({"pattern": pattern} if pattern else {}),
        "schedule": {"kind": "linear", "stages": 2, "every": 3},
    }  # fmt: skip
    report = train(causal.model, tmp_path / "out", causal.text, recipe)
    curve = report.header["training"]["curve"]
    assert [point["sparsity"] for point in curve] == pytest.approx([0, 0.25, 0.5], abs=0.01)
    assert zeros(tmp_path / "out") == pytest.approx(0.5, abs=0.01)
    if pattern:
        patterns = {row.pattern for row in inspect_checkpoint(tmp_path / "out").rows if ".layers" in row.name}
        assert "2:4" in patterns
    # Before any training, the first stage is what `prune` does by itself.
    one = {**recipe, "schedule": {"kind": "one-shot", "stages": 1, "every": 1}}
    still = {**one, "training": {**TRAINING, "learning_rate": 1e-30}}
    train(causal.model, tmp_path / "still", causal.text, still)
    settings = {"source": causal.text.source, "samples": 4, "length": 16}
    prune(causal.model, {
        "pattern": pattern or 0.5, "method": method, "calibration": settings, "evaluation": None, "held_back": 0,
        "compute_dtype": "float32",
    }, tmp_path / "pruned")  # fmt: skip
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("still", "pruned"))
    for name, weight in ours.named_parameters():
        same = (weight.eq(0) == theirs.get_parameter(name).eq(0)).float().mean().item()
        assert same > 0.97, name  # bfloat16 between the layers there, and float32 here


def test_a_lottery_from_scratch_with_its_controls(causal: Made, tmp_path: Path) -> None:
    found = {}
    for control in ("none", "random-ticket", "random-init"):
        recipe = {
            "rule": {"lottery": {"rewind": 2, "control": control}}, "from_scratch": True, "training": TRAINING,
            "schedule": {"kind": "iterative", "stages": 2, "end": 0.5, "every": 8},
        }  # fmt: skip
        report = train(causal.model, tmp_path / control, causal.text, recipe)
        curve = report.header["training"]["curve"]
        assert [point["step"] for point in curve] == [0, 8, 14, 20]
        assert curve[-1]["sparsity"] == pytest.approx(0.5, abs=1e-3)
        found[control] = curve
    # All the same until the last stage.
    assert found["none"][:3] == found["random-ticket"][:3] == found["random-init"][:3]
    assert len({curves[-1]["loss"] for curves in found.values()}) == 3


def test_distillation_from_the_dense_model(causal: Made, tmp_path: Path) -> None:
    recipe = {**RECIPE, "training": {**TRAINING, "loss": "kl"}}
    curve = train(causal.model, tmp_path / "out", causal.text, recipe).header["training"]["curve"]
    assert curve[0]["loss"] == pytest.approx(0, abs=1e-3)  # it begins as its own teacher
    assert curve[-1]["loss"] > 0.01


def test_a_classifier_is_pruned_while_it_learns(classifier: Made) -> None:
    training = classifier.report.header["training"]
    assert training["measure"] == "accuracy"
    curve = training["curve"]
    assert [point["step"] for point in curve] == [0, 20, 40, 60, 80]  # a dense stage first
    assert [point["sparsity"] for point in curve[1:]] == pytest.approx([0, 0.528, 0.722, 0.75], abs=2e-3)
    assert zeros(classifier.output) == pytest.approx(0.75, abs=2e-3)
    assert training["after"] > 0.65 > training["before"]
    page = (classifier.output / "report.html").read_text()
    assert "accuracy: " in page
    model = AutoModelForSequenceClassification.from_pretrained(classifier.output)
    assert model.classifier.weight.ne(0).all()
    assert model.dtype == torch.float32


def test_a_classifier_learns_from_its_dense_self(classifier: Made, tmp_path: Path) -> None:
    recipe = {**RECIPE, "training": {**TRAINING, "loss": "mix", "kl_share": 0.5}}
    curve = train(classifier.model, tmp_path / "out", classifier.text, recipe).header["training"]["curve"]
    half = curve[0]["loss"]  # no divergence yet: half of the cross-entropy, which is about log 2
    assert 0.25 < half < 0.5


def test_what_it_refuses(causal: Made, classifier: Made, tmp_path: Path) -> None:
    cases: list[tuple[type[LlmpruneError], str, Path, Any]] = [
        (TrainingError, "no key 'rules'", causal.model, {"rules": "magnitude"}),
        (TrainingError, "a rule and a method", causal.model, {"rule": "rigl", "method": "wanda"}),
        (RecipeError, "wandaa", causal.model, {"method": "wandaa"}),
        (TrainingError, "option of llmprune recover", causal.model, {"training": {"rank": 3}}),
        (TrainingError, "training: unknown option", causal.model, {"training": {"lr": 3}}),
        (TrainingError, r"training\.cycle", causal.model, {"training": {"cycle": "epoch"}}),
        (TrainingError, "the loss kl", causal.model, {"from_scratch": True, "training": {"loss": "kl"}}),
        (TrainingError, "from_scratch is 'yes'", causal.model, {"from_scratch": "yes"}),
        (TrainingError, "include is", causal.model, {"include": "*mlp*"}),
        (TrainingError, "no matrices", causal.model, {"include": ["*.nothing"]}),
        (TrainingError, "calibration_samples", causal.model, {"method": "wanda", "calibration_samples": 0}),
        (TrainingError, "is 999, and .* has", causal.model, {"method": "wanda", "calibration_samples": 999}),
        (PatternError, "multiple of 7", causal.model, {"pattern": "3:7"}),
        (TrainingError, "method wanda on a classifier", classifier.model, {"method": "wanda"}),
        (TrainingError, "training: the optimizer", causal.model, {"training": {"optimizer": "muon"}}),
    ]
    for kind, words_, model, recipe in cases:
        with pytest.raises(kind, match=words_):
            train(model, tmp_path / "out", causal.text, recipe)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="no recipe"):
        train(causal.model, tmp_path / "out", causal.text, "missing.yaml")
    with pytest.raises(ResumeError, match="--overwrite"):
        train(causal.model, causal.output, causal.text, RECIPE)
    pack(causal.output, tmp_path / "packed", format="bitmask")
    with pytest.raises(TrainingError, match="is packed"):
        train(tmp_path / "packed", tmp_path / "out", causal.text, RECIPE)
    save(build_classifier(labels=1), tmp_path / "regression")
    with pytest.raises(ModelError, match="one label of several"):
        train(tmp_path / "regression", tmp_path / "out", classifier.text, RECIPE)


@pytest.mark.parametrize(
    ("content", "words_"),
    [
        ('{"text": "w5"}\n', r"a.jsonl:1 has no label"),
        ('{"text": "w5", "label": 1}\n{"text": 3, "label": 1}\n', r"a.jsonl:2 has no text"),
        ('{"text": "w5", "label": 2}\n', "has the label 2"),
        ('{"text": "w5", "label": true}\n', "has the label True"),
        ("[1]\n", "has no text"),
        ("{\n", "a.jsonl:1 is not JSON"),
        ("\n", "is empty"),
    ],
)
def test_labelled_files_that_are_refused(classifier: Made, tmp_path: Path, content: str, words_: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(CalibrationError, match=words_):
        train(classifier.model, tmp_path / "out", str(file), RECIPE)


def test_labels_by_name_in_a_table_and_pairs_of_texts(classifier: Made, tmp_path: Path) -> None:
    from llmprune.training.subjects.labelled import Example, read_examples

    file = tmp_path / "a.csv"
    file.write_text('text,text_pair,label\nw5,"w6, w7",no\nw8,,1\n')
    classes = {"no": 0, "yes": 1}
    assert read_examples(str(file), classes) == [Example("w5", "w6, w7", 0), Example("w8", "", 1)]
    with pytest.raises(CalibrationError, match="no file of labelled texts"):
        read_examples(str(tmp_path / "a.txt"), classes)
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_examples(str(tmp_path / "b.csv"), classes)


def test_the_plan_needs_no_training(causal: Made) -> None:
    plan = plan_training(causal.model, causal.text, RECIPE, overrides=["schedule.dense=7"])
    assert [dict(stage) for stage in plan.stages][:2] == [
        {"stage": 0, "sparsity": 0.0, "steps": 7}, {"stage": 1, "sparsity": 0.15, "steps": 5},
    ]  # fmt: skip
    assert (plan.steps, plan.held_back, plan.length) == (27, 8, 16)
    assert plan.memory_bytes > 16 * 30_000
    # Without `every`, a stage passes over the text once.
    recipe = {**RECIPE, "schedule": {"stages": 1}}
    assert plan_training(causal.model, causal.text, recipe).steps == -(-plan.sequences // 8)


def test_the_command_line(causal: Made, classifier: Made, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("rule: magnitude\nschedule: {stages: 2, end: 0.5, every: 2}\ntraining: {batch_size: 4}\n")
    common = ["train", causal.model, "--recipe", file, "--text", causal.text.source, "--max-seq-length", 16]
    planned = run(*common, "--set", "schedule.kind=linear", "--dry-run", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["stages"][0] == {"stage": 1, "sparsity": 0.25, "steps": 2}
    assert "25.0%" in run(*common, "--set", "schedule.kind=linear", "--dry-run").stdout
    done = run(*common, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "43.8%" in shown  # after the first of two cubic stages
    assert "pruned in 2 stages while it trained (magnitude)" in shown
    for plan_only in ([], ["--dry-run"]):
        refused = run(*common, "--output", tmp_path / "out", *plan_only)
        assert refused.exit_code == 1
        assert "--overwrite" in refused.stderr
    assert "absent.txt" in run(*common, "--eval-dataset", tmp_path / "absent.txt", "--dry-run").stderr
    assert run("train", causal.model, "--output", tmp_path / "x").exit_code == 2
    labelled = run("train", classifier.model, "--text", classifier.text.source, "--dry-run")
    assert labelled.exit_code == 0, labelled.stderr


def test_texts_to_evaluate_on_are_read_before_training(
    causal: Made, classifier: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.StagedTrainer, "train", lambda *_, **__: pytest.fail("it has trained"))
    for made, evaluation in ((causal, "missing.txt"), (causal, "missing.jsonl"), (classifier, "missing.jsonl")):
        with pytest.raises(CalibrationError, match="missing"):
            train(made.model, tmp_path / "out", made.text, RECIPE, evaluation=str(tmp_path / evaluation))
    assert not (tmp_path / "out").exists()


def test_each_tensor_of_a_classifier_keeps_its_dtype(classifier: Made, tmp_path: Path) -> None:
    """Older checkpoints store positions, as integers; heads are often wider than the body."""
    folder = shutil.copytree(classifier.model, tmp_path / "mixed")
    state = {key: stored[...].bfloat16() for key, stored in read_index(folder).items()}
    state["classifier.weight"] = state["classifier.weight"].float()
    state["bert.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(state, folder / "model.safetensors")
    recipe = {"schedule": {"stages": 1, "every": 2}, "training": TRAINING}
    train(folder, tmp_path / "out", classifier.text, recipe)
    found = {key: stored.dtype for key, stored in read_index(tmp_path / "out").items()}
    assert found.pop("classifier.weight") == torch.float32
    assert set(found.values()) == {torch.bfloat16}


def test_a_training_that_has_diverged_leaves_no_result(causal: Made, tmp_path: Path) -> None:
    recipe = {"schedule": {"stages": 1, "every": 4}, "training": {**TRAINING, "learning_rate": 1e20}}
    with pytest.raises(NumericsError, match=r"training has diverged(.|\n)*lower the learning rate, and start"):
        train(causal.model, tmp_path / "out", causal.text, recipe)
    assert not list((tmp_path / "out").glob("*.safetensors"))
