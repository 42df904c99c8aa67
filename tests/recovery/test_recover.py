"""Recovery as a whole: what is trained, what stays zero, what is written, and what an interrupted run leaves."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command_line import run
from folders import contents, zeros
from tiny_models import build, save
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from word_texts import words

from llmprune import TextSpec, compare, pack, prune, recover, unpack
from llmprune.errors import CalibrationError, DeviceError, NumericsError, RecoveryError, ResumeError
from llmprune.progress import Progress
from llmprune.recovery import result, training
from llmprune.recovery.folder import WORK_NAME
from llmprune.recovery.keeping import KeepZeros
from llmprune.storage.files import read_index
from llmprune.storage.folders import MANIFEST_NAME, STAGING_NAME
from llmprune.storage.report import Report, load_report

OPTIONS = {"learning_rate": 1e-2, "epochs": 2, "batch_size": 4, "accumulation": 2, "evaluations": 4, "patience": 0}
# What differs between two runs of the same: times and peaks.
TIMED = {"report.json", "report.html", MANIFEST_NAME}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the checkpoint, which the masks beside it are no part of."""
    return {stored.key: stored[...] for stored in read_index(folder).values()}


class Made(NamedTuple):
    """A dense model, a text, the pruned model, and the recovered one."""

    dense: Path
    text: TextSpec
    pruned: Path
    recovered: Path
    report: Report


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("recovery")
    dense = save(build("llama", torch.bfloat16), folder / "dense")
    text = words(folder / "text.txt")
    settings = {"source": text.source, "samples": 4, "length": 16}
    recipe = {"pattern": "2:4", "method": "magnitude", "calibration": settings, "evaluation": None}
    prune(dense, recipe, folder / "pruned")
    before = contents(folder / "pruned"), contents(dense)
    report = recover(
        folder / "pruned", folder / "recovered", text, dense, OPTIONS, evaluation=TextSpec(text.source, None, length=16)
    )
    yield Made(dense, text, folder / "pruned", folder / "recovered", report)
    assert (contents(folder / "pruned"), contents(dense)) == before


def test_kept_weights_are_trained_and_pruned_ones_stay_zero(made: Made) -> None:
    before, after = tensors(made.pruned), tensors(made.recovered)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape)
        assert not tensor.equal(before[name]), name
        if "_proj.weight" in name:
            assert tensor.eq(0).equal(before[name].eq(0)), name
            assert zeros(tensor) == tensor.numel() // 2
    found = made.report.header["recovery"]["zeros"]
    assert found["before"] == found["after"] == sum(zeros(tensor) for tensor in after.values() if tensor.ndim > 1)


def test_it_comes_closer_to_the_dense_model(made: Made) -> None:
    recovery = made.report.header["recovery"]
    perplexity = recovery["perplexity"]
    assert perplexity["recovered"] < perplexity["pruned"]
    assert made.report.dense_perplexity == perplexity["dense"]
    assert made.report.pruned_perplexity == perplexity["recovered"]
    assert recovery["scores"][0]["step"] == 0
    best = min(recovery["scores"], key=lambda score: score["eval_loss"])
    assert best["step"] == recovery["best_step"] > 0
    assert best["eval_loss"] < 0.8 * recovery["scores"][0]["eval_loss"]


def test_the_scores_are_of_the_weights_that_are_written(made: Made) -> None:
    """Scored anew, with transformers alone, in the float32 of training and in the bfloat16 that is stored."""
    recovery = made.report.header["recovery"]
    ids = torch.tensor([json.loads(row) for row in _held_back(made)])
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (made.dense, made.recovered)]
    with torch.no_grad():
        dense, own = (model(input_ids=ids).logits[:, :-1].log_softmax(-1) for model in models)
    score = next(score for score in recovery["scores"] if score["step"] == recovery["best_step"])
    scored = ids[:, 1:] != 1  # BOS only opens a text
    divergence = (dense.exp() * (dense - own)).sum(-1)[scored].mean().item()
    assert divergence == pytest.approx(score["eval_loss"], rel=0.1)


def _held_back(made: Made) -> list[str]:
    from llmprune.models.checkpoint_source import CheckpointSource
    from llmprune.progress import ignore
    from llmprune.recovery.texts import read_training
    from llmprune.text.loading import load_tokenizer

    source = CheckpointSource(made.dense, torch.float32)
    tokens = read_training(made.text, source, load_tokenizer(made.dense), torch.device("cpu"), ignore)
    assert tokens.digest == made.report.header["tokens"]["training"]
    return [json.dumps(row) for row in tokens.ids[-made.report.header["recovery"]["held_back"] :].tolist()]


