"""What a training in stages would take, before it is begun."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmprune.devices import describe_device, runs_per_second
from llmprune.models.sizes import matmul_weights, parameter_count
from llmprune.storage.files import read_index
from llmprune.training.recipe import TrainRecipe
from llmprune.training.rules import Lottery
from llmprune.training.stages import Plan
from llmprune.training.subjects.subject import Subject
from llmprune.training.targets import find_targets

# Bytes for each weight: itself and its gradient in float32, and two moments of AdamW.
_STATE_BYTES = 4 + 4 + 8
# Values kept for the backward pass for each token, in units of the hidden size, by one layer.
_KEPT = 40
# Side of the square matmul by which the device is timed.
_SIDE = 768


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What a training would take.

    Attributes:
        model: as it was given.
        recipe: as it would be used.
        stages: number, sparsity and optimizer steps of each.
        sequences: that are trained on.
        held_back: that are only scored, after each stage.
        length: of each, in tokens, padding included.
        steps: of the optimizer.
        seconds: of all steps, at the speed of large matmuls; small models take several times as long.
        memory_bytes: on one device.
        disk_bytes: in the output folder while it runs.
        device: where it would run.
    """

    model: str
    recipe: Mapping[str, Any]
    stages: tuple[Mapping[str, Any], ...]
    sequences: int
    held_back: int
    length: int
    steps: int
    seconds: float
    memory_bytes: int
    disk_bytes: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return asdict(self)


def memory_needs(subject: Subject, recipe: TrainRecipe) -> int:
    """Bytes on one device: weights, gradients, moments, masks, what a rule has beside them, and activations."""
    config = subject.model.config.get_text_config()
    pruned = _prunable(subject, recipe)
    beside = 1 + 4 * recipe.rule.latent + 16 * bool(recipe.rule.score_rate) + 4 * recipe.rule.watches
    tokens = recipe.options.batch_size * subject.token_count
    layers = int(getattr(config, "num_hidden_layers", 1))
    hidden = 4 * tokens * int(config.hidden_size)
    activations = hidden * (layers + _KEPT) if recipe.options.checkpointing else hidden * _KEPT * layers
    logits = min(tokens * int(config.vocab_size) * 4, 1 << 26) * 5 if subject.measure == "perplexity" else 0
    teacher = 4 * parameter_count(subject.model) if recipe.options.kl_weight else 0
    return _STATE_BYTES * parameter_count(subject.model) + beside * pruned + teacher + activations + logits


def disk_needs(subject: Subject, recipe: TrainRecipe) -> int:
    """Bytes in the output folder: the result, and two saved states with moments and what a rule has beside weights."""
    stored = sum(tensor.nbytes for tensor in read_index(subject.folder).values())
    early = 4 * isinstance(recipe.rule, Lottery)
    beside = 1 + 4 * recipe.rule.latent + 12 * bool(recipe.rule.score_rate)
    return stored + 2 * ((12 + early) * parameter_count(subject.model) + beside * _prunable(subject, recipe))


def _prunable(subject: Subject, recipe: TrainRecipe) -> int:
    """How many weights masks are of, each tied one once."""
    targets = find_targets(subject.model, recipe.include, recipe.exclude)
    return sum({target.name: target.parameter.numel() for target in targets}.values())


def make_plan(name: str, subject: Subject, recipe: TrainRecipe, plan: Plan) -> TrainingPlan:
    """Plan a training.

    Args:
        name: of the model, as it was given.
        subject: whose text has been read.
        recipe: what is done.
        plan: its stages.
    """
    options, held_back = recipe.options, subject.held_back
    trained = plan.steps * options.batch_size * options.accumulation * subject.token_count
    scored = (len(plan.stages) + 1) * held_back * subject.token_count / 3  # forward passes alone
    passes = (8 if options.checkpointing else 6) + (2 if options.kl_weight else 0)
    work = passes * matmul_weights(subject.model) * (trained + scored)
    matrix = torch.ones(_SIDE, _SIDE, device=subject.device)
    rate = runs_per_second(lambda: matrix @ matrix, subject.device) * 2 * _SIDE**3
    stages = tuple({"stage": one.number, "sparsity": one.sparsity, "steps": one.steps} for one in plan.stages)
    return TrainingPlan(
        name, recipe.to_dict(), stages, len(subject.rows) - held_back, held_back, subject.token_count, plan.steps,
        work / rate, memory_needs(subject, recipe), disk_needs(subject, recipe), describe_device(subject.device),
    )  # fmt: skip
