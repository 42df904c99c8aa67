"""What a rotation would need, without running it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.devices import describe_device
from llmprune.models.decoder import Matrix, prunable_matrices
from llmprune.models.sizes import ends_bytes
from llmprune.pruning.forecast.rates import measure_rates
from llmprune.pruning.rotation.rotate import Rotatable, RotationJob, lone_job, open_rotatable
from llmprune.pruning.rotation.terms import fitting, sampled
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
        return planned(str(model), rotatable, text.sequences * text.tokens, job)


def planned(model: str, rotatable: Rotatable, tokens: int, job: RotationJob) -> RotationPlan:
    """Work out what a rotation needs.

    Args:
        model: as the user gave it.
        rotatable: the dense checkpoint.
        tokens: of the calibration text.
        job: what is asked for.
    """
    source, residual, device = rotatable.source, rotatable.residual, job.settings.device
    learned = job.options.kind == "learned"
    size = residual.size
    elements, inverses, grams, inputs = _terms(rotatable, job)
    term_bytes = 4 * (elements + inverses) if learned else 0
    resident = min(term_bytes, job.settings.activation_budget)
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in source.layers)
    # R and its gradients, factorisation and moments.
    search = resident + 4 * (8 * size * size + 6 * layer) if learned else 0
    statistics = 4 * (layer + grams) + resident if learned else 0
    # One product of every weight with R and of every input's inverse Gram matrix, and one for the gradient of R: none
    # has a gradient of its own.
    operations = 4.0 * size * (elements + inputs * size**2) if learned else 0.0
    rate = measure_rates(device, torch.float32).solve if learned else 1.0
    return RotationPlan(
        model,
        job.options.model_dump(mode="json"),
        describe_device(device),
        size,
        len(source.layers),
        len(residual.values),
        rotatable.untied_bytes,
        tokens,
        term_bytes,
        term_bytes - resident,
        max(ends_bytes(source) + rotatable.untied_bytes, 3 * 4 * layer, search, statistics),
        rotatable.nbytes,
        operations,
        (job.options.steps + 1) * operations / rate,
    )


def _terms(rotatable: Rotatable, job: RotationJob) -> tuple[int, int, int, int]:
    """Elements of all weights in the loss, of all inverses, and of the largest layer's Gram matrices; inputs."""
    source, residual = rotatable.source, rotatable.residual
    elements = inverses = largest = 0
    gains: set[str] = set()
    for index, layer in enumerate(source.layers):
        prefix = source.layer_name(index)
        norms = sum(gain.startswith(f"{prefix}.") for gain in residual.norms)
        own = norms * residual.size**2
        inverses += own
        values = residual.values.get(index)
        parameters: dict[str, list[Matrix]] = {}
        for matrix in prunable_matrices(layer, prefix):
            if f"{prefix}.{matrix.parameter}" in residual.places and fitting(job.patterns, matrix) is not None:
                parameters.setdefault(matrix.parameter, []).append(matrix)
        for parameter, matrices in parameters.items():
            turned = values is not None and parameter in (values.producer, values.consumer)
            reads = f"{prefix}.{parameter}" in residual.folds
            rows, columns = _taken(matrices, job, reads=reads, whole=turned)
            elements += rows * columns
            if reads:
                gains.add(residual.folds[f"{prefix}.{parameter}"].gain)
            else:
                own += len(matrices) * matrices[0].shape[1] ** 2
                inverses += len(matrices) * columns * (values.rows.shape[1] if values is not None and turned else 1)
        largest = max(largest, own)
    return elements, inverses, largest, len(gains)


def _taken(matrices: list[Matrix], job: RotationJob, *, reads: bool, whole: bool) -> tuple[int, int]:
    """Rows of all matrices of one parameter, and columns, that take part in the loss."""
    pattern, (rows, columns), count = fitting(job.patterns, matrices[0]), matrices[0].shape, len(matrices)
    assert pattern is not None
    if whole:
        return count * rows, columns
    lines = sampled(pattern, (count * rows, columns), 0) if reads else sampled(pattern, (rows, columns), 1, count)
    if lines is None:
        return count * rows, columns
    return (len(lines), columns) if reads else (count * rows, len(lines))
