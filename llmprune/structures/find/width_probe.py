"""Recognise norms over hidden channels by what they compute, and check a narrower model on random weights."""

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

# Parameter name in the whole model -> its dimensions that are hidden width.
Places = Mapping[str, tuple[int, ...]]

_TOKENS = 11
# Largest stand-in for a weight, in elements; beyond that, its other dimensions hold a single value.
_MOST_RANDOM = 1 << 16
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over hidden channels: (x - centred * mean) / sqrt(mean square) * (offset + gain), with or without a bias.

    Attributes:
        gain: name, in the whole model, of the parameter [hidden].
        centred: whether the mean is subtracted (LayerNorm).
        offset: what is added to the stored gain: 0, or 1 as in Gemma.
    """

    gain: str
    centred: bool
    offset: int


def find_norms(model: PreTrainedModel, places: Places) -> dict[str, Norm]:
    """Find the modules with a gain that normalise over the hidden channels.

    Args:
        model: on the meta device.
        places: which dimensions are hidden width.

    Returns:
        Module name -> its norm.

    Raises:
        ModelError: a module with per-channel parameters mixes the channels, and is not a known norm.
    """
    norms: dict[str, Norm] = {}
    for name, module in model.named_modules():
        shapes = {key: parameter.shape for key, parameter in module.named_parameters()}
        # Gains and biases only: all other weights with hidden width are checked by comparing logits.
        if shapes and all(len(shape) == 1 and f"{name}.{key}" in places for key, shape in shapes.items()):
            norm = _recognise(name, module, shapes)
            norms |= {name: norm} if norm else {}
    return norms


def _recognise(name: str, module: nn.Module, shapes: Mapping[str, torch.Size]) -> Norm | None:
    """The norm that a module with parameters [hidden] computes; None if it does not mix channels."""
    random = torch.Generator().manual_seed(0)
    # Far from zero, so that epsilons do not matter, and not centred.
    x = 30 * torch.randn(5, *next(iter(shapes.values())), generator=random) + 10
    values = {key: 1 + 0.3 * torch.randn(shape, generator=random) for key, shape in shapes.items()}
    try:
        output = functional_call(module, values, (x,))
    except TypeError:  # it takes more than hidden states; its effect is checked by comparing logits
        return None
    for gain, *others in (tuple(shapes), tuple(shapes)[::-1]):
        for centred, offset in itertools.product((False, True), (0, 1)):
            expected = _normalised(x, centred) * (offset + values[gain]) + sum(values[key] for key in others)
            if len(others) < 2 and is_close(output, expected):
                return Norm(f"{name}.{gain}", centred, offset)
    # Not a known norm. It may still act on each channel separately (a scale): then the first channel's output does not
    # change when all others become zero.
    x[:, 1:] = 0
    if torch.equal(functional_call(module, values, (x,))[:, 0], output[:, 0]):
        return None
    raise ModelError(
        f"{name} ({type(module).__name__}) mixes the hidden channels in an unknown way",
        expected="an RMSNorm or LayerNorm, whose gain can compensate for the removed channels",
        fix="leave the hidden width out of the recipe",
    )


def _normalised(x: Tensor, centred: bool) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if centred else x
    return x * x.square().mean(-1, keepdim=True).rsqrt()


def first_deviation(
    before: PreTrainedModel, after: PreTrainedModel, places: Places, norms: Sequence[str]
) -> str | None:
    """Compare the narrower model, on random stand-in weights, with the full one whose other channels are zero.

    The full model's norms are restricted to the kept channels. Stand-ins take hardly any memory: large weights vary
    along the hidden channels only.

    Args:
        before: the full model on the meta device.
        after: the narrower one.
        places: which dimensions of which parameters differ between them.
        norms: modules that normalise over the hidden channels.

    Returns:
        How their logits differ; None if they are equal up to rounding.
    """
    size, kept = _sizes(before, after, places)
    random = torch.Generator().manual_seed(0)
    channels = torch.tensor(sorted(torch.randperm(size, generator=random)[:kept].tolist()))
    # With zeros in the other channels, the full model must compute the same as the narrow one.
    full, narrow = _stand_ins(before, after, places, channels)
    with torch.no_grad(), ExitStack() as stack:
        for name in norms:
            # Norms are the exception: they divide by the number of channels, including the zeros.
            restricted = _restricted(after.get_submodule(name), name, narrow, channels)
            stack.callback(before.get_submodule(name).register_forward_hook(restricted).remove)
        wanted, found = run_stand_ins(before, full), run_stand_ins(after, narrow)
    if not bool(wanted.isfinite().all() & found.isfinite().all()):
        return "the check on random weights gave non-finite values"
    if is_close(found, wanted):
        return None
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return (
        f"its logits would differ by {error:.1%} from those of the model whose other channels are zero; "
        "the cause may be a norm without a gain, or a scale derived from the hidden size"
    )


def _sizes(before: PreTrainedModel, after: PreTrainedModel, places: Places) -> tuple[int, int]:
    name, dims = next(iter(places.items()))
    return before.get_parameter(name).shape[dims[0]], after.get_parameter(name).shape[dims[0]]


def _stand_ins(
    before: PreTrainedModel, after: PreTrainedModel, places: Places, channels: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights for both models; in the full one they are zero outside the given channels."""
    random = torch.Generator().manual_seed(1)
    full: dict[str, Tensor] = {}
    narrow: dict[str, Tensor] = {}
    for name, parameter in before.named_parameters():
        dims = places.get(name, ())
        values = stand_in(parameter.shape, dims, random)
        small = values
        for dim in dims:
            small = small.index_select(dim, channels)
            values = torch.zeros_like(values).index_copy_(dim, channels, values.index_select(dim, channels))
        full[name] = values.expand(parameter.shape)
        narrow[name] = small.expand(after.get_parameter(name).shape)
    return full, narrow


