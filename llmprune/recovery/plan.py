"""What a recovery would take, before it is begun: steps, seconds, memory and disk space."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmprune.devices import describe_device, runs_per_second
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.sizes import matmul_weights, parameter_count
from llmprune.recovery.adapters import trained_numbers
from llmprune.recovery.options import RecoveryOptions
from llmprune.recovery.training import Schedule

# Bytes for each weight: itself and its gradient in float32, two moments of AdamW, one of its mask.
_STATE_BYTES = 4 + 4 + 8 + 1
# With adapters: itself, its mask, and the product of its adapter, kept for the backward pass as it is and masked.
_ADAPTED_BYTES = 4 + 1 + 2 * 4
# Values kept for the backward pass for each token, in units of the hidden size, by one decoder layer.
_KEPT = 40
# Side of the square matmul by which the device is timed.
_SIDE = 768


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """What a recovery would take.

    Attributes:
        model: the pruned model.
        teacher: the dense one; empty if none is needed.
        options: as they would be used.
        sequences: that are trained on.
        held_back: that are only scored.
        length: of each, in tokens.
        steps: of the optimizer, if it is not stopped early.
        seconds: of all steps and evaluations, at the speed of large matmuls; small models take several times as long.
        memory_bytes: of weights, gradients, moments, masks, activations and logits, on one device.
        disk_bytes: in the output folder while it runs.
        device: where it would run.
    """

    model: str
    teacher: str
    options: Mapping[str, Any]
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


def memory_needs(
    source: CheckpointSource, teacher: CheckpointSource | None, options: RecoveryOptions, length: int
) -> int:
    """Bytes that training takes on one device, with AdamW; adapters themselves are not counted.

    Args:
        source: of the pruned model.
        teacher: of the dense one, if it is needed.
        options: of the training.
        length: of the sequences, in tokens.
    """
    config = source.config.get_text_config()
    layers, tokens = len(source.layers), options.batch_size * length
    hidden = 4 * tokens * config.hidden_size
    # With checkpointing, the input of each layer is kept, and one layer is computed again at a time.
    activations = hidden * (layers + _KEPT) if options.checkpointing else hidden * _KEPT * layers
    logits = min(tokens * config.vocab_size * 4, 1 << 26) * 5
    dense = 0 if teacher is None else parameter_count(teacher.model) * teacher.dtype.itemsize
    state = _STATE_BYTES if options.adapter == "none" else _ADAPTED_BYTES
    return parameter_count(source.model) * state + dense + activations + logits


def disk_needs(source: CheckpointSource, options: RecoveryOptions) -> int:
    """Bytes in the output folder: the result, and up to three saved states with weights that train and their moments.

    Raises:
        RecoveryError: the model has no layers that could have an adapter.
    """
    every = options.adapter == "none"
    trained = parameter_count(source.model) if every else trained_numbers(source.decoder, options.rank)
    return source.sizes()["stored_bytes"] + 3 * 12 * trained


def seconds_for(
    source: CheckpointSource,
    teacher: CheckpointSource | None,
    options: RecoveryOptions,
    tokens: int,
    device: torch.device,
) -> float:
    """How long it takes to train on so many tokens, counting matmuls alone, at a speed that is measured now."""
    passes = 8 if options.checkpointing else 6
    work = float(passes) * matmul_weights(source.model) + (
        0.0 if teacher is None else 2.0 * matmul_weights(teacher.model)
    )
    matrix = torch.ones(_SIDE, _SIDE, device=device)
    rate = runs_per_second(lambda: matrix @ matrix, device) * 2 * _SIDE**3
    return work * tokens / rate


def make_plan(
    names: tuple[str, str],
    source: CheckpointSource,
    teacher: CheckpointSource | None,
    options: RecoveryOptions,
    shape: tuple[int, int],
    device: torch.device,
    world: int,
) -> RecoveryPlan:
    """Plan a recovery on sequences of a shape.

    Args:
        names: of the pruned and of the dense model, as they were given.
        source: of the pruned model.
        teacher: of the dense one, if it is needed.
        options: of the training.
        shape: (sequences, tokens in each), held-back ones included.
        device: where it runs.
        world: how many processes train together.
    """
    sequences, length = shape
    held_back = options.kept_back(sequences)
    schedule = Schedule.of(options, sequences - held_back, world)
    trained = schedule.steps * options.batch_size * options.accumulation * length
    scored = (options.evaluations + 1) * held_back * length / 3  # forward passes alone
    seconds = seconds_for(source, teacher, options, trained + math.ceil(scored), device)
    return RecoveryPlan(
        *names, asdict(options), sequences - held_back, held_back, length, schedule.steps, seconds,
        memory_needs(source, teacher, options, length), disk_needs(source, options), describe_device(device),
    )  # fmt: skip
