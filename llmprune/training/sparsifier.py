"""Masks that change while a model trains, with the user's own loop or transformers' Trainer.

Between two steps the model's own parameters are those of the pruned model: it can be evaluated and saved as it is. A
rule whose pruned weights keep values has them beside; they are in the parameters only while the optimizer takes a step.
Gradients are taken where they arise, before they are accumulated and masked, so that clipping measures kept weights.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmprune.errors import TrainingError
from llmprune.models.in_memory import unwrapped
from llmprune.paths import user_path
from llmprune.recovery.hooks import ForwardHook, Hooks
from llmprune.recovery.masks import mask_, masked
from llmprune.recovery.optimizers import require_keeping
from llmprune.training import checks
from llmprune.training.gradients import accumulates, average
from llmprune.training.rules import Lottery, Rule, Selection
from llmprune.training.rules.lottery import random_ticket
from llmprune.training.rules.rule import Loss, Moment
from llmprune.training.stages import Plan, Stage
from llmprune.training.state import State
from llmprune.training.targets import Target, require_trained

STATE_NAME = "sparsifier.safetensors"

# Prunes the model in place to a sparsity.
Solver = Callable[[float], None]


class Sparsifier(TrainerCallback):  # type: ignore[misc] # transformers is not typed
    """A context, and a callback of transformers' Trainer, in which masks follow a rule.

    Args:
        model: that trains.
        targets: what is pruned in it.
        rule: how masks are chosen.
        plan: when, and how many weights they prune.
        selection: which weights are compared.
        loss: of a batch, for rules that need one before training.
        solve: prunes the model in place when a stage begins, in place of the rule.
        seed: of random choices.

    Attributes:
        plan: the same.
        state: masks and all else that training has besides the model.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        rule: Rule,
        plan: Plan,
        selection: Selection,
        *,
        loss: Loss | None = None,
        solve: Solver | None = None,
        seed: int = 0,
    ) -> None:
        for target in targets:
            if selection.pattern is not None:
                selection.pattern.check(target.matrix.shape)
        self._called, self._model = model, unwrapped(model)
        self._targets, self._rule, self._selection = targets, rule, selection
        self._solve, self._seed, self.plan = solve, seed, plan
        self._weights = {target.name: target.parameter for target in targets}
        self._ids = {id(weight) for weight in self._weights.values()}
        self.state = State(self._weights, latent=rule.latent, seed=seed)
        if not rule.grows:
            self._take_first_zeros()
        self.state.scores = rule.first_scores(self._weights, loss)
        if rule.score_rate:
            self.state.train_scores(rule.score_rate)
        # Gradients of all weights, summed since the last step, of rules that watch or learn.
        self._dense: dict[str, Tensor] = {}
        # The stage that the masks are of; -1: none yet.
        self._stage = -1
        # Optimizer state that the next step must not use: of these weights, or all of it.
        self._stale: dict[str, Tensor] | None = {}
        self._hooks = Hooks("sparsify", self._weights.values(), TrainingError)
        self._busy = False
        # The last file that was saved, and its step: a Trainer of ours saves it before it calls `on_save`.
        self._saved: tuple[Path, int] | None = None
        # The optimizer that took the last step, and those before it.
        self._optimizer: ref[Optimizer] | None = None
        self._retired: WeakSet[Optimizer] = WeakSet()
        checks.require_initialising(self._model, rule)
        if isinstance(rule, Lottery) and rule.rewind == 0:
            self._remember()

    def __enter__(self) -> "Sparsifier":
        self._start()
        return self

    def _start(self, run: object = None) -> None:
        require_trained(self._targets, self._rule)
        self.state.move_to(self._weights)
        self._hooks.begin(run)
        trained = ((name, weight) for name, weight in self._weights.items() if weight.requires_grad)
        self._hooks.add(*(weight.register_hook(self._gradient_hook(name)) for name, weight in trained))
        self._hooks.add(
            self._called.register_forward_pre_hook(ForwardHook(self._before_forward)),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.end()
        if error is None and self._stage < self.plan.stages[-1].number:
            checks.warn_of_early_end(self.state.step, self.plan, self.sparsity)

    def __reduce__(self) -> NoReturn:
        raise checks.unpicklable()

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that is pruned now."""
        pruned = sum(mask.numel() - int(mask.count_nonzero()) for mask in self.state.kept.values())
        return pruned / sum(mask.numel() for mask in self.state.kept.values())

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name of a parameter -> bool in its shape, True for pruned, as `keep_zeros` takes them."""
        return {name: ~mask for name, mask in self.state.kept.items() if not bool(mask.all())}

    def require_planned(self) -> None:
        """Refuse to end with other masks than planned.

        Raises:
            TrainingError: fewer weights are pruned.
        """
        pattern, solved = self._selection.pattern, self._solve is not None
        checks.require_planned(self.state, self._targets, self._rule, self.plan, pattern, solved=solved)

    def save(self, file: str | Path) -> None:
        """Write masks, scores and the weights behind the masks, for a later process that continues this training.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = user_path(file, TrainingError, expected="a file for the state")
        self.state.save(path)
        self._saved = path, self.state.step

    def load(self, file: str | Path) -> None:
        """Continue from what `save` wrote; the model must have its weights of that step.

        Raises:
            CheckpointError: the file cannot be read, or is of another training.
        """
        self.state.load(user_path(file, TrainingError, expected="a file of a state"))
        # A stage whose last step is behind has ended; the next begins with the next forward pass.
        self._stage = self.plan.at(self.state.step - 1).number if self.state.step else -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Begin as the Trainer does, from the state in its checkpoint if there is one.

        Raises:
            TrainingError: it shards the weights or scales the gradients of scores, or resumes without the state of
                its step; another context has the weights; or it trains another model.
        """
        checks.require_supported(args, self._rule, self.plan, int(state.max_steps))
        self._hooks.require_in(more.get("model"))
        folder, step = Path(args.output_dir) / f"checkpoint-{state.global_step}", int(state.global_step)
        if step and step != self.state.step and (folder / STATE_NAME).exists():
            self.load(folder / STATE_NAME)
        checks.require_continued(self.state, self._weights, step, folder, may_skip=bool(args.fp16))
        self._start(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Save the state with the Trainer's checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir() and self._saved != (folder / STATE_NAME, self.state.step):
            self.save(folder / STATE_NAME)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """End as the Trainer does."""
        self._hooks.end()

    def _gradient_hook(self, name: str) -> Callable[[Tensor], Tensor]:
        def take(gradient: Tensor) -> Tensor:
            if self._reads_gradients():
                # What was accumulated is gone if the user has dropped it, as after a step that was skipped. A gradient
                # that is passed on belongs to the weight, which adds to it in place.
                before = self._dense.get(name) if accumulates(self._weights[name]) else None
                own = gradient.detach().clone() if self._rule.passes else gradient.detach()
                self._dense[name] = own if before is None else before + own
            return gradient if self._rule.passes else masked(gradient, self.state.kept[name])

        return take

    def _reads_gradients(self) -> bool:
        """Whether the step that comes next needs the gradients of pruned weights, too."""
        return bool(self._rule.score_rate) or (self._rule.watches and self._is_due(self.state.step + 1))

    def _is_due(self, step: int) -> bool:
        """Whether masks are chosen anew after a step within a stage."""
        interval = self._rule.interval
        return bool(interval) and step % interval == 0 and self.plan.at(step).number == self._stage

    def _holds(self, optimizer: Optimizer) -> bool:
        return any(id(weight) in self._ids for group in optimizer.param_groups for weight in group["params"])

    def _before_forward(self, model: nn.Module, inputs: object) -> None:
        stage = self.plan.at(self.state.step)
        waits = self._busy or stage.number == self._stage or self.state.step >= self.plan.steps
        if waits or not torch.is_grad_enabled():
            return
        with self._alone():
            self._begin(stage)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No stage begins while another does: a solver runs the model, too."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _begin(self, stage: Stage) -> None:
        """Prune for a stage, before its first forward pass."""
        last, self._stage = stage.number == self.plan.stages[-1].number, stage.number
        if stage.sparsity == 0:
            return
        if self._solve is not None:
            self._solve(stage.sparsity)
            self._take_zeros()
            return
        self._choose(stage, begins=True)
        rule = self._rule
        if isinstance(rule, Lottery) and stage.number:
            if last and rule.control == "random-ticket":
                pattern = self._selection.pattern
                self._set_masks(random_ticket(self._views(self.state.kept), self.state.generator, pattern))
            self._rewind(fresh=last and rule.control == "random-init")
        self._restore()
        self._show()

    @torch.no_grad()
    def _take_zeros(self) -> None:
        """The masks that a solver has left in the weights; what it has kept may have changed as well."""
        for name, weight in self._weights.items():
            self.state.kept[name].copy_(weight != 0)
        self._stale = {name: ~mask for name, mask in self.state.kept.items()}

    @torch.no_grad()
    def _take_first_zeros(self) -> None:
        """The zeros of a model that is pruned already; a matrix of nothing else has yet to be trained, as in a LoRA."""
        for target in self._targets:
            filled = target.view(target.parameter) != 0
            if bool(filled.any()):
                target.view(self.state.kept[target.name]).copy_(filled)

    @torch.no_grad()
    def _choose(self, stage: Stage, *, begins: bool) -> None:
        weights = self.state.latent if self._rule.latent else self._weights
        moment = Moment(
            self.state.step, self.plan.steps, begins, stage.sparsity, self.plan.end, self._selection,
            self._views(weights), self._views(self.state.kept), self._views(self._dense),
            self._views(self.state.scores), self.state.generator,
        )  # fmt: skip
        self._set_masks(self._rule.choose(moment))

    def _views(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            target.matrix.name: target.view(tensors[target.name].detach())
            for target in self._targets
            if target.name in tensors
        }

    @torch.no_grad()
    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        before = {} if self._rule.latent else {name: mask.clone() for name, mask in self.state.kept.items()}
        for target in self._targets:
            target.view(self.state.kept[target.name]).copy_(masks[target.matrix.name])
        # Moments of what was or is pruned would move zeros, or grown weights by gradients of the past.
        self._stale = {name: ~(mask & self.state.kept[name]) for name, mask in before.items()}

    @torch.no_grad()
    def _restore(self) -> None:
        """Put the weights behind the masks back, if the rule has any."""
        for name, latent in self.state.latent.items():
            self._weights[name].copy_(latent)

    @torch.no_grad()
    def _show(self) -> None:
        """Have the model compute with the pruned weights; until now it has those behind the masks."""
        for name, weight in self._weights.items():
            mask_(weight, self.state.kept[name])

    @torch.no_grad()
    def _rewind(self, *, fresh: bool) -> None:
        """Go back to early weights, or to newly initialised ones, with the masks of now."""
        source = initialised(self._model, self._seed + 1) if fresh else self.state.early
        for name, parameter in self._model.named_parameters():
            if name in source:
                parameter.copy_(source[name])
        self._stale = None

    def _remember(self) -> None:
        self.state.early = {
            name: parameter.detach().cpu().clone()
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: object, options: object) -> None:
        if not self._holds(optimizer):
            return
        if not self._rule.latent:
            require_keeping(optimizer)
        self._require_one(optimizer)
        self._forget(optimizer)
        average(self._dense)
        if self.state.adam is not None:
            self._step_scores(self.state.adam)
        self._restore()
        for name, weight in self._weights.items():
            if self._rule.passes and weight.grad is not None:
                weight.grad.copy_(self._rule.gradient(weight.grad, weight, self.state.kept[name]))

    def _require_one(self, optimizer: Optimizer) -> None:
        """Refuse optimizers that take turns: each step of one would count as one of the training."""
        if optimizer in self._retired:
            raise TrainingError(
                f"two optimizers, {type(optimizer).__name__} and another, hold weights that are pruned",
                expected="one for all of them, whose steps the schedule counts; a new one may take its place",
                fix="give all of these weights to one optimizer, in groups if they differ in learning rate",
            )
        if self._optimizer is not None and (last := self._optimizer()) is not None and last is not optimizer:
            self._retired.add(last)
        self._optimizer = ref(optimizer)

    def _forget(self, optimizer: Optimizer) -> None:
        """Drop the state of weights that have been pruned, grown or set anew since the last step."""
        if self._stale is None:
            optimizer.state.clear()
        for name, places in (self._stale or {}).items():
            weight = self._weights[name]
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(places, 0)
        self._stale = {}

    def _step_scores(self, adam: torch.optim.Adam) -> None:
        stage = self.plan.at(self.state.step)
        penalty = self._rule.penalty(self.state.scores, stage.sparsity / self.plan.end)
        for name, score in self.state.scores.items():
            score.grad = None
            if name in self._dense:
                score.grad = self._dense[name] * self.state.latent[name]
                if name in penalty:
                    score.grad += penalty[name]
        adam.step()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: object, options: object) -> None:
        if not self._holds(optimizer):
            return
        for name, latent in self.state.latent.items():
            latent.copy_(self._weights[name])
        self.state.step += 1
        if self.state.step > self.plan.steps:
            self._show()
            return
        if self._is_due(self.state.step):
            self._choose(self.plan.at(self.state.step), begins=False)
            self._forget(optimizer)
        self._show()
        self._dense = {}
        if isinstance(self._rule, Lottery) and self.state.step == self._rule.rewind:
            self._remember()


def initialised(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The parameters of a model of the same configuration, newly initialised."""
    assert isinstance(model, PreTrainedModel)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(model)(copy.deepcopy(model.config))
    return dict(fresh.named_parameters())
