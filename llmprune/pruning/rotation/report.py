"""What a rotation did: its loss, and how far the logits of the written checkpoint are from the dense ones."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmprune.errors import CheckpointError
from llmprune.storage.files import write_json

ROTATION_NAME = "rotation.json"


@dataclass(frozen=True, slots=True)
class LogitComparison:
    """The logits of a rotated checkpoint compared with the dense ones, both computed in float32.

    Attributes:
        tokens: positions compared.
        kl_divergence: mean of KL(dense || rotated), in nats/token.
        largest: largest absolute difference of two logits, each position's mean taken off.
        relative: root mean square of the differences, relative to that of the dense logits.
        tolerance: what `relative` may be in the dtype in which the checkpoint is stored.
    """

    tokens: int
    kl_divergence: float
    largest: float
    relative: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class RotationReport:
    """The result of `rotate`.

    Attributes:
        model: as the user gave it.
        options: of the rotation, as in a recipe.
        hidden_size: channels of the residual stream.
        layers: decoder layers.
        rotated_values: layers in which the values of the KV heads are rotated, too.
        untied_bytes: by which the checkpoint has grown; 0 if its embeddings were not tied.
        loss: mean, over the matrices, of the logarithm of what pruning takes (the sum of the scores that their patterns
            drop), before and after; None for rotations that are not learned.
        best_step: the step with the lowest loss; None likewise.
        logits: compared with those of the dense model.
        calibration: description and digest of the text.
        seconds: by stage.
        environment: versions, device and hash of the source.
    """

    model: str
    options: Mapping[str, Any]
    hidden_size: int
    layers: int
    rotated_values: int
    untied_bytes: int
    loss: tuple[float, float] | None
    best_step: int | None
    logits: LogitComparison
    calibration: Mapping[str, Any]
    seconds: Mapping[str, float]
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return asdict(self)

    def save(self, folder: Path) -> Path:
        """Write rotation.json into a folder, atomically; returns its path."""
        write_json(folder / ROTATION_NAME, self.to_dict())
        return folder / ROTATION_NAME


def load_rotation_report(folder: Path) -> RotationReport:
    """Read rotation.json back.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    file = folder / ROTATION_NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        content["logits"] = LogitComparison(**content["logits"])
        content["loss"] = None if content["loss"] is None else tuple(content["loss"])
        return RotationReport(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}",
            expected="the report of a finished rotation",
            fix="run it again with --overwrite",
        ) from error
