"""Recognise norms of hidden width by what they compute, and check that a narrower model computes what it should."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from llmprune.errors import ModelError
from llmprune.structures.find.tracing import eagerly

# Parameter name of the whole model -> its dimensions that are hidden width.
Places = Mapping[str, tuple[int, ...]]

_TOKENS = 11
# Elements of a stand-in for a weight beyond which its other dimensions hold one value each.
_MOST_RANDOM = 1 << 16
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over hidden channels: (x - centred * mean) / sqrt(mean square) * (offset + gain), with or without a bias.

    Attributes:
        gain: parameter [hidden], by its name in the whole model.
        centred: whether the mean is subtracted (LayerNorm).
        offset: what is added to the stored gain: 0, or 1 as in Gemma.
    """

    gain: str
    centred: bool
    offset: int


def find_norms(model: PreTrainedModel, places: Places) -> dict[str, Norm]:
    """Find the modules that normalise over the hidden channels and have a gain.

    Args:
        model: on the meta device.
        places: which dimensions are hidden width.

    Returns:
        Module name -> its norm.

    Raises:
        ModelError: a module with parameters for each channel mixes the channels, and is none of the norms known.
    """
    norms: dict[str, Norm] = {}
    for name, module in model.named_modules():
        shapes = {key: parameter.shape for key, parameter in module.named_parameters()}
        # Gains and biases only: whatever else has hidden width multiplies, and is compared by the logits.
        if shapes and all(len(shape) == 1 and f"{name}.{key}" in places for key, shape in shapes.items()):
            norm = _recognise(name, module, shapes)
            norms |= {name: norm} if norm else {}
    return norms


def _recognise(name: str, module: nn.Module, shapes: Mapping[str, torch.Size]) -> Norm | None:
    """The norm that a module with parameters [hidden] computes; None if it mixes no channels."""
    random = torch.Generator().manual_seed(0)
    # Far from zero, so that no epsilon matters, and off centre.
    x = 30 * torch.randn(5, *next(iter(shapes.values())), generator=random) + 10
    values = {key: 1 + 0.3 * torch.randn(shape, generator=random) for key, shape in shapes.items()}
    try:
        output = functional_call(module, values, (x,))
    except TypeError:  # it wants more than hidden states; what it does with them shows in the logits
        return None
    for gain, *others in (tuple(shapes), tuple(shapes)[::-1]):
        for centred, offset in itertools.product((False, True), (0, 1)):
            expected = _normalised(x, centred) * (offset + values[gain]) + sum(values[key] for key in others)
            if len(others) < 2 and _alike(output, expected):
                return Norm(f"{name}.{gain}", centred, offset)
    # No norm that is known. It may still work on each channel alone (a scale): then the first one's output does not
    # change when all others become zero.
    x[:, 1:] = 0
    if torch.equal(functional_call(module, values, (x,))[:, 0], output[:, 0]):
        return None
    raise ModelError(
        f"{name} ({type(module).__name__}) mixes the hidden channels in an unknown way",
        expected="an RMSNorm or LayerNorm, whose gain can make up for the channels that go",
        fix="leave the hidden width out of the recipe",
    )


def _normalised(x: Tensor, centred: bool) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if centred else x
    return x * x.square().mean(-1, keepdim=True).rsqrt()


