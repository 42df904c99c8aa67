"""What a rotation would need, without running it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.devices import describe_device
from llmprune.models.decoder import prunable_matrices
from llmprune.models.sizes import ends_bytes
from llmprune.pruning.forecast.rates import measure_rates
from llmprune.pruning.rotation.rotate import Rotatable, RotationJob, lone_job, open_rotatable
from llmprune.pruning.rotation.terms import fitting
from llmprune.recipe.rotation import RotationOptions
from llmprune.storage.hub import resolve_model
from llmprune.stream.stream import StreamSettings
from llmprune.text.loading import check_texts, model_positions
from llmprune.text.tokens import TextSpec


@dataclass(frozen=True, slots=True)
class RotationPlan:
    """What `rotate` would do and need.

    Attributes:
        model: as the user gave it.
        options: of the rotation, as in a recipe.
        device: where it is computed.
        hidden_size: channels of the residual stream.
        layers: decoder layers.
        rotated_values: layers in which the values of the KV heads are rotated, too.
        untied_bytes: by which the checkpoint grows; 0 if its embeddings are not tied.
        tokens: of the calibration text.
        term_bytes: weights and inverse Grams that every step reads; 0 for rotations that are not learned.
        spilled_bytes: of these, what exceeds the activation budget and is on disk while the rotation is learned.
        memory_bytes: the largest layer or the embeddings and the LM head, with a layer's Grams and what is kept of the
            terms; without activations.
        disk_bytes: of the rotated checkpoint.
        step_operations: floating-point operations of a step's products with R.
        seconds: of all steps and the one before them, a lower bound: products with R only.
    """

    model: str
    options: Mapping[str, Any]
    device: str
    hidden_size: int
    layers: int
    rotated_values: int
    untied_bytes: int
    tokens: int
    term_bytes: int
    spilled_bytes: int
    memory_bytes: int
    disk_bytes: int
    step_operations: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return asdict(self)


def plan_rotation(
    model: str | Path,
    rotation: RotationOptions | Mapping[str, Any] | None = None,
    calibration: TextSpec | None = None,
    settings: StreamSettings | None = None,
) -> RotationPlan:
    """Work out what `rotate` would do with a checkpoint, without reading its weights or writing anything.

    Args:
        model: a hub id, a local checkpoint folder or "testbed".
        rotation: as for `rotate`.
        calibration: as for `rotate`.
        settings: as for `rotate`.

    Raises:
        LlmpruneError: everything that `rotate` would refuse regardless of the text.
    """
    settings = settings or StreamSettings()
    job = lone_job(rotation, settings)
    with job.watch:
        rotatable = open_rotatable(resolve_model(model), job)
        positions = model_positions(rotatable.source.config)
        text = (calibration or TextSpec()).fitted(positions, settings.device.type)
        check_texts({"calibration": text}, rotatable.source)
        return _planned(str(model), rotatable, text, job)


def _planned(model: str, rotatable: Rotatable, text: TextSpec, job: RotationJob) -> RotationPlan:
    source, residual, device = rotatable.source, rotatable.residual, job.settings.device
    learned = job.options.kind == "learned"
    size = residual.size
    elements, inverses, grams, readers = _terms(rotatable, job)
    term_bytes = 4 * (elements + inverses) if learned else 0
    resident = min(term_bytes, job.settings.activation_budget)
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in source.layers)
    # R and its gradients, factorisation and moments.
    search = resident + 4 * (8 * size * size + 6 * layer) if learned else 0
    statistics = 4 * (layer + grams) + resident if learned else 0
    # One product of every weight with R and of every reader's inverse Gram matrix, and one for the gradient of R: none
    # has a gradient of its own.
    operations = 4.0 * size * (elements + readers * size**2) if learned else 0.0
    rate = measure_rates(device, torch.float32).solve if learned else 1.0
    return RotationPlan(
        model,
        job.options.model_dump(mode="json"),
        describe_device(device),
        size,
        len(source.layers),
        len(residual.values),
        rotatable.untied_bytes,
        text.sequences * text.tokens,
        term_bytes,
        term_bytes - resident,
        max(ends_bytes(source) + rotatable.untied_bytes, 3 * 4 * layer, search, statistics),
        rotatable.nbytes,
        operations,
        (job.options.steps + 1) * operations / rate,
    )


def _terms(rotatable: Rotatable, job: RotationJob) -> tuple[int, int, int, int]:
    """Elements of all weights in the loss, of all inverses, and of the largest layer's Gram matrices; the readers."""
    source, residual = rotatable.source, rotatable.residual
    elements = inverses = largest = 0
    readers: set[str] = set()
    for index, layer in enumerate(source.layers):
        prefix = source.layer_name(index)
        norms = sum(gain.startswith(f"{prefix}.") for gain in residual.norms)
        own = norms * residual.size**2
        inverses += own
        for matrix in prunable_matrices(layer, prefix):
            name = f"{prefix}.{matrix.parameter}"
            if name not in residual.places or fitting(job.patterns, matrix) is None:
                continue
            elements += matrix.shape[0] * matrix.shape[1]
            if name in residual.folds:
                readers.add(name)
            else:
                own += matrix.shape[1] ** 2
                values = residual.values.get(index)
                inverses += matrix.shape[1] * (
                    values.rows.shape[1] if values is not None and values.consumer == matrix.parameter else 1
                )
        largest = max(largest, own)
    return elements, inverses, largest, len(readers)
