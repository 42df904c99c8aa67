"""The Trainer of a model that is pruned in stages: its learning rate, its scores, and when it saves."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmprune.progress import Watcher
from llmprune.recovery.training import Teller, WeightsTrainer, last_state
from llmprune.training.recipe import Cycle
from llmprune.training.sparsifier import STATE_NAME, Sparsifier
from llmprune.training.stages import Plan
from llmprune.training.subjects.subject import Subject

STAGE = "training"


def learning_rate(plan: Plan, cycle: Cycle, warmup: float, step: int) -> float:
    """The learning rate of a step, as a share of its peak: a linear rise, then a cosine to zero.

    Args:
        plan: the stages.
        cycle: over each "stage", or the whole "run".
        warmup: share of the cycle in which it rises, in [0, 1).
        step: counted from 0.
    """
    passed, length = step, plan.steps
    if cycle == "stage":
        stage = plan.at(step)
        passed, length = min(step, stage.end) - stage.begin + stage.skipped, stage.steps + stage.skipped
    rising = round(warmup * length)
    if passed < rising:
        return (passed + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (passed - rising) / max(1, length - rising)))


class StagedTrainer(WeightsTrainer):
    """Trains a subject, scores held-back rows at the end of each stage, and saves the state there.

    Args:
        subject: the model and its rows.
        arguments: the Trainer's.
        sparsifier: the masks.
        cycle: of the learning rate.
        watch: told about every step.
    """

    def __init__(
        self, subject: Subject, arguments: TrainingArguments, sparsifier: Sparsifier, cycle: Cycle, watch: Watcher
    ) -> None:
        count = len(subject.rows) - subject.held_back
        self._subject, self._sparsifier, self._cycle = subject, sparsifier, cycle
        self._held_back = subject.rows[count:]
        callbacks: list[TrainerCallback] = [sparsifier, Teller(watch, STAGE), _StageEnds(sparsifier.plan)]
        super().__init__(
            subject.model,
            arguments,
            train_dataset=subject.rows[:count],
            eval_dataset=self._held_back or None,
            callbacks=callbacks,
            compute_loss_func=self._loss,
        )
        self.remove_callback(PrinterCallback)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate of each step."""
        if self.lr_scheduler is None:
            plan, warmup = self._sparsifier.plan, self._subject.options.warmup
            self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: learning_rate(plan, self._cycle, warmup, step)
            )
        return self.lr_scheduler

    def evaluate(self, *unused: Any, **options: Any) -> dict[str, float]:
        """Score the rows that are held back: mean loss and quality, with the sparsity of now."""
        self.model.eval()
        loss = total = 0.0
        losses = scored = 0
        size = self.args.per_device_train_batch_size
        for start in range(0, len(self._held_back), size):
            rows = self._held_back[start : start + size]
            batch = {key: torch.stack([row[key] for row in rows]).to(self.args.device) for key in rows[0]}
            labels = batch.pop("labels")
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = self.model(**batch)
                part, count = self._subject.loss(outputs, labels)
                points, number = self._subject.score(outputs, labels)
            loss, losses, total, scored = loss + part.item(), losses + count, total + points, scored + number
        metrics = {
            "eval_loss": loss / max(losses, 1),
            f"eval_{self._subject.measure}": self._subject.quality(total / max(scored, 1)),
            "eval_sparsity": self._sparsifier.sparsity,
        }
        self.log(metrics)
        handler: Any = self.callback_handler
        self.control: TrainerControl = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights that train, and the masks with them: only then the Trainer says that a state is complete.

        Raises:
            NumericsError: training has diverged.
        """
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._sparsifier.save(Path(output_dir or self.args.output_dir) / STATE_NAME)

    def run(self) -> None:
        """Train, from the end of the last finished stage if there is one.

        Raises:
            TrainingError: the masks do not fit the plan in the end.
        """
        with self._sparsifier:  # ends it after an exception, of which the Trainer tells no callback
            self._run()
        self._sparsifier.require_planned()

    def _run(self) -> None:
        folder = last_state(Path(self.args.output_dir), STATE_NAME)
        saved = None if folder is None else TrainerState.load_from_json(str(folder / "trainer_state.json"))
        if folder is None or saved is None or saved.global_step < self._sparsifier.plan.steps:
            self.args.eval_on_start &= folder is None
            self.train(resume_from_checkpoint=None if folder is None else str(folder))
            return
        self.state = saved
        self.load_weights(folder)
        self._sparsifier.load(folder / STATE_NAME)

    def _loss(self, outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        loss, count = self._subject.loss(outputs, labels)
        return loss / (count if num_items_in_batch is None else num_items_in_batch)


class _StageEnds(TrainerCallback):  # type: ignore[misc] # transformers is not typed
    """Scores and saves at the end of each stage, and at no other step."""

    def __init__(self, plan: Plan) -> None:
        self._ends = {stage.end for stage in plan.stages}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_evaluate = bool(args.do_eval) and state.global_step in self._ends
        control.should_save = state.global_step in self._ends