def stand_in(shape: Sequence[int], dims: Sequence[int], random: torch.Generator) -> Tensor:
    """Random values for a parameter, to be expanded to its shape: large ones vary along these dimensions only."""
    drawn = [size if dim in dims else 1 for dim, size in enumerate(shape)]
    for dim, size in enumerate(shape):
        # A single value along a dimension takes no memory (`expand`); only hidden channels must differ.
        if torch.Size(drawn).numel() * size <= _MOST_RANDOM:
            drawn[dim] = size
    values = torch.randn(drawn, generator=random)
    # Keep gains away from zero, and the outputs of matmuls about the size of their inputs.
    return 1 + 0.2 * values if values.dim() < 2 else values / max(shape[-2:]) ** 0.5


def _restricted(narrow: nn.Module, name: str, tensors: Mapping[str, Tensor], channels: Tensor) -> Callable[..., Tensor]:
    """A hook that makes a norm see only the kept channels."""
    own = {key: tensors[f"{name}.{key}"] for key, _ in narrow.named_parameters()}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        result = functional_call(narrow, own, (args[0][..., channels],))
        return torch.zeros_like(output).index_copy_(-1, channels, result)

    return hook


def run_stand_ins(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> Tensor:
    """The logits of a few tokens, for a model on the meta device and stand-ins for its parameters."""
    buffers = {name: buffer.detach().cpu() for name, buffer in model.named_buffers()}
    ids = torch.arange(_TOKENS)[None] % model.get_input_embeddings().weight.shape[0]
    with eagerly(model), _Folded():
        output = functional_call(model, {**parameters, **buffers}, kwargs={"input_ids": ids, "use_cache": False})
    return output.logits


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    return found.shape == expected.shape and float((found - expected).abs().max()) <= _TOLERANCE * float(
        expected.abs().max()
    )


class _Folded(TorchFunctionMode):
    """Multiplies by a weight whose rows, or columns, are all equal, without expanding it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
        rows = weight.shape[0]
        # Stride 0: all columns equal the first one, so the inputs can be summed first.
        if weight.stride(1) == 0:
            x, weight = x.sum(-1, keepdim=True), weight[:, :1]
        if weight.stride(0) == 0:
            weight = weight[:1]
        result = F.linear(x, weight).expand(*x.shape[:-1], rows)
        return result.contiguous() if bias is None else result + bias
