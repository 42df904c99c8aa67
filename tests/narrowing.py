"""Narrow a tiny model, and restrict the full one to the same channels by means of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.structures.remove.width import Width, shrink_width

CHANNELS = [0, 1, 2, 4, 5, 7, 8, 9, 10, 11, 13, 14, 16, 17, 18, 20, 21, 23, 25, 26, 28, 29, 30, 31]


def factors_of(width: Width) -> dict[str, float]:
    """A factor of its own for each norm."""
    return {name: 0.8 + 0.05 * number for number, name in enumerate(width.norms)}


def narrowed(model: PreTrainedModel, width: Width, channels: Sequence[int], factors: Mapping[str, float]) -> Any:
    """The stock class with the smaller config and what is left of the state."""
    small = AutoModelForCausalLM.from_config(width.config, dtype=model.dtype, experts_implementation="eager").eval()
    small.load_state_dict(shrink_width(model.state_dict(), width, channels, factors))
    return small


def restrict(model: PreTrainedModel, small: PreTrainedModel, width: Width, factors: Mapping[str, float]) -> None:
    """Zero all channels but CHANNELS in place, and scale the gains, so that it computes what the small one does.

    An RMSNorm of the full model divides by the mean over all channels, the zeros among them; a LayerNorm is made to see
    the others only, since zeros would move its mean.
    """
    gone = torch.tensor([channel for channel in range(width.size) if channel not in CHANNELS])
    with torch.no_grad():
        for name, dims in width.places.items():
            for dim in dims:
                model.get_parameter(name).index_fill_(dim, gone, 0)
        for name, factor in factors.items():
            norm, plus = model.get_submodule(name), width.norms[name].offset
            key, epsilon = next((key, value) for key, value in vars(small.get_submodule(name)).items() if "eps" in key)
            if width.norms[name].centred:
                norm.register_forward_hook(_restricted(factor, plus, epsilon))
            else:
                share = width.kept / width.size
                setattr(norm, key, epsilon * share)
                norm.weight.copy_((norm.weight + plus) * factor * share**0.5 - plus)


def _restricted(factor: float, plus: int, epsilon: float) -> Any:
    def hook(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bias = None if getattr(norm, "bias", None) is None else norm.bias[CHANNELS]
        gain = (norm.weight[CHANNELS] + plus) * factor
        result = F.layer_norm(args[0][..., CHANNELS], (len(CHANNELS),), gain, bias, epsilon)
        return torch.zeros_like(output).index_copy_(-1, torch.tensor(CHANNELS), result)

    return hook