def test_the_folder_is_a_checkpoint_with_masks_and_a_report(made: Made) -> None:
    names = {file.name for file in made.recovered.iterdir()}
    assert {"config.json", "tokenizer.json", "masks.safetensors", "recipe.yaml", "report.json", "report.html"} <= names
    assert STAGING_NAME not in names
    assert not any("checkpoint" in name for name in names)
    assert load_report(made.recovered).header == json.loads(json.dumps(made.report.header))
    recovery = made.report.header["recovery"]
    assert [point["step"] for point in recovery["losses"]] == list(range(1, recovery["steps"] + 1))
    assert recovery["pruned_by"]["pattern"] == "2:4"
    page = (made.recovered / "report.html").read_text()
    assert 'id="chart-loss"' in page
    assert 'id="chart-held-back"' in page
    assert "zeros kept; perplexity: " in page
    assert "zeros kept; perplexity: " in (made.recovered / "README.md").read_text()
    assert len(compare([made.pruned, made.recovered]).rows) >= 2


def test_all_of_the_text_is_used_unless_a_number_is_given(made: Made) -> None:
    recovery = made.report.header["recovery"]
    available = made.report.header["texts"]["training"]["tokens_available"] // 16
    assert available > 60
    assert recovery["sequences"] + recovery["held_back"] == available
    assert recovery["held_back"] == available // 16


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


def killed_at(step: int) -> Any:
    def watch(progress: Progress) -> None:
        if progress.stage == training.STAGE and progress.layer == step:
            raise Killed

    return watch


def again(made: Made, output: Path, **options: Any) -> Report:
    return recover(
        made.pruned,
        output,
        made.text,
        made.dense,
        OPTIONS,
        evaluation=TextSpec(made.text.source, None, length=16),
        **options,
    )


@pytest.mark.parametrize("step", [3, 12])
def test_a_killed_run_resumes_to_the_same_bytes(made: Made, tmp_path: Path, step: int) -> None:
    with pytest.raises(Killed):
        again(made, tmp_path / "out", watch=killed_at(step))
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(ResumeError, match="--resume"):
        again(made, tmp_path / "out")
    steps: list[int] = []
    report = again(
        made, tmp_path / "out", resume=True, watch=lambda p: steps.append(p.layer) if p.unit == "step" else None
    )
    assert steps[0] == (0 if step == 3 else 10)  # saved every five steps
    kept = {name: data for name, data in contents(made.recovered).items() if name not in TIMED}
    assert {name: data for name, data in contents(tmp_path / "out").items() if name not in TIMED} == kept
    for key in ("losses", "scores", "best_step", "perplexity"):
        assert report.header["recovery"][key] == made.report.header["recovery"][key]


