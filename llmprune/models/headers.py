"""Check a checkpoint before reading any weights: its headers against what config.json requires."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llmprune.errors import CheckpointError, NumericsError
from llmprune.precision import dtype_name
from llmprune.storage.files import Stored, listed, read_header, weight_files
from llmprune.storage.packed_config import PackedWeight
from llmprune.storage.torch_prune import masked_keys

_WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_headers(
    folder: Path,
    model: nn.Module,
    stored: Mapping[str, Stored | PackedWeight],
    targets: Mapping[str, tuple[str, ...]],
) -> None:
    """Check that a checkpoint has a tensor of the right kind for every parameter; no weights are read.

    Args:
        folder: of the checkpoint.
        model: built from config.json, with parameters on the meta device and weights tied.
        stored: the tensors by key.
        targets: key -> the parameters that its tensor becomes, or is part of.

    Raises:
        CheckpointError: a weight is stored as integers or in 8 bits, has a shape other than config.json requires, or is
            missing.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = {key: tensor for key, tensor in stored.items() if any(name in parameters for name in targets[key])}
    if coded := [key for key, tensor in weights.items() if tensor.dtype not in _WEIGHTS]:
        stored_as = f"{'are' if coded[1:] else 'is'} stored as {dtype_name(weights[coded[0]].dtype)}"
        raise CheckpointError(
            f"{folder}: {listed([repr(key) for key in coded], most=1)} {stored_as}",
            expected="weights in float32, bfloat16 or float16",
            fix="prune the unquantised model, or a copy that was dequantised and saved again",
        )
    if problems := [str(part) for part in _parts(weights, targets, parameters) if not part.fits]:
        raise CheckpointError(
            f"{folder}: {problems[0]}" + f", and {len(problems) - 1} more tensors do not fit" * (len(problems) > 1),
            expected="the shapes that config.json describes",
            fix="check that config.json and the weights belong together, or download the checkpoint again",
        )
    present = {id(parameters[name]) for key in weights for name in targets[key] if name in parameters}
    # For tied parameters, one name is enough.
    require_none(folder, [name for name, tensor in model.named_parameters() if id(tensor) not in present])


def require_finite(name: str | Path, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that are NaN or infinite: a damaged file, or a training run that diverged.

    Args:
        name: of the model, for the message.
        parameters: names and values; those without values (on the meta device) and packed bits are skipped.

    Raises:
        NumericsError: names the first such tensor.
    """
    for key, values in parameters:
        if values.is_meta or values.dtype not in _WEIGHTS or not values.numel():
            continue
        # The extremes of a tensor with NaN are NaN; no copy of it is made.
        if not bool(torch.isfinite(torch.stack(values.detach().aminmax())).all()):
            raise NumericsError(
                f"{name}: {key} contains NaN or infinity",
                expected="finite weights",
                fix="download the checkpoint again; if it is its training that diverged, use another checkpoint",
            )


def require_none(folder: Path, missing: Sequence[str]) -> None:
    """Refuse a checkpoint that lacks these parameters.

    Raises:
        CheckpointError: any are missing.
    """
    if missing:
        fix = "download the checkpoint again, or check that config.json belongs to it"
        if masked_keys(stored.key for file in weight_files(folder) for stored in read_header(file)):
            fix = f"its tensors have masks of torch.nn.utils.prune: llmprune import {folder} --output NEW merges them"
        raise CheckpointError(
            f"{folder} has no values for {listed([repr(name) for name in missing], most=1)}",
            expected="every parameter of the model in its safetensors files",
            fix=fix,
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """Tensors of a checkpoint, and the parameters that transformers builds from them."""

    tensors: Mapping[str, Stored | PackedWeight]
    parameters: Mapping[str, Tensor]

    @property
    def fits(self) -> bool:
        # Joining, splitting and transposing keep the number of values; loading checks the rest.
        return self._elements(self.tensors) == self._elements(self.parameters)

    def __str__(self) -> str:
        keys, names = (listed([repr(name) for name in side], most=1) for side in (self.tensors, self.parameters))
        there, wanted = (" + ".join(self._shapes(side)) for side in (self.tensors, self.parameters))
        if len(self.tensors) > 1:
            there = f"{len(self.tensors)} tensors with {self._elements(self.tensors):,} values"
            wanted += f" ({self._elements(self.parameters):,})"
        return f"{keys} holds {there}, and config.json requires {wanted} for {names}"

    @staticmethod
    def _shapes(tensors: Mapping[str, Stored | PackedWeight] | Mapping[str, Tensor]) -> list[str]:
        return [" x ".join(map(str, tensor.shape)) for tensor in tensors.values()]

    @staticmethod
    def _elements(tensors: Mapping[str, Stored | PackedWeight] | Mapping[str, Tensor]) -> int:
        return sum(math.prod(tensor.shape) for tensor in tensors.values())


def _parts(
    weights: Mapping[str, Stored | PackedWeight],
    targets: Mapping[str, tuple[str, ...]],
    parameters: Mapping[str, Tensor],
) -> Iterator[_Part]:
    """Group the tensors by the parameters that they become."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for key in weights:
        groups.setdefault(targets[key], []).append(key)
    for names, keys in groups.items():
        yield _Part(
            {key: weights[key] for key in keys}, {name: parameters[name] for name in names if name in parameters}
        )
