"""Prune while training, in the user's own loop or with transformers' Trainer: the front door."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from llmprune.errors import TrainingError
from llmprune.models.in_memory import require_parameters, unwrapped
from llmprune.patterns import NM
from llmprune.training.reading import read_rule, read_schedule, read_selection
from llmprune.training.rules import Rule, Schedule
from llmprune.training.rules.rule import Loss
from llmprune.training.sparsifier import Sparsifier
from llmprune.training.stages import Plan
from llmprune.training.targets import find_targets


def sparsify(
    model: nn.Module,
    rule: str | Mapping[str, Any] | Rule = "magnitude",
    schedule: Schedule | Mapping[str, Any] | None = None,
    *,
    pattern: str | NM | None = None,
    scope: str | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    loss: Loss | None = None,
    seed: int = 0,
) -> Sparsifier:
    """Prune a model while it trains.

    The result is a context for a training loop, and a callback for transformers' Trainer. Steps are those of the
    optimizer. A stage begins with the first forward pass with gradients after the one before it, so that the model may
    be measured at the end of each, under torch.no_grad.

    Args:
        model: any model with layers in a torch.nn.ModuleList, in float32, on one device or to be copied to each (DDP).
        rule: a name of `RULES`, such as "movement", a name with its knobs, such as {"rigl": {"interval": 50}}, or a
            rule.
        schedule: or its keys; `every` must be given. With a pattern, `end` is the pattern's sparsity.
        pattern: N:M, such as "2:4"; None: any weight may be zero.
        scope: "matrix" or "model", which weights are compared; None: as the rule's paper does.
        include: shell globs of the names of matrices that are pruned.
        exclude: globs of included matrices that stay dense.
        loss: of a batch with its logits divided by a temperature, a scalar with a graph, for snip and grasp.
        seed: of random choices.

    Raises:
        TrainingError: a value is out of range, or the model has no matrices to prune.
        ModelError: weights are computed from other tensors, such as the masks of torch.nn.utils.prune.
        PatternError: the pattern does not fit a matrix.

    Example:
        >>> with sparsify(model, "movement", {"stages": 10, "end": 0.9, "every": 50}):  # doctest: +SKIP
        ...     for batch in batches:
        ...         model(**batch).loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """
    chosen = read_rule(rule)
    selection = read_selection(chosen, pattern, scope)
    plan_schedule = read_schedule(schedule, selection)
    if plan_schedule.every is None:
        raise TrainingError("schedule.every is missing", expected="optimizer steps of each stage, such as 100")
    plan = Plan.of(plan_schedule, chosen, plan_schedule.every)
    require_parameters(unwrapped(model))
    targets = find_targets(unwrapped(model), include, exclude)
    return Sparsifier(model, targets, chosen, plan, selection, loss=loss, seed=seed)
