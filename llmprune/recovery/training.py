"""Train on transformers' Trainer: its loop, with our loss, our files and our measure of what was won."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from llmprune.devices import freed_memory_kept, resolve_device
from llmprune.errors import LlmpruneError, NumericsError
from llmprune.progress import Progress, Watcher
from llmprune.ranks import TIMEOUT
from llmprune.recovery.keeping import KeepZeros
from llmprune.recovery.objective import UNSCORED, Objective
from llmprune.recovery.optimizers import constructing
from llmprune.recovery.options import RecoveryOptions
from llmprune.storage.files import listed, reading, write_shard
from llmprune.text.tokens import Tokens

_WEIGHTS, _STATE, FINISHED = "weights.safetensors", "trainer_state.json", "finished"
# How many points of the loss are kept.
_POINTS = 100
STAGE = "recovery"
ROW_KEYS = ("input_ids", "labels")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long a training takes.

    Attributes:
        steps: of the optimizer.
        every: steps between two evaluations, after each of which the state is saved.
    """

    steps: int
    every: int

    @classmethod
    def of(cls, options: RecoveryOptions, sequences: int, world: int) -> "Schedule":
        """For so many sequences to train on, on so many devices."""
        batches = math.ceil(math.ceil(sequences / world) / options.batch_size)
        steps = max(1, math.ceil(options.epochs * max(1, math.ceil(batches / options.accumulation))))
        return cls(steps, max(1, math.ceil(steps / options.evaluations)))


