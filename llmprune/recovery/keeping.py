"""Keep the zeros of a model in training, with the user's own loop or transformers' Trainer.

Gradients are masked by hooks of the tensors, before they are accumulated: so the norm that clipping measures is that
of the kept weights, and moments of pruned weights stay zero. After each step of any optimizer of torch the weights are
masked as well, once more than should be necessary, and an optimizer that has moved pruned weights is refused.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmprune.errors import NumericsError, RecoveryError
from llmprune.models.in_memory import require_parameters, unwrapped
from llmprune.paths import user_path
from llmprune.recovery.hooks import Hooks
from llmprune.recovery.masks import (
    Masks,
    load_masks,
    mask_,
    masked,
    masks_of,
    require_fitting,
    require_zeros,
    save_masks,
    share_of_zeros,
    warn_of_few_zeros,
    weights_of,
)
from llmprune.recovery.optimizers import require_keeping, require_known, revived_by
from llmprune.storage.files import listed

# After so many steps that could move weights, an optimizer is known to keep zeros; each check waits for the device.
_CHECKED_STEPS = 10


def keep_zeros(model: nn.Module, masks: str | Path | Masks | None = None) -> "KeepZeros":
    """Keep the pruned weights of a model at zero while it trains.

    The result is a context for a training loop, and a callback for transformers' Trainer. It works with every optimizer
    of torch that treats each weight by itself, made before or inside the context, and refuses the others at their first
    step. Tied weights are one. Biases, norms and matrices without zeros train as ever.

    Small steps are lost in 16-bit weights: in bfloat16, adding 1e-5 to a weight of 0.01 leaves it as it was. Load the
    model in float32, and compute in 16 bits if you like (autocast, or bf16=True of the Trainer).

    Args:
        model: pruned, on one device or to be copied to each (DDP); it may be moved to another device afterwards.
        masks: None: all weights that are now zero are pruned. If training is resumed, they are no longer known from the
            weights: give the file that `KeepZeros.save` wrote, or parameter name -> bool in its shape, True for pruned.

    Raises:
        NumericsError: training has diverged in one of an optimizer's first steps.
        RecoveryError: the model has no zeros, whole rows of embeddings aside; a matrix that trains is all zero, as the
            second factor of a new LoRA is; weights are not whole in memory; a mask does not fit; pruned weights are not
            zero.
        CheckpointError: the file cannot be read, or is of another model.
        ModelError: weights are computed from other tensors, such as the masks of torch.nn.utils.prune.

    Example:
        >>> with keep_zeros(model):  # doctest: +SKIP
        ...     for batch in batches:
        ...         model(**batch).loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[keep_zeros(model)]).train()  # doctest: +SKIP
    """
    model = unwrapped(model)
    require_parameters(model)
    if masks is None:
        masks = masks_of(model)
        _require_some(model, masks)
    elif isinstance(masks, str | Path):
        masks = load_masks(user_path(masks, RecoveryError, expected="a file of masks"), model)
    return KeepZeros(model, masks)


class KeepZeros(TrainerCallback):  # type: ignore[misc] # transformers is not typed
    """A context, and a callback of transformers' Trainer, in which pruned weights stay zero; see `keep_zeros`.

    Args:
        model: whose pruned weights are zero.
        masks: parameter name -> bool in its shape, True for pruned.

    Attributes:
        masks: the same, each on the device of its parameter.

    Raises:
        RecoveryError: a mask does not fit, pruned weights are not zero, or weights are not whole in memory.
    """

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        require_fitting(model, masks)
        self._model = model
        self._weights = {name: weight for name, weight in weights_of(model) if name in masks}
        require_zeros(self._weights, masks)
        self._names = {id(weight): name for name, weight in self._weights.items()}
        self.masks: dict[str, Tensor] = dict(masks)
        self._hooks = Hooks("keep_zeros", self._weights.values(), RecoveryError)
        # Optimizer -> [whether it had state at its first step here, steps that are checked so far].
        self._seen: WeakKeyDictionary[Optimizer, list[int]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type["KeepZeros"], tuple[nn.Module, dict[str, Tensor]]]:
        # Hooks belong to the model of this process: a copy begins anew, with its own.
        return type(self), (self._model, self.masks)

    def __enter__(self) -> "KeepZeros":
        self._start()
        return self

    def _start(self, run: object = None) -> None:
        self._warn_of_16_bits()
        self._hooks.begin(run)
        for name, weight in self._weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(self._mask(name), 0)
            if weight.requires_grad:
                self._hooks.add(weight.register_hook(self._gradient_hook(name)))
        self._hooks.add(
            register_optimizer_step_pre_hook(self._before_step), register_optimizer_step_post_hook(self._after_step)
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.end()
        if error is None:
            self.require_zeros()

    def require_zeros(self) -> None:
        """Refuse pruned weights that are not zero.

        Raises:
            RecoveryError: names their matrices.
        """
        # An adapter gives weights other names; whoever puts others in their place keeps the names.
        named = {name: weight for name, weight in weights_of(self._model) if name in self.masks}
        require_zeros({**self._weights, **named}, self.masks)

    def save(self, file: str | Path) -> None:
        """Write the masks, for a later run that continues this one.

        Raises:
            CheckpointError: it cannot be written.
        """
        save_masks(user_path(file, RecoveryError, expected="a file of masks"), self.masks)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Begin as the Trainer does.

        Raises:
            RecoveryError: its optimizer, or the way it distributes the weights, does not keep zeros; another context
                has the weights; or it trains another model.
        """
        if args.fsdp or args.deepspeed:
            raise RecoveryError(
                "keep_zeros with FSDP or DeepSpeed, which shard the weights",
                expected="one device, or a copy of the model on each (DDP)",
                fix="train without them, for example with torchrun alone",
            )
        self._hooks.require_in(more.get("model"))
        optimizer = more.get("optimizer")
        require_known(str(getattr(args.optim, "value", args.optim)))
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if isinstance(optimizer, Optimizer):
            require_keeping(optimizer)
        self._start(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Refuse a checkpoint in which pruned weights are not zero."""
        self.require_zeros()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """End as the Trainer does, and check the zeros."""
        self.__exit__(None, None, None)

    def _mask(self, name: str) -> Tensor:
        """On the device that its weight is on by now."""
        device = self._weights[name].device
        if self.masks[name].device != device:
            self.masks[name] = self.masks[name].to(device)
        return self.masks[name]

    def _gradient_hook(self, name: str) -> Callable[[Tensor], Tensor]:
        return lambda gradient: masked(gradient, ~self._mask(name))

    def _names_in(self, optimizer: Optimizer) -> list[str]:
        """The masked weights that an optimizer may change now: those with a learning rate other than zero."""
        groups = (group for group in optimizer.param_groups if float(group.get("lr", 1.0)) != 0)
        weights = (weight for group in groups for weight in group["params"])
        return [self._names[id(weight)] for weight in weights if id(weight) in self._names]

    def _before_step(self, optimizer: Optimizer, args: object, options: object) -> None:
        weights = [
            weight for group in optimizer.param_groups for weight in group["params"] if id(weight) in self._names
        ]
        if optimizer in self._seen or not weights:
            return
        require_keeping(optimizer)
        self._seen[optimizer] = [int(any(weight in optimizer.state for weight in weights)), 0]

    def _after_step(self, optimizer: Optimizer, args: object, options: object) -> None:
        if optimizer not in self._seen or not (names := self._names_in(optimizer)):
            return
        had_state, steps = self._seen[optimizer]
        with torch.no_grad():
            moved = self._moved(names) if steps < _CHECKED_STEPS else 0
            for name in names:
                mask_(self._weights[name], ~self._mask(name))
        if moved and not all(bool(self._weights[name].isfinite().all()) for name in names):
            # Clipping has multiplied the zeros by the norm of gradients that are not finite.
            raise NumericsError(
                "training has diverged: weights are not finite after a step",
                expected="finite gradients",
                fix="lower the learning rate, or begin with a longer warm-up",
            )
        if moved:
            raise revived_by(optimizer, moved, had_state=bool(had_state), by_hand=self._has_gradients(names))
        self._seen[optimizer] = [had_state, steps + 1]

    def _moved(self, names: list[str]) -> int:
        counts = [(self._weights[name] != 0).logical_and_(self._mask(name)).sum() for name in names]
        return int(torch.stack([count.to(counts[0].device) for count in counts]).sum())

    def _has_gradients(self, names: list[str]) -> bool:
        """Whether pruned weights have gradients, which those of a backward pass have not."""
        found = ((self._weights[name].grad, self._mask(name)) for name in names)
        return any(gradient is not None and bool((gradient != 0)[mask].any()) for gradient, mask in found)

    def _warn_of_16_bits(self) -> None:
        small = [name for name, weight in self._weights.items() if weight.requires_grad and weight.itemsize < 4]
        if small:
            dtype = str(self._weights[small[0]].dtype).removeprefix("torch.")
            warnings.warn(
                f"{len(small)} pruned matrices train in {dtype}, where steps below 1/256 of a weight are lost "
                "(1/2048 in float16): load the model in float32, and compute in 16 bits with autocast",
                stacklevel=4,
            )


def _require_some(model: nn.Module, masks: Masks) -> None:
    if not (share := share_of_zeros(model, masks)):
        raise RecoveryError(
            "the model has no zeros to keep" + " but whole rows of its embeddings" * bool(masks),
            expected="a pruned model, before it is trained",
            fix="load the pruned checkpoint; if structures were removed instead of weights, train it like any other",
        )
    warn_of_few_zeros(share)
    weights = dict(weights_of(model))
    empty = [name for name, mask in masks.items() if bool(mask.all()) and weights[name].requires_grad]
    if empty:
        raise RecoveryError(
            f"all weights of {listed(empty)} are zero, and would stay so",
            expected="pruned matrices with weights to train; the second factor of a new LoRA is all zero",
            fix="make keep_zeros before the adapter is added, freeze these with requires_grad_(False), or pass masks",
        )
