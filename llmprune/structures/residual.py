"""How a model's residual stream can be rotated: where it is written and read, and what stands in the way.

    h' = R^T h       for an orthogonal R; an RMSNorm without a gain gives R^T norm(h)
    W' = W g R       for every matrix that reads a norm's output, its gain g folded into it
    W' = R^T W       for every matrix that writes to the stream, and for the embeddings

Every dimension of a parameter that is hidden width is contracted with R, whether it is written or read, so only the
readers of each norm have to be told apart. Nothing of this is believed: at the end a rotated model with random weights
must compute the same logits.
"""

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.errors import ModelError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.decoder import prunable_matrices
from llmprune.models.uneven import build_decoder
from llmprune.structures.find.discovery import find_structures
from llmprune.structures.find.residual_reads import LayerReads, Values, find_residual_reads, reading_dim
from llmprune.structures.find.width_probe import Norm, find_norms, is_close, run_stand_ins, stand_in
from llmprune.structures.remove.width import hidden_places
from llmprune.units import format_size


@dataclass(frozen=True, slots=True)
class Fold:
    """A reader of a norm's output.

    Attributes:
        gain: the parameter that is folded into it.
        dim: the dimension along its inputs.
    """

    gain: str
    dim: int


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """The residual stream of one model; names are those in the whole model.

    Attributes:
        config: of the rotated model, without tied embeddings.
        size: number of hidden channels.
        places: parameter -> its dimensions that are hidden width, gains left out.
        offsets: gain -> what its norm adds to it, 0 or 1.
        folds: parameter that reads a norm's output -> the gain, and where it is folded.
        norms: gain -> name of its norm.
        values: layer -> the values of its attention, where they can be rotated by R2.
        transposed: parameters whose matrices are stored [in, out].
        tied: the LM head's weight, if the checkpoint shares it with the embeddings; None if it does not.
    """

    config: PretrainedConfig
    size: int
    places: Mapping[str, tuple[int, ...]]
    offsets: Mapping[str, int]
    folds: Mapping[str, Fold]
    norms: Mapping[str, str]
    values: Mapping[int, Values]
    transposed: frozenset[str]
    tied: str | None

    @property
    def head_sizes(self) -> dict[int, tuple[int, int]]:
        """Layer -> (KV heads, size of a value), for the layers whose values can be rotated."""
        return {layer: (len(values.rows), values.rows.shape[1]) for layer, values in self.values.items()}

    def folded(self, name: str, tensor: Tensor, gains: Mapping[str, Tensor]) -> Tensor:
        """A parameter with the gain that it reads multiplied into it; a gain becomes 1.

        Args:
            name: of the parameter.
            tensor: the parameter, float64.
            gains: gain -> as stored.
        """
        if name in self.offsets:
            return torch.full_like(tensor, 1 - self.offsets[name])
        fold = self.folds.get(name)
        if fold is None:
            return tensor
        gain = gains[fold.gain].to(tensor) + self.offsets[fold.gain]
        return tensor * gain.view([-1 if dim == fold.dim else 1 for dim in range(tensor.dim())])

    def turned(self, name: str, tensor: Tensor, rotation: Tensor) -> Tensor:
        """A folded parameter with every dimension that is hidden width rotated.

        Args:
            name: of the parameter.
            tensor: the parameter.
            rotation: R, [hidden, hidden], of its dtype and on its device.
        """
        for dim in self.places.get(name, ()):
            tensor = (tensor.movedim(dim, -1) @ rotation).movedim(-1, dim)
        return tensor


def find_residual(source: CheckpointSource, *, untie: bool = False) -> Residual:
    """Find out how a checkpoint's residual stream can be rotated; no weights are read.

    Args:
        source: the checkpoint.
        untie: whether the LM head may get weights of its own, where it shares those of the embeddings.

    Raises:
        ModelError: a rotation would change what the model computes, with the reason; or the embeddings are tied.
    """
    tied = _tied_head(source.model)
    if tied is not None and not untie:
        nbytes = format_size(embedding_bytes(source))
        raise ModelError(
            f"{type(source.model).__name__} has tied embeddings: the gain of its last norm can be folded into the LM "
            "head, but not into the embeddings",
            expected="an LM head with weights of its own",
            fix=f"untie them (--untie, or untie: true under rotation); the checkpoint grows by {nbytes}",
        )
    config = _untied(source.config) if tied else source.config
    model = build_decoder(config, torch.float32, source.layers_path).model
    if _tied_head(model) is not None:
        raise _refusal(source.model, "its LM head shares the weight of the embeddings, whatever its config says")
    try:
        size, places = hidden_places(config, source.layers_path)
        norms = find_norms(model, places)
    except ModelError as error:
        _explain_by_norms(model)
        raise _refusal(source.model, error.what) from error
    residual = _found(source, config, size, places, norms, tied)
    _require_exact(model, residual)
    return residual