def first_deviation(
    before: PreTrainedModel, after: PreTrainedModel, places: Places, norms: Sequence[str]
) -> str | None:
    """Compare the narrower model with the full one in which the other channels are zero, on random stand-in weights.

    The full model's norms are restricted to the channels that stay. Stand-ins take hardly any memory: where a weight is
    large, it varies along the hidden channels only.

    Args:
        before: the full model on the meta device.
        after: the narrower one.
        places: which dimensions of which parameters differ between them.
        norms: modules that normalise over the hidden channels.

    Returns:
        How their logits differ; None if they are alike to rounding.
    """
    size, kept = _sizes(before, after, places)
    random = torch.Generator().manual_seed(0)
    channels = torch.tensor(sorted(torch.randperm(size, generator=random)[:kept].tolist()))
    # The full model with zeros in the other channels computes what the narrow one must, if width is only width.
    full, narrow = _stand_ins(before, after, places, channels)
    with torch.no_grad(), ExitStack() as stack:
        for name in norms:
            # But for norms, which divide by the number of channels, the zeros among them.
            restricted = _restricted(after.get_submodule(name), name, narrow, channels)
            stack.callback(before.get_submodule(name).register_forward_hook(restricted).remove)
        wanted, found = _run(before, full), _run(after, narrow)
    if not bool(wanted.isfinite().all() & found.isfinite().all()):
        return "the check on random weights gave values that are not finite"
    if _alike(found, wanted):
        return None
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return (
        f"its logits would differ by {error:.1%} from those of the model whose other channels are zero; "
        "a norm without a gain does that, or a scale that follows from the hidden size"
    )


def _sizes(before: PreTrainedModel, after: PreTrainedModel, places: Places) -> tuple[int, int]:
    name, dims = next(iter(places.items()))
    return before.get_parameter(name).shape[dims[0]], after.get_parameter(name).shape[dims[0]]


def _stand_ins(
    before: PreTrainedModel, after: PreTrainedModel, places: Places, channels: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights for both models; those of the full one are zero outside the channels."""
    random = torch.Generator().manual_seed(1)
    full: dict[str, Tensor] = {}
    narrow: dict[str, Tensor] = {}
    for name, parameter in before.named_parameters():
        dims = places.get(name, ())
        shape = [size if dim in dims else 1 for dim, size in enumerate(parameter.shape)]
        for dim, size in enumerate(parameter.shape):
            # One value along a dimension takes no memory (`expand`); channels must be told apart, and vary in any case.
            if torch.Size(shape).numel() * size <= _MOST_RANDOM:
                shape[dim] = size
        values = torch.randn(shape, generator=random)
        # Gains stay away from zero, and products of about the size of what they multiply.
        values = 1 + 0.2 * values if values.dim() < 2 else values / max(parameter.shape[-2:]) ** 0.5
        small = values
        for dim in dims:
            small = small.index_select(dim, channels)
            values = torch.zeros_like(values).index_copy_(dim, channels, values.index_select(dim, channels))
        full[name] = values.expand(parameter.shape)
        narrow[name] = small.expand(after.get_parameter(name).shape)
    return full, narrow


def _restricted(narrow: nn.Module, name: str, tensors: Mapping[str, Tensor], channels: Tensor) -> Callable[..., Tensor]:
    """A hook that makes a norm see the channels that stay, and no others."""
    own = {key: tensors[f"{name}.{key}"] for key, _ in narrow.named_parameters()}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        result = functional_call(narrow, own, (args[0][..., channels],))
        return torch.zeros_like(output).index_copy_(-1, channels, result)

    return hook


def _run(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> Tensor:
    buffers = {name: buffer.detach().cpu() for name, buffer in model.named_buffers()}
    ids = torch.arange(_TOKENS)[None] % model.get_input_embeddings().weight.shape[0]
    with eagerly(model), _Folded():
        output = functional_call(model, {**parameters, **buffers}, kwargs={"input_ids": ids, "use_cache": False})
    return output.logits


def _alike(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and float((found - expected).abs().max()) <= _TOLERANCE * float(
        expected.abs().max()
    )


class _Folded(TorchFunctionMode):
    """Multiplies by a weight that holds the same values in each row, or column, without unfolding it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
        rows = weight.shape[0]
        # Stride 0: all columns are the first one, so that the inputs may be added up before.
        if weight.stride(1) == 0:
            x, weight = x.sum(-1, keepdim=True), weight[:, :1]
        if weight.stride(0) == 0:
            weight = weight[:1]
        result = F.linear(x, weight).expand(*x.shape[:-1], rows)
        return result.contiguous() if bias is None else result + bias
