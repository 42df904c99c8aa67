"""Pruned weights in the form of `torch.nn.utils.prune`: `weight_orig` and `weight_mask` in safetensors files.

The mask of every pruned linear layer says which weights are not zero, in the weights' dtype, as torch has it. The
original weights are no longer known: `weight_orig` has the pruned ones, zeros included. The files are named
`torch-prune-*.safetensors`; no pickle is written or read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils import prune

from llmprune.errors import CheckpointError, ModelError
from llmprune.exporting.tensors import Exported, is_pruned
from llmprune.storage.files import Stored, listed, read_header
from llmprune.storage.folders import expanded
from llmprune.storage.torch_prune import MASK, ORIGINAL

PREFIX = "torch-prune-"

_MASK, _ORIGINAL = f".weight{MASK}", f".weight{ORIGINAL}"

Model = TypeVar("Model", bound=nn.Module)


def write_masked(source: Exported, target: Path) -> dict[str, str]:
    """Write a checkpoint with a mask for every pruned linear layer.

    Args:
        source: the checkpoint.
        target: an empty folder.

    Returns:
        Facts for the report.

    Raises:
        ModelError: the model has its tensors in another form than the checkpoint.
    """
    masked, ignored = 0, set(source.checkpoint.ignored_keys())

    def convert(key: str, tensor: Tensor) -> Mapping[str, Tensor]:
        nonlocal masked
        if key in ignored:
            return {}
        name = source.name_of(key)
        if key not in source.linear or not is_pruned(tensor):
            return {name: tensor}
        masked += 1
        layer = name.removesuffix(".weight")
        return {layer + _ORIGINAL: tensor, layer + _MASK: (tensor != 0).to(tensor.dtype)}

    source.write(target, convert, PREFIX, "exporting")
    return {"matrices": f"{masked} of {len(source.linear)} with a mask; the others have no zeros"}


def load_masked(model: Model, folder: str | Path) -> Model:
    """Load what `llmprune export --to torch-prune` wrote into a model, in place.

    Each pruned layer is reparametrised by `torch.nn.utils.prune.identity`, so that training keeps its zeros, and
    `torch.nn.utils.prune.remove(layer, "weight")` makes them permanent.

    Args:
        model: of the same architecture and sizes, such as `AutoModelForCausalLM.from_config` builds.
        folder: the folder.

    Returns:
        The model.

    Raises:
        CheckpointError: there are no such files, or a file cannot be read.
        ModelError: the model lacks a tensor, has others, or has another shape; it is as it was.
    """
    path = expanded(folder)
    files = sorted(path.glob(f"{PREFIX}*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{path} has no {PREFIX}*.safetensors",
            expected="a folder that `llmprune export --to torch-prune` wrote",
            fix="check the path",
        )
    stored = {tensor.key: tensor for file in files for tensor in read_header(file)}
    layers = [key.removesuffix(_MASK) for key in stored if key.endswith(_MASK)]
    _require_fitting(model, stored, path)
    for layer in layers:
        prune.identity(model.get_submodule(layer), "weight")
    own = model.state_dict(keep_vars=True)
    for key, tensor in stored.items():
        own[key].data.copy_(tensor[...])
    for layer in layers:  # as every forward pass does
        model.get_submodule(layer).weight = own[layer + _ORIGINAL] * own[layer + _MASK]
    return model


def add_masks(model: Model, masks: Mapping[str, Tensor]) -> Model:
    """Reparametrise a model in memory by torch.nn.utils.prune, in place.

    Args:
        model: whose weights train on.
        masks: parameter name -> bool in its shape, True for pruned, as `llmprune.sparsify` and `keep_zeros` have them.

    Returns:
        The model.

    Raises:
        ModelError: it has no such parameter, or a mask has another shape; it is as it was.
    """
    own = dict(model.named_parameters())
    if differing := [name for name, mask in masks.items() if name not in own or own[name].shape != mask.shape]:
        raise ModelError(
            f"the masks are not those of this model: {listed(sorted(differing))}",
            expected="names and shapes of its parameters",
            fix="pass the masks that were made for it",
        )
    for name, mask in masks.items():
        layer, _, parameter = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(layer), parameter, ~mask)
    return model


def _require_fitting(model: nn.Module, stored: Mapping[str, Stored], folder: Path) -> None:
    wanted = {key.replace(_ORIGINAL, ".weight"): tensor.shape for key, tensor in stored.items()}
    masks = {key for key in wanted if key.endswith(_MASK)}
    halves = {key.removesuffix(_MASK) for key in masks} ^ {
        key.removesuffix(_ORIGINAL) for key in stored if key.endswith(_ORIGINAL)
    }
    own = model.state_dict(keep_vars=True)
    differing = [key for key in wanted.keys() - masks if key not in own or tuple(own[key].shape) != wanted[key]]
    differing += [key for key in masks if wanted[key] != wanted.get(key.replace(_MASK, ".weight"))]
    # Tied weights are stored once.
    filled = {id(own[key]) for key in wanted if key in own}
    differing += [key for key, tensor in own.items() if key not in wanted and id(tensor) not in filled]
    if differing or halves:
        raise ModelError(
            f"the tensors of {folder} are not those of this model: {listed(sorted({*differing, *halves}))}",
            expected="a model built from the config.json beside them",
            fix="build it with AutoModelForCausalLM.from_config, with llmprune imported if layers differ in size",
        )
