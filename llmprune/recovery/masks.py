"""Which weights of a model are pruned: read from the model once, kept in a file, counted again.

A mask is never read from a model that has been trained: a kept weight may be exactly zero by then.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llmprune.errors import CheckpointError, RecoveryError
from llmprune.storage.files import listed, reading, write_shard
from llmprune.storage.formats.layout import from_bytes, to_bytes

# Name of a parameter -> bool in its shape, True where the weight is pruned.
Masks = Mapping[str, Tensor]


# Below this share of zeros, a model is probably dense.
_FEW = 1e-3

# Integers as wide as a number. Products of bits with booleans are exact, whatever the number is (NaN too, and no -0.0
# comes of it), and take a tenth of the time of masked_fill on a CPU.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked(tensor: Tensor, kept: Tensor) -> Tensor:
    """A copy with zeros where a mask is False.

    Args:
        tensor: floating point, any shape.
        kept: bool, of the same shape.
    """
    return (tensor.detach().view(_BITS[tensor.itemsize]) * kept).view(tensor.dtype)


def mask_(tensor: Tensor, kept: Tensor) -> Tensor:
    """The same in place."""
    tensor.detach().view(_BITS[tensor.itemsize]).mul_(kept)
    return tensor


def weights_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that pruning zeroes: matrices, embeddings and experts, but no biases or norms; each tied one once.

    Raises:
        RecoveryError: they are not in memory, or only a part of each is.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not parameter.is_floating_point():
            continue
        if parameter.is_meta or hasattr(parameter.data, "device_mesh"):
            raise RecoveryError(
                f"{name} is " + ("not in memory" if parameter.is_meta else "distributed over several devices"),
                expected="a model whose weights are whole in memory, on one device or copied to each (DDP)",
                fix="load it without offloading, and make its masks before it is sharded; FSDP, DeepSpeed and tensor "
                "parallelism are not supported",
            )
        yield name, parameter


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The zeros of a pruned model; matrices without any are left out.

    Args:
        model: as it was pruned, before any training.

    Raises:
        RecoveryError: its weights are not whole in memory.
    """
    found = ((name, weight.detach() == 0) for name, weight in weights_of(model))
    return {name: zeros for name, zeros in found if bool(zeros.any())}


def share_of_zeros(model: nn.Module, masks: Masks) -> float:
    """The pruned fraction of all weights; zero rows of embeddings, which dense models have, too, do not count."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    pruned, total = 0, 0
    for name, weight in weights_of(model):
        total += weight.numel()
        if (mask := masks.get(name)) is not None:
            pruned += int(mask.count_nonzero())
            pruned -= int(mask.all(-1).count_nonzero()) * weight.shape[-1] if id(weight) in embeddings else 0
    return pruned / max(total, 1)


def masks_to_keep(model: nn.Module, dense: nn.Module | None) -> dict[str, Tensor]:
    """The same, with a warning if the model looks like a dense one.

    Args:
        model: to be trained.
        dense: that it was pruned from; one with more weights shows that structures were removed, which leave no zeros.
    """
    masks = masks_of(model)
    if dense is None or _numbers(dense) <= _numbers(model):
        warn_of_few_zeros(share_of_zeros(model, masks))
    return masks


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def warn_of_few_zeros(share: float) -> None:
    """Warn of a model that hardly looks pruned: numbers of 16 bits are zero now and then in dense ones."""
    if share < _FEW:
        warnings.warn(
            f"only {share:.2g} of the weights are zero: no others are kept at zero; is this the pruned model?"
            if share
            else "no weights are zero, so that none are kept at zero: is this the pruned model?",
            stacklevel=3,
        )


def save_masks(file: Path, masks: Masks) -> str:
    """Write masks, one bit for each weight; returns the sha256 of the file.

    Under a parameter's name the file has uint8 [rows, ceil(columns / 8)], rows being all dimensions but the last. Bit
    j % 8, from the lowest, of byte j // 8 is set if column j is kept. The names are sorted.

    Raises:
        CheckpointError: it cannot be written.
    """
    return write_shard(file, {name: to_bytes(~mask.cpu().flatten(0, -2)) for name, mask in sorted(masks.items())})


def load_masks(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read the masks that `save_masks` wrote.

    Args:
        file: written for this model.
        model: gives the shapes.

    Raises:
        CheckpointError: the file cannot be read, or is of another model.
    """
    with reading(file, "check the spelling; KeepZeros.save writes such files, and llmprune recover masks.safetensors"):
        stored = load_file(file)
    weights = dict(weights_of(model))
    if unknown := sorted(set(stored) - set(weights)):
        raise _of_another(file, f"it has {listed(unknown)}, which the model lacks")
    masks = {}
    for name, bits in stored.items():
        shape = weights[name].shape
        expected = (weights[name].numel() // shape[-1], -(-shape[-1] // 8))
        kept = from_bytes(bits, shape[-1]) if tuple(bits.shape) == expected and bits.element_size() == 1 else None
        if kept is None:
            raise _of_another(file, f"{name} is no mask of {' x '.join(map(str, shape))} weights")
        masks[name] = ~kept.view(shape).to(weights[name].device)
    return masks


def count_zeros(masks: Masks) -> dict[str, int]:
    """How many weights of each matrix are pruned."""
    return {name: int(mask.count_nonzero()) for name, mask in masks.items()}


def revived(weights: Mapping[str, Tensor], masks: Masks) -> dict[str, int]:
    """How many pruned weights of each matrix are not zero; matrices without any are left out."""
    found = {
        name: int((weights[name].detach() != 0).logical_and_(mask.to(weights[name].device)).sum())
        for name, mask in masks.items()
    }
    return {name: count for name, count in found.items() if count}


def require_fitting(model: nn.Module, masks: Masks) -> None:
    """Refuse masks that are not those of a model.

    Raises:
        RecoveryError: names the first that is of no matrix, or has another shape or dtype.
    """
    weights = dict(weights_of(model))
    for name, mask in masks.items():
        fits = name in weights and mask.shape == weights[name].shape and mask.dtype == torch.bool
        if not fits:
            shape = " x ".join(map(str, weights[name].shape)) if name in weights else ""
            raise RecoveryError(
                f"the mask {name!r} is {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}",
                expected=f"bool, {shape}, True for pruned" if shape else "the name of a matrix of the model",
                fix="pass masks by the names of model.named_parameters(); `mask == 0` of those that have 1 for kept",
            )


def require_zeros(weights: Mapping[str, Tensor], masks: Masks) -> None:
    """Refuse weights, by the names of their masks, of which pruned ones are not zero.

    Raises:
        RecoveryError: names the matrices.
    """
    if lost := revived(weights, masks):
        raise RecoveryError(
            f"{sum(lost.values())} pruned weights are not zero, in {listed(list(lost))}",
            expected=f"zero in all {sum(count_zeros(masks).values())} pruned weights",
            fix="load the pruned checkpoint again; nothing but the optimizer may change the weights while they train",
        )


def _of_another(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file} does not fit the model: {why}",
        expected="the masks of this model",
        fix="use the file that was written beside it",
    )