def arguments_for(
    options: RecoveryOptions, folder: Path, schedule: Schedule, device: torch.device, autocast: torch.dtype | None
) -> TrainingArguments:
    """The Trainer's arguments; under torchrun, making them joins the other processes.

    Raises:
        RecoveryError: the optimizer's package is not installed.
    """
    arguments = TrainingArguments(
        str(folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(options.warmup * schedule.steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        optim=options.optimizer,
        bf16=autocast == torch.bfloat16,
        fp16=False,
        logging_steps=max(1, schedule.steps // _POINTS),
        logging_nan_inf_filter=False,
        eval_strategy="no" if options.held_back == 0 else "steps",
        eval_steps=schedule.every,
        eval_on_start=options.held_back != 0,
        save_strategy="steps",
        save_steps=schedule.every,
        save_total_limit=1,
        metric_for_best_model=None if options.held_back == 0 else "eval_loss",
        greater_is_better=None if options.held_back == 0 else False,
        seed=options.seed,
        data_seed=options.seed,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
        ddp_timeout=int(TIMEOUT.total_seconds()),  # the others wait while the first process writes and measures
    )
    with constructing(options.optimizer):
        Trainer.get_optimizer_cls_and_kwargs(arguments)  # now, rather than when the models have been loaded
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel would copy the model in every step; torchrun is for several GPUs
    return arguments


@contextmanager
def same_verbosity() -> Iterator[None]:
    """Leave transformers' log level as it is: every Trainer sets it for the whole process."""
    verbosity = transformers_logging.get_verbosity()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


class WeightsTrainer(Trainer):  # type: ignore[misc] # transformers is not typed
    """A Trainer that saves the weights that train, and nothing else of the model."""

    # Whether the result may be of an earlier step, so that weights that are not finite do no harm.
    _goes_back = False
    # What to do where it may not.
    _advice = "lower the learning rate"

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train, with all memory in hand: each step allocates what the last one has freed."""
        with freed_memory_kept():
            return super().train(*arguments, **options)

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer.

        Raises:
            RecoveryError: it cannot be made, for example on this device.
        """
        with constructing(str(getattr(self.args.optim, "value", self.args.optim))):
            return super().create_optimizer(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights that train under the names of the model's own parameters, each tied one once.

        Raises:
            NumericsError: training has diverged, and the result would be of no earlier step.
        """
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        if not self._goes_back:
            _require_finite(trained, self._advice)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_shard(folder / _WEIGHTS, trained)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Called by `train`; the Trainer's own would look for files of `save_pretrained`.
        self.load_weights(Path(resume_from_checkpoint))

    def load_weights(self, folder: Path) -> None:
        """Read what `save_model` wrote into the model."""
        with reading(folder / _WEIGHTS):
            stored = load_file(folder / _WEIGHTS)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(stored[name])


class RecoveryTrainer(WeightsTrainer):
    """The Trainer of a pruned model.

    Args:
        objective: has the model.
        arguments: as `arguments_for` makes them.
        tokens: what is trained on, then what is held back.
        held_back: how many sequences are.
        keeping: keeps the zeros.
        patience: as in the options.
        watch: told about every step.
    """

    _advice = "lower the learning rate, or hold back sequences"

    def __init__(
        self,
        objective: Objective,
        arguments: TrainingArguments,
        tokens: Tokens,
        held_back: int,
        keeping: KeepZeros,
        patience: int,
        watch: Watcher,
    ) -> None:
        rows = rows_of(tokens)
        count = len(rows) - held_back
        self._objective, self._held_back, self._patience = objective, rows[count:], patience
        self._goes_back = held_back > 0
        callbacks: list[TrainerCallback] = [keeping, Teller(watch)]
        super().__init__(
            objective.student.model,
            arguments,
            train_dataset=rows[:count],
            eval_dataset=rows[count:] or None,
            callbacks=callbacks,
            compute_loss_func=self._loss,
        )
        self.remove_callback(PrinterCallback)

    def evaluate(self, *unused: Any, **options: Any) -> dict[str, float]:
        """Score the sequences that are held back: mean loss and mean negative log-likelihood of a token."""
        self.model.eval()
        loss = nats = count = 0.0
        size = self.args.per_device_train_batch_size
        for start in range(0, len(self._held_back), size):
            rows = self._held_back[start : start + size]
            ids, labels = (torch.stack([row[key] for row in rows]).to(self.args.device) for key in ROW_KEYS)
            with torch.no_grad(), self.compute_loss_context_manager():
                sums = self._objective.distances(self.model(input_ids=ids)["hidden"], ids, labels)
            loss, nats, count = loss + sums.loss.item(), nats + sums.nats.item(), count + scored_in(labels)
        metrics = {"eval_loss": loss / max(count, 1), "eval_nats": nats / max(count, 1)}
        self.log(metrics)
        handler: Any = self.callback_handler
        self.control: TrainerControl = handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_training_stop |= self._is_exhausted()
        return metrics

    def run(self) -> int:
        """Train, from the last saved state if there is one, and put the best weights into the model.

        Returns:
            The step that they are from; 0 for the pruned weights, which the model then does not have any more. Without
            evaluations, that of the last.
        """
        folder = Path(self.args.output_dir)
        state, finished = last_state(folder), folder / FINISHED
        if state is not None:
            self.state = TrainerState.load_from_json(str(state / _STATE))
        if state is not None and (finished.exists() or self._is_exhausted()):
            self.load_weights(state)
        else:
            self.args.eval_on_start &= state is None
            self.train(resume_from_checkpoint=None if state is None else str(state))
            if self.args.should_save:
                finished.touch()
        return self._take_best()

    def _scores(self) -> dict[int, float]:
        """The loss of held-back text by step; what is not a number is infinite."""
        found = {entry["step"]: entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry}
        return {step: math.inf if math.isnan(score) else score for step, score in found.items()}

    def _is_exhausted(self) -> bool:
        """Whether the last scores, as many as there is patience, are no better than one before."""
        scores = list(self._scores().values())
        return (
            bool(self._patience) and len(scores) - 1 - scores.index(min(scores)) >= self._patience if scores else False
        )

    def _take_best(self) -> int:
        scores = self._scores()
        if not scores:
            return int(self.state.global_step)
        best = min(scores, key=lambda step: (scores[step], step))  # of equal ones the first: it has trained less
        if best and best != self.state.global_step:
            self.load_weights(Path(self.args.output_dir) / f"checkpoint-{best}")
        return int(best)

    def _loss(self, outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        loss = self._objective.distances(outputs["hidden"], outputs["ids"], labels).loss
        return loss / (scored_in(labels) if num_items_in_batch is None else num_items_in_batch)


class Teller(TrainerCallback):  # type: ignore[misc] # transformers is not typed
    """Tells the watcher about every step.

    Args:
        watch: the watcher.
        stage: what it is told that the steps are of.
    """

    def __init__(self, watch: Watcher, stage: str = STAGE) -> None:
        self._watch, self._stage, self._words = watch, stage, ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._tell(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._tell(state)
        # The Trainer saves after the last step, whatever its number, and scores only after multiples of `eval_steps`.
        control.should_evaluate |= args.do_eval and state.global_step >= state.max_steps

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any], **_: Any) -> None:
        for key, name in (("loss", "loss"), ("eval_loss", "held-back loss")):
            if key in logs:
                self._words = f"{name} {logs[key]:.4f}"
                self._tell(state)

    def _tell(self, state: TrainerState) -> None:
        self._watch(Progress(self._stage, state.global_step, state.max_steps, self._words, unit="step"))


@contextmanager
def first_half_only(objective: Objective) -> Iterator[None]:
    """Have the student's forward return hidden states, which the loss goes on from; DDP and autocast wrap it so."""
    student = objective.student

    def forward(input_ids: Tensor, **unused: Any) -> dict[str, Tensor]:
        return {"hidden": student.body(input_ids), "ids": input_ids}

    student.model.forward = forward
    try:
        yield
    finally:
        del student.model.forward
        vars(student.model).pop("_original_forward", None)  # accelerate's


def _require_finite(weights: Mapping[str, Tensor], advice: str) -> None:
    if broken := [name for name, weight in weights.items() if not bool(weight.detach().isfinite().all())]:
        raise NumericsError(
            f"training has diverged: {listed(broken)} have values that are not finite",
            expected="finite weights",
            fix=f"{advice}, and start again with --overwrite",
        )


def last_state(folder: Path, *needed: str) -> Path | None:
    """The newest state that an interrupted training has saved completely; unfinished ones are removed.

    Args:
        folder: of all states.
        needed: files that a complete state has, besides those of every training.
    """
    found: dict[int, Path] = {}
    for state in folder.glob("checkpoint-*"):
        try:
            for name in (_WEIGHTS, *needed):
                (state / name).stat()
            step = int(json.loads((state / _STATE).read_text("utf-8"))["global_step"])
        except (OSError, ValueError, KeyError):
            shutil.rmtree(state, ignore_errors=True)
            continue
        found[step] = state
    return found[max(found)] if found else None


def rows_of(tokens: Tokens) -> list[dict[str, Tensor]]:
    """Sequences as the Trainer reads them; labels of tokens that only open a text, or a sequence, do not count."""
    labels = tokens.ids.clone()
    labels[:, 0] = UNSCORED
    labels[:, 1:][~tokens.scored(tokens.ids)] = UNSCORED
    return [dict(zip(ROW_KEYS, pair, strict=True)) for pair in zip(tokens.ids, labels, strict=True)]


def scored_in(labels: Tensor) -> int:
    """How many tokens are predicted, of labels [sequences, positions]."""
    return int((labels[:, 1:] != UNSCORED).sum())


def trainer_device(name: str, raised: type[LlmpruneError]) -> torch.device:
    """The device that transformers' Trainer will take.

    Args:
        name: auto, cpu, cuda or cuda:N.
        raised: the class of the error.

    Raises:
        LlmpruneError: of this class, for a GPU other than the first.
        DeviceError: there is no such device.
    """
    device = resolve_device(name)
    if device.type == "cuda" and device.index:
        raise raised(
            f"device {name!r}: transformers' Trainer takes the first GPU that it sees",
            expected="auto, cpu or cuda",
            fix=f"run with CUDA_VISIBLE_DEVICES={device.index}, or on several GPUs with torchrun",
        )
    return device
