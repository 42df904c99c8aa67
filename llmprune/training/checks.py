"""What a training with masks is refused for: arguments of the Trainer, states of another step, masks not as planned."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from llmprune.errors import TrainingError
from llmprune.patterns import NM
from llmprune.storage.files import listed
from llmprune.training.rules import Lottery, Rule, SoftMovement
from llmprune.training.stages import Plan
from llmprune.training.state import State
from llmprune.training.targets import Target

_AGAIN = "start again with --overwrite; if that does not help, report it as a bug"


def require_initialising(model: nn.Module, rule: Rule) -> None:
    """Refuse a new initialisation of a model that does not initialise itself."""
    if isinstance(rule, Lottery) and rule.control == "random-init" and not isinstance(model, PreTrainedModel):
        raise TrainingError(
            f"random-init of a {type(model).__name__}",
            expected="a model of transformers, which initialises its weights",
        )


def require_supported(arguments: TrainingArguments, rule: Rule, plan: Plan, steps: int) -> None:
    """Refuse ways of the Trainer in which masks, or the scores of a rule, do not work; warn of too few steps of it."""
    if arguments.fsdp or arguments.deepspeed:
        raise TrainingError(
            "sparsify with FSDP or DeepSpeed, which shard the weights",
            expected="one device, or a copy of the model on each (DDP)",
            fix="train without them, for example with torchrun alone",
        )
    if arguments.load_best_model_at_end and (len(plan.stages) > 1 or rule.interval):
        raise TrainingError(
            "load_best_model_at_end with masks that change: the best checkpoint may be one with fewer zeros",
            expected="the last weights, which have the masks of the last stage",
            fix="leave it out, and train with keep_zeros(model, masks.masks) for a best one among the pruned",
        )
    if steps < plan.steps:
        warnings.warn(
            f"the Trainer takes {steps} steps, and the schedule {plan.steps}: it ends before the last sparsity",
            stacklevel=3,
        )
    if arguments.fp16 and rule.score_rate:
        raise TrainingError(
            f"{type(rule).__name__} with fp16, which scales the gradients that its scores learn from",
            expected="float32 or bfloat16",
            fix="set bf16=True in place of fp16=True",
        )


def warn_of_early_end(step: int, plan: Plan, sparsity: float) -> None:
    """Warn of a loop that has ended before the last stage has begun: fewer weights are pruned than were asked for."""
    warnings.warn(
        f"sparsify ends after step {step} of {plan.steps}, before its last stage, with {sparsity:.1%} of the weights "
        f"pruned, of {plan.end:.1%} planned: enter it again to go on, or plan as many steps as the loop takes",
        stacklevel=3,
    )


def unpicklable() -> TrainingError:
    """The error for a pickle or a copy: hooks and masks belong to the model that trains in this process."""
    return TrainingError(
        "a context of sparsify cannot be pickled or copied",
        expected="its state in a file",
        fix="save it with masks.save(FILE); sparsify the other model the same way, and call masks.load(FILE)",
    )


def require_continued(
    state: State, weights: Mapping[str, nn.Parameter], step: int, folder: Path, *, may_skip: bool
) -> None:
    """Refuse a Trainer that resumes without the state of its step: training would begin anew with all masks.

    Args:
        state: as it is now.
        weights: that are pruned, by the names of the state.
        step: that the Trainer goes on from; 0: it begins.
        folder: where the state would have been found.
        may_skip: whether the Trainer counts steps that it skips, as it does after an overflow in float16.

    Raises:
        TrainingError: the state is of another step, or pruned weights are not zero.
    """
    if not step:
        return
    fix = 'call masks.load(".../checkpoint-N/sparsifier.safetensors") of the folder that is resumed, before train()'
    if state.step != step and not (may_skip and 0 < state.step < step):
        raise TrainingError(
            f"the Trainer resumes at step {step}, the masks are of step {state.step}, and {folder} has no others",
            expected="the state that was saved with the checkpoint",
            fix=fix,
        )
    if revived := [name for name, weight in weights.items() if bool((weight.detach() != 0)[~state.kept[name]].any())]:
        raise TrainingError(
            f"pruned weights of {listed(revived)} are not zero at step {step}: the masks are of another checkpoint",
            expected="the state that was saved with the checkpoint",
            fix=fix,
        )


def require_planned(
    state: State, targets: Sequence[Target], rule: Rule, plan: Plan, pattern: NM | None, *, solved: bool
) -> None:
    """Refuse a result with fewer zeros than its plan ends with, or in other places than its pattern says.

    Args:
        state: at the end of the training.
        targets: what was pruned.
        rule: soft movement does not say how many weights are pruned.
        plan: of the training.
        pattern: N:M that it ends with; None: zeros may be anywhere.
        solved: a one-shot method has pruned, in place of the rule.

    Raises:
        TrainingError: says how many are missing, or in which matrices.
    """
    kept = {target.matrix.name: target.view(state.kept[target.name]) for target in targets}
    total = sum(mask.numel() for mask in kept.values())
    pruned = total - sum(int(mask.count_nonzero()) for mask in kept.values())
    # Each matrix rounds by itself, and one that a method has pruned row by row rounds in each of them.
    rounded = sum(mask.shape[0] for mask in kept.values()) if solved else len(kept)
    if not isinstance(rule, SoftMovement) and pruned + rounded < plan.end * total:
        raise TrainingError(
            f"{pruned} of {total} weights are pruned after step {state.step}",
            expected=f"{plan.end:.1%} of them, as planned",
            fix=_AGAIN,
        )
    broken = [name for name, mask in kept.items() if pattern and int(_most_kept(mask, pattern)) > pattern.keep]
    if broken:
        raise TrainingError(
            f"{listed(broken)} have groups of {pattern} with more weights after step {state.step}",
            expected=f"zeros in the pattern {pattern}",
            fix=_AGAIN,
        )


def _most_kept(mask: Tensor, pattern: NM) -> Tensor:
    """Of any group of a mask [out, in]."""
    return mask.reshape(-1, pattern.of).sum(1).max()