def _found(
    source: CheckpointSource,
    config: PretrainedConfig,
    size: int,
    places: Mapping[str, tuple[int, ...]],
    norms: Mapping[str, Norm],
    tied: str | None,
) -> Residual:
    decoder, model = source.decoder, source.model
    _require_rms(model, norms)
    gains = {norm.gain: name for name, norm in norms.items()}
    found = find_residual_reads(decoder, places, list(gains), find_structures(decoder))
    for index, own in enumerate(found):
        if own.refusal is not None:
            raise _refusal(model, f"in {decoder.layer_name(index)}, {own.refusal}")
    last = [gain for gain in gains if decoder.place(gain)[0] is None]
    if len(last) != 1:
        raise _refusal(model, f"{len(last)} norms over hidden channels outside its layers, not only the last one")
    head = _name_of(model, model.get_output_embeddings())
    folds, transposed = {head: Fold(last[0], 1)}, _transposed(source)
    for index, own in enumerate(found):
        folds |= _folds(source, index, own, places, transposed)
    if unread := [gain for gain in gains if not any(fold.gain == gain for fold in folds.values())]:
        raise _refusal(model, f"nothing multiplies the output of the norm with {unread[0]}")
    return Residual(
        config,
        size,
        {name: dims for name, dims in places.items() if name not in gains},
        {norm.gain: norm.offset for norm in norms.values()},
        folds,
        gains,
        {index: own.values for index, own in enumerate(found) if own.values is not None},
        transposed,
        tied,
    )


def _folds(
    source: CheckpointSource,
    index: int,
    reads: LayerReads,
    places: Mapping[str, tuple[int, ...]],
    transposed: frozenset[str],
) -> dict[str, Fold]:
    prefix = source.layer_name(index)
    folds = {}
    for parameter, gain in reads.readers.items():
        name, shape = f"{prefix}.{parameter}", source.layers[index].get_parameter(parameter).shape
        dim = reading_dim(shape, name in transposed)
        # A router's only dimension of hidden width is that of its inputs, however it is stored.
        folds[name] = Fold(f"{prefix}.{gain}", dim if dim in places[name] else places[name][0])
    return folds


def _transposed(source: CheckpointSource) -> frozenset[str]:
    prefixes = [(layer, source.layer_name(index)) for index, layer in enumerate(source.layers)]
    matrices = ((prefix, matrix) for layer, prefix in prefixes for matrix in prunable_matrices(layer, prefix))
    return frozenset(f"{prefix}.{matrix.parameter}" for prefix, matrix in matrices if matrix.transposed)


def _require_rms(model: PreTrainedModel, norms: Mapping[str, Norm]) -> None:
    """Refuse norms that depend on the axes of the hidden channels, or have a bias."""
    for name, norm in norms.items():
        module = model.get_submodule(name)
        if norm.centred:
            raise _refusal(model, f"{name} ({type(module).__name__}) subtracts the mean over the hidden channels")
        if len(list(module.parameters())) > 1:
            raise _refusal(model, f"{name} ({type(module).__name__}) adds a bias to its output")


def _explain_by_norms(model: PreTrainedModel) -> None:
    """Name a norm as the reason if there is one: it is a better one than that a config accepts no other size."""
    size = model.config.get_text_config(decoder=True).hidden_size
    wide = {name: (0,) for name, parameter in model.named_parameters() if tuple(parameter.shape) == (size,)}
    norms: dict[str, Norm] = {}
    with contextlib.suppress(ModelError):
        norms = find_norms(model, wide)
    _require_rms(model, norms)


def _require_exact(model: PreTrainedModel, residual: Residual) -> None:
    """Compare the logits of a model with random weights before and after a rotation of its residual stream.

    A reflection mixes all channels, and costs no factorisation. Stand-ins for large weights vary along the hidden
    channels only, which is where the rotation acts.
    """
    random = torch.Generator().manual_seed(0)
    normal = torch.nn.functional.normalize(torch.randn(residual.size, generator=random), dim=0)
    reflection = torch.eye(residual.size) - 2 * torch.outer(normal, normal)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    dims = {**dict.fromkeys(residual.offsets, (0,)), **residual.places}
    before = {name: stand_in(shape, dims.get(name, ()), random) for name, shape in shapes.items()}
    gains = {name: before[name] for name in residual.offsets}
    after = {name: residual.folded(name, values, gains) for name, values in before.items()}
    after = {name: residual.turned(name, values, reflection) for name, values in after.items()}
    with torch.no_grad():
        wanted, found = (
            run_stand_ins(model, {name: values.expand(shapes[name]) for name, values in tensors.items()})
            for tensors in (before, after)
        )
    if not bool(wanted.isfinite().all()):
        raise _refusal(model, "the check on random weights gave non-finite values")
    if not is_close(found, wanted):
        error = float((found - wanted).abs().max() / wanted.abs().max())
        raise _refusal(model, f"its logits would differ by {error:.1%}: something acts on single hidden channels")


def _refusal(model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"the residual stream of {type(model).__name__} cannot be rotated: {reason}",
        expected="an RMSNorm in front of each sublayer and of the LM head, and nothing else between them and the "
        "residual stream",
        fix="prune it without a rotation",
    )


def _tied_head(model: PreTrainedModel) -> str | None:
    """The name of the LM head's weight if it is that of the embeddings."""
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return None
    return _name_of(model, head)


def _name_of(model: PreTrainedModel, owner: torch.nn.Module | None) -> str:
    """The name of a module's weight."""
    name = next((name for name, module in model.named_modules() if module is owner), None)
    if name is None:
        raise _refusal(model, "it has no LM head")
    return f"{name}.weight"


def _untied(config: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = False
    return config


def embedding_bytes(source: CheckpointSource) -> int:
    """The size of the embeddings, by which a checkpoint grows if they are untied."""
    name = _name_of(source.model, source.model.get_input_embeddings())
    return sum(stored.nbytes for key, stored in source.stored.items() if name in source.targets[key])