def test_a_run_that_was_killed_while_it_wrote_does_not_train_again(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("llmprune.recovery.finishing.write_result", fail)
        with pytest.raises(Killed):
            again(made, tmp_path / "out")
    monkeypatch.setattr(training.RecoveryTrainer, "train", fail)
    again(made, tmp_path / "out", resume=True)
    kept = {name: data for name, data in contents(made.recovered).items() if name not in TIMED}
    assert {name: data for name, data in contents(tmp_path / "out").items() if name not in TIMED} == kept
    # And a finished run has nothing to do.
    assert again(made, tmp_path / "out", resume=True).header == load_report(tmp_path / "out").header


def test_masks_are_not_made_of_trained_weights(made: Made, tmp_path: Path) -> None:
    """A kept weight that has become zero in the saved state is trained on after the restart."""
    with pytest.raises(Killed):
        again(made, tmp_path / "out", watch=killed_at(12))
    staging = tmp_path / "out" / STAGING_NAME
    masks = (staging / "masks.safetensors").read_bytes()
    assert masks == (made.recovered / "masks.safetensors").read_bytes()
    with pytest.raises(Killed):
        again(made, tmp_path / "out", resume=True, watch=killed_at(13))
    assert (staging / "masks.safetensors").read_bytes() == masks


def test_an_unfinished_state_is_passed_over(made: Made, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        again(made, tmp_path / "out", watch=killed_at(12))
    torn = tmp_path / "out" / WORK_NAME / "checkpoint-99"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 9')
    assert training.last_state(torn.parent) == torn.parent / "checkpoint-10"
    assert not torn.exists()


def test_another_run_is_not_resumed(made: Made, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        again(made, tmp_path / "out", watch=killed_at(1))
    with pytest.raises(ResumeError, match=r"options\.seed was 0 and is now 1"):
        recover(made.pruned, tmp_path / "out", made.text, made.dense, {**OPTIONS, "seed": 1}, resume=True)
    with pytest.raises(ResumeError, match="no run of llmprune recover"):
        recover(made.dense, made.pruned, made.text, made.dense, OPTIONS, resume=True)


def test_weights_that_got_worse_are_not_kept(made: Made, tmp_path: Path) -> None:
    report = recover(
        made.pruned, tmp_path / "out", made.text, made.dense,
        {**OPTIONS, "learning_rate": 3.0, "patience": 2},
    )  # fmt: skip
    recovery = report.header["recovery"]
    assert recovery["best_step"] == 0
    assert recovery["steps"] == 10 < recovery["planned_steps"]  # two evaluations without an improvement
    before, after = tensors(made.pruned), tensors(tmp_path / "out")
    assert all(tensor.equal(before[name]) for name, tensor in after.items())
    assert "no training step has lowered" in (tmp_path / "out" / "report.html").read_text()


def test_cross_entropy_needs_no_dense_model(made: Made, tmp_path: Path) -> None:
    options = {**OPTIONS, "loss": "cross-entropy", "held_back": 0, "epochs": 0.5, "checkpointing": True}
    report = recover(made.pruned, tmp_path / "out", made.text, None, options)
    recovery = report.header["recovery"]
    assert recovery["scores"] == []
    assert recovery["best_step"] == recovery["steps"] == recovery["planned_steps"]
    assert recovery["losses"][-1]["loss"] < recovery["losses"][0]["loss"]
    with pytest.raises(RecoveryError, match=r"the loss kl without a dense model(.|\n)*--teacher"):
        recover(made.pruned, tmp_path / "other", made.text)


@pytest.mark.parametrize("form", ["nm", "bitmask"])
def test_packed_checkpoints_stay_packed(made: Made, tmp_path: Path, form: Any) -> None:
    pack(made.pruned, tmp_path / "packed", form)
    again_packed = recover(tmp_path / "packed", tmp_path / "out", made.text, made.dense, OPTIONS)
    unpack(tmp_path / "out", tmp_path / "unpacked")
    expected = tensors(made.recovered)
    assert all(tensor.equal(expected[name]) for name, tensor in tensors(tmp_path / "unpacked").items())
    assert again_packed.header["recovery"]["zeros"] == made.report.header["recovery"]["zeros"]


def test_zeros_that_are_lost_on_the_way_to_the_file_are_noticed(made: Made, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(result, "positive_zeros", lambda tensor: tensor)
    write = result.write_shard
    monkeypatch.setattr(result, "write_shard", lambda file, kept: write(file, {n: t + 1 for n, t in kept.items()}))
    with pytest.raises(RecoveryError, match="would have fewer zeros than before"):
        recover(made.pruned, tmp_path / "out", made.text, made.dense, {**OPTIONS, "epochs": 0.1})
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_models_and_options_that_do_not_fit_are_refused_early(made: Made, tmp_path: Path) -> None:
    other = save(build("llama", vocab_size=64), tmp_path / "other")
    out = tmp_path / "out"
    with pytest.raises(RecoveryError, match="vocabulary of 128 tokens, and the dense one of 64"):
        recover(made.pruned, out, made.text, other)
    with pytest.raises(RecoveryError, match="the optimizer galore_adamw would bring pruned weights back"):
        recover(made.pruned, out, made.text, made.dense, {"optimizer": "galore_adamw"})
    with pytest.raises(RecoveryError, match="unknown option 'lr'"):
        recover(made.pruned, out, made.text, made.dense, {"lr": 1})
    with pytest.raises(RecoveryError, match="held_back 99 of 75 sequences"):
        recover(made.pruned, out, made.text, made.dense, {"held_back": 99})
    with pytest.raises(ResumeError, match="is the model itself"):
        recover(made.pruned, made.dense, made.text, made.dense, overwrite=True)
    assert not out.exists()


def test_an_interrupted_command_says_how_to_go_on(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.unit == "step" and progress.layer == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(
        "llmprune.cli.console.Display.__call__", lambda self, progress: _noted(self, progress, interrupt)
    )
    common = ["recover", made.pruned, "--teacher", made.dense, "--dataset", made.text.source, "--max-seq-length", 16]
    common += ["--lr", 0.01, "--epochs", 2, "--batch-size", 4, "--accumulation", 2, "--evaluations", 4]
    common += ["--patience", 0, "--output", tmp_path / "out"]
    stopped = run(*common)
    assert stopped.exit_code == 130
    assert "interrupted (recovery, step 7 of 18); continue with --resume" in stopped.stderr
    monkeypatch.undo()
    done = run(*common, "--resume")
    assert done.exit_code == 0, done.stderr
    recovered = tensors(made.recovered)
    assert all(tensor.equal(recovered[name]) for name, tensor in tensors(tmp_path / "out").items())


def _noted(display: Any, progress: Progress, then: Any) -> None:
    display._note(progress)
    then(progress)


def test_running_out_of_memory_names_what_it_needs(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(training.RecoveryTrainer, "train", fail)
    with pytest.raises(DeviceError, match=r"ran out(.|\n)*for weights, gradients, moments(.|\n)*smaller batch_size"):
        recover(made.pruned, tmp_path / "out", made.text, made.dense, OPTIONS)


def test_transformers_says_what_it_said_before(made: Made, tmp_path: Path) -> None:
    verbosity = transformers_logging.get_verbosity()
    recover(made.pruned, tmp_path / "out", made.text, made.dense, OPTIONS)
    assert transformers_logging.get_verbosity() == verbosity


def test_the_command_line(made: Made, tmp_path: Path) -> None:
    common = [made.pruned, "--teacher", made.dense, "--text", made.text.source, "--max-seq-length", 16, "--epochs", 1]
    planned = run("recover", *common, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert (plan["sequences"], plan["held_back"], plan["length"], plan["steps"]) == (71, 4, 16, 9)
    assert plan["memory_bytes"] > 17 * sum(tensor.numel() for tensor in tensors(made.pruned).values())
    assert plan["seconds"] > 0
    assert "71 sequences" in run("recover", *common, "--dry-run").stdout
    done = run("recover", *common, "--lr", 0.01, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert all(words_ in " ".join(done.stdout.split()) for words_ in ("loss of held-back text", "zeros"))
    for plan_only in ([], ["--dry-run"]):
        refused = run("recover", *common, "--output", tmp_path / "out", *plan_only)
        assert (refused.exit_code, "--overwrite" in refused.stderr) == (1, True)
    assert "absent.txt" in run("recover", *common, "--eval-dataset", tmp_path / "absent.txt", "--dry-run").stderr
    assert run("recover", made.pruned, "--output", tmp_path / "x").exit_code == 2


@pytest.mark.parametrize(
    ("evaluation", "words_"), [(TextSpec("/nowhere/text.txt", length=16), "no such file"), (None, "999 tokens")]
)
def test_the_evaluation_text_is_read_before_training(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: TextSpec | None, words_: str
) -> None:
    monkeypatch.setattr(training.RecoveryTrainer, "train", lambda *_, **__: pytest.fail("it has trained"))
    with pytest.raises(CalibrationError, match=words_):
        recover(
            made.pruned, tmp_path / "out", made.text, made.dense, OPTIONS,
            evaluation=evaluation or TextSpec(made.text.source, length=999),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_short_evaluation_text_is_measured_whole(made: Made, tmp_path: Path) -> None:
    whole = Path(made.text.source).read_text()
    Path(tmp_path, "short.txt").write_text(whole[: len(whole) // 8])
    short = TextSpec(str(tmp_path / "short.txt"), length=16)
    report = recover(made.pruned, tmp_path / "out", made.text, made.dense, {**OPTIONS, "epochs": 0.1}, evaluation=short)
    assert 1 < report.header["evaluation"]["dense"]["samples"] < 32


def test_weights_packed_in_8_bits_are_not_trained(made: Made, tmp_path: Path) -> None:
    settings = {"source": made.text.source, "samples": 4, "length": 16}
    recipe = {"pattern": "2:4", "method": "magnitude", "quantise": {"bits": 8}, "calibration": settings}
    prune(made.dense, {**recipe, "evaluation": None}, tmp_path / "quantised")
    pack(tmp_path / "quantised", tmp_path / "packed")
    with pytest.raises(RecoveryError, match=r"packed in 8 bits(.|\n)*--adapter low-rank"):
        recover(tmp_path / "packed", tmp_path / "out", made.text, made.dense, {**OPTIONS, "held_back": 0})
    assert not (tmp_path / "out").exists()


def test_training_that_has_diverged_leaves_no_result(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first steps, the check of zeros sees it; here, it is as after them."""
    monkeypatch.setattr(KeepZeros, "_after_step", lambda *_: None)
    options = {**OPTIONS, "learning_rate": 1e20, "held_back": 0, "loss": "cross-entropy", "epochs": 1}
    with pytest.raises(NumericsError, match=r"training has diverged(.|\n)*lower the learning rate"):
        recover(made.pruned, tmp_path / "out", made.text, None, options)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_dense_model_with_another_tokenizer_is_refused(made: Made, tmp_path: Path) -> None:
    other = shutil.copytree(made.dense, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words_ = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: len(words_) - 1 - number for word, number in words_.items()}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RecoveryError, match=r"another tokenizer(.|\n)*of 1\d\d tokens are the same"):
        recover(made.pruned, tmp_path / "out", made.text, other, OPTIONS)
