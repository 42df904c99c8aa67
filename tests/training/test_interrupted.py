"""A training that is killed while it saves, or resumed without its masks, ends with the planned zeros or an error."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, save
from torch import Tensor
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from word_texts import words

from llmprune import inspect_checkpoint, keep_zeros, sparsify, train
from llmprune.errors import RecoveryError, TrainingError
from llmprune.recovery.folder import WORK_NAME
from llmprune.recovery.training import last_state
from llmprune.training.sparsifier import STATE_NAME, Sparsifier

# Most trainings here are as long as what is tested needs.
pytestmark = pytest.mark.filterwarnings("ignore:sparsify ends after step")


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


def killed(*_: Any, **__: Any) -> None:
    raise Killed


def test_a_run_that_is_killed_right_after_the_trainer_has_saved_keeps_its_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = save(build("llama"), tmp_path / "dense"), words(tmp_path / "text.txt", 300)
    recipe = {
        "schedule": {"kind": "linear", "stages": 2, "end": 0.5, "every": 2},
        "training": {"batch_size": 4, "held_back": 0},
    }
    with monkeypatch.context() as patch:
        patch.setattr(Sparsifier, "on_save", killed)
        with pytest.raises(Killed):
            train(model, tmp_path / "out", text, recipe)
    state = tmp_path / "out" / WORK_NAME / "checkpoint-2"
    assert {"trainer_state.json", STATE_NAME} <= {file.name for file in state.iterdir()}
    train(model, tmp_path / "out", text, recipe, resume=True)
    rows = [row for row in inspect_checkpoint(tmp_path / "out").rows if ".layers" in row.name and len(row.shape) == 2]
    assert sum(row.zeros for row in rows) == pytest.approx(sum(row.elements for row in rows) / 2, abs=2)


def test_a_state_without_masks_is_not_complete(tmp_path: Path) -> None:
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
        (folder / "weights.safetensors").touch()
    (tmp_path / "checkpoint-5" / STATE_NAME).touch()
    assert last_state(tmp_path, STATE_NAME) == tmp_path / "checkpoint-5"
    assert not (tmp_path / "checkpoint-10").exists()


def test_fewer_zeros_than_planned_are_no_result() -> None:
    model = build("llama")
    masks = sparsify(model, "magnitude", {"stages": 1, "end": 0.5, "every": 1})
    with pytest.raises(TrainingError, match=r"0 of \d+ weights are pruned(.|\n)*50\.0% of them, as planned"):
        masks.require_planned()
    with pytest.warns(UserWarning, match=r"ends after step 0 of 1, .* with 0\.0% .* pruned, of 50\.0%"), masks:
        pass
    with masks:
        model(input_ids=torch.arange(8)[None] + 4)
    masks.require_planned()


@pytest.mark.filterwarnings("ignore:the Trainer takes .* steps, and the schedule")
def test_what_an_interrupted_trainer_leaves_does_not_mask_the_next_training(tmp_path: Path) -> None:
    """It tells its callbacks nothing; a context that is in use, though, is refused a second one."""
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[:, ::2] = 0
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    first, second = TrainerState(), TrainerState()
    keep_zeros(model).on_train_begin(arguments, first, TrainerControl())
    schedule = {"kind": "one-shot", "stages": 1, "end": 0.1, "every": 1}
    with pytest.raises(TrainingError, match=r"sparsify on weights that keep_zeros is in use on(.|\n)*one of them"):
        sparsify(model, "sr-ste", schedule).on_train_begin(arguments, first, TrainerControl())
    masks = sparsify(model, "sr-ste", schedule)
    masks.on_train_begin(arguments, second, TrainerControl())  # of another Trainer: the first one is over
    ids = torch.arange(8)[None] + 4
    model(input_ids=ids, labels=ids).loss.backward()
    assert weight.grad is not None
    assert weight.grad[:, ::2].ne(0).any()
    with keep_zeros(model), pytest.raises(RecoveryError, match="keep_zeros on weights that keep_zeros is in use on"):
        keep_zeros(model).on_train_begin(arguments, second, TrainerControl())
    weight.grad = None
    model(input_ids=ids, labels=ids).loss.backward()
    assert weight.grad[:, ::2].ne(0).any()  # nothing is left


def batches(count: int) -> list[dict[str, Tensor]]:
    rows = [torch.randint(4, 100, (8,), generator=torch.Generator().manual_seed(number)) for number in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def own_trainer(folder: Path, steps: int) -> tuple[Trainer, Sparsifier]:
    """As in a script of a user's, for so many steps of six."""
    torch.manual_seed(0)
    model = build("llama")
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=1, save_steps=3, report_to="none", disable_tqdm=True,
        learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    masks = sparsify(model, "magnitude", {"stages": 2, "end": 0.5, "every": 3})
    trainer = Trainer(model, arguments, train_dataset=batches(6), callbacks=[masks])  # type: ignore[arg-type]
    trainer.args.max_steps = steps
    return trainer, masks


@pytest.mark.filterwarnings("ignore:the Trainer takes .* steps, and the schedule")
def test_a_trainer_that_resumes_from_another_folder_needs_the_masks(tmp_path: Path) -> None:
    own_trainer(tmp_path / "a", 3)[0].train()
    state = tmp_path / "a" / "checkpoint-3"
    trainer, _ = own_trainer(tmp_path / "b", 6)
    with pytest.raises(TrainingError, match=r"resumes at step 3, the masks are of step 0(.|\n)*masks\.load\("):
        trainer.train(resume_from_checkpoint=str(state))
    trainer, masks = own_trainer(tmp_path / "b", 6)
    masks.load(state / STATE_NAME)
    trainer.train(resume_from_checkpoint=str(state))
    assert masks.state.step == 6
    masks.require_planned()
    # A state of the same step, of other weights.
    masks.save(tmp_path / "of-6.safetensors")
    trainer, masks = own_trainer(tmp_path / "c", 6)
    masks.load(state / STATE_NAME)
    for mask in masks.state.kept.values():
        mask.copy_(~mask)
    with pytest.raises(TrainingError, match=r"not zero at step 3: the masks are of another checkpoint"):
        trainer.train(resume_from_checkpoint=str(state))
