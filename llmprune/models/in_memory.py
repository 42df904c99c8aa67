"""Models in memory: what is unwrapped, and what is refused before anything is computed."""

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from llmprune.errors import ModelError
from llmprune.models.boundary import explained

# The attribute in which torch.compile keeps the module that it wraps.
_COMPILED = "_orig_mod"


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile's wrapper, whose parameters are the same; anything else as it is."""
    return getattr(model, _COMPILED, model) if isinstance(model, nn.Module) else model


def require_plain(model: nn.Module) -> None:
    """Refuse a model whose matrices are not what it multiplies by.

    Raises:
        ModelError: it has an adapter, masks or parametrisations, or parts wrapped by torch.compile.
    """
    modules = dict(model.named_modules())
    if adapters := [name for name in modules if "lora_" in name]:
        raise _with_adapter(model, adapters[0])
    # Adapters other than LoRA name their modules differently; PEFT leaves its configuration in either place.
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise _with_adapter(model, "peft_config")
    require_parameters(model)
    if compiled := [name for name in modules if name.split(".")[-1] == _COMPILED]:
        raise ModelError(
            f"{compiled[0].rpartition('.')[0]} is wrapped by torch.compile, which changes the names of its weights",
            expected="a model that is compiled as a whole, or not at all",
            fix="prune the model first and compile its parts afterwards; module.compile() keeps the names",
        )


def require_parameters(model: nn.Module) -> None:
    """Refuse a model in which a weight is no parameter.

    Raises:
        ModelError: it is computed from other tensors.
    """
    if computed := next(_computed(dict(model.named_modules())), None):
        raise ModelError(
            f"the weight of {computed} is computed from other tensors at each call (a mask or a parametrization)",
            expected="weights that are parameters",
            fix="make it permanent first: torch.nn.utils.prune.remove(MODULE, 'weight') for a mask, "
            "torch.nn.utils.parametrize.remove_parametrizations(MODULE, 'weight') for a parametrization",
        )


def require_savable(model: PreTrainedModel) -> None:
    """Refuse a model that transformers would not save, by saving all of it but the weights.

    Raises:
        ModelError: its config, or its generation config, holds values that transformers does not write.
    """
    with (
        tempfile.TemporaryDirectory(prefix="llmprune-config-") as folder,
        explained(
            f"{type(model).__name__} cannot be saved",
            expected="a model that save_pretrained accepts",
            fix="correct the values in model.config or model.generation_config that the message names",
        ),
    ):
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


def saved_linear_keys(model: PreTrainedModel) -> set[str]:
    """Which weights of linear layers `save_pretrained` would write under their own names; nothing is written."""
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return linear.intersection(revert_weight_conversion(model, state))


def _with_adapter(model: nn.Module, where: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} has an adapter ({where}): its weights are not those that it computes with",
        expected="a model without adapters",
        fix="merge it first: model = model.merge_and_unload(), or save the merged model and load it again",
    )


def _computed(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Names of the modules whose weights are made anew for each call."""
    for name, module in modules.items():
        masked = any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())
        bare = isinstance(module, nn.Linear | Conv1D) and "weight" not in module._parameters
        if masked or bare or is_parametrized(module):
            yield name
