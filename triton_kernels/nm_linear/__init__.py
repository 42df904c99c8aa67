"""2:4 linear: y = x @ W.T + bias where two of every four weights along the input dimension are stored.

Two operations, each opaque to `torch.compile`, capturable in a CUDA graph and deterministic:

* `linear_24` over fragments, the order of sparse tensor cores (see fragments.py), for GPUs where `supported` is None;
* `linear_24_portable` over the layout on disk (see reference.py), for every device.

Both choose by the number of tokens. Few tokens are bound by the bytes of the weights and take a decode kernel, which
reads 0.5625 of the dense bytes. Many are bound by arithmetic: the dense matrix is expanded into the device's scratch
(see workspace.py) and multiplied by the library. Without Triton, as on a CPU, plain torch expands the dense matrix in
every call, and the result equals the dense layer's bit for bit.

The weights are constants. Gradients flow to x and the bias, through the dense matrix.
"""

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import configurations, workspace
from .fragments import check_fragments, from_fragments
from .reference import dense_24_reference

if TYPE_CHECKING:  # these modules need Triton, which is not installed everywhere
    from .decode import DecodeConfiguration
    from .portable import PortableConfiguration

HIGHEST_DECODE_TOKENS = 64


@functools.cache
def supported(device: torch.device) -> str | None:
    """The reason why a device cannot run `linear_24` on sparse tensor cores; None if it can."""
    if device.type != "cuda" or torch.version.hip:
        name = configurations.device_key(device) if device.type == "cuda" else device.type
        return f"{name} is not an NVIDIA GPU"
    if not _has_triton():
        return "triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = configurations.device_key(device)
        return f"{name} has compute capability {major}.{minor}; mma.sp needs 8.0 or higher"
    return None


def reserve(device: torch.device, out_features: int, in_features: int, *, portable: bool = False) -> None:
    """Allocate what a layer needs in forward, in memory that all layers of the device share; call it when it is built.

    Args:
        device: where the layer is; nothing is needed on a device without kernels.
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        portable: whether the layer runs `linear_24_portable`.

    Raises:
        RuntimeError: memory would have to grow while a CUDA graph is captured.
    """
    if not _runs_kernels(device):
        return
    needed = _portable_bytes if portable else _decode_bytes
    partial_bytes = max(
        needed(device, out_features, in_features, tokens) for tokens in range(1, HIGHEST_DECODE_TOKENS + 1)
    )
    workspace.reserve(device, 2 * out_features * in_features, partial_bytes)


def shape_key(out_features: int, in_features: int, tokens: int) -> dict[str, int]:
    """The named sizes under which a configuration is recorded; tokens as kernels are compiled for: 8, 16, 32 or 64."""
    tokens = max(8, 1 << (tokens - 1).bit_length())
    return {"out_features": out_features, "in_features": in_features, "tokens": tokens}


def decode_configuration(
    device: torch.device, out_features: int, in_features: int, tokens: int
) -> "DecodeConfiguration":
    """The configuration of `linear_24`: measured under its name and `shape_key`, or else calculated."""
    from .decode import CHOICES, HIGHEST_SPLITS, DecodeConfiguration, choose_default, token_groups

    def make(**choice: Any) -> DecodeConfiguration:
        made = DecodeConfiguration(**choice)
        allowed = CHOICES[token_groups(tokens)]
        if (made.warps, made.row_tiles) not in allowed or made.splits not in range(1, HIGHEST_SPLITS + 1):
            raise ValueError(f"expected (warps, row_tiles) among {allowed} and splits in [1, {HIGHEST_SPLITS}]")
        return made

    key = shape_key(out_features, in_features, tokens)
    found = configurations.measured_as(make, "linear_24", device, **key)
    return found or choose_default(out_features, in_features, tokens, configurations.sm_count(device))


def portable_configuration(
    device: torch.device, out_features: int, in_features: int, tokens: int
) -> "PortableConfiguration":
    """The configuration of `linear_24_portable`: measured under its name and `shape_key`, or else calculated."""
    from .portable import PortableConfiguration, choose_default

    key = shape_key(out_features, in_features, tokens)
    found = configurations.measured_as(PortableConfiguration, "linear_24_portable", device, **key)
    return found or choose_default(out_features, in_features, tokens, configurations.sm_count(device))


@torch.library.custom_op("llmprune::linear_24", mutates_args=())
def linear_24(
    x: Tensor, a: Tensor, e: Tensor, bias: Tensor | None, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Multiply by a 2:4 matrix in fragment order.

    Args:
        x: [..., in_features], of `dtype`; under autocast any floating dtype but float64.
        a: int32, the pairs of weights as `to_fragments` orders them.
        e: int32, their indices.
        bias: [out_features], of `dtype` (under autocast as x), or None.
        out_features: rows of the matrix; in a and e they are padded to a multiple of 16.
        in_features: columns of the matrix, a multiple of 8; in a and e they are padded to a multiple of 256.
        dtype: bfloat16 or float16, the dtype of the weights, which their bits do not reveal.

    Returns:
        [..., out_features] of `dtype`.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, or the tensors are on different devices.
    """
    _check(x, (a, e), bias, (out_features, in_features), dtype)
    tokens = _tokens(x)
    with _current(x.device):
        if supported(x.device) is None and _decodes("linear_24", tokens, out_features):
            y = _decode(tokens, a, e, bias, out_features)
        else:
            y = F.linear(tokens, _dense(a, e, out_features, in_features, dtype, workspace.scratch), bias)
    return y.view(*x.shape[:-1], out_features)


@torch.library.custom_op("llmprune::linear_24_portable", mutates_args=())
def linear_24_portable(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by a 2:4 matrix in the layout on disk.

    Args:
        x: [..., in_features], of the values' dtype; under autocast any floating dtype but float64.
        values: [out_features, in_features / 2], bfloat16, float16, or float32 (which runs in plain torch everywhere).
        meta: [out_features, in_features / 8], uint8, two nibbles i0 | i1 << 2 per byte.
        bias: [out_features], of the values' dtype (under autocast as x), or None.

    Returns:
        [..., out_features] of the values' dtype.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, or the tensors are on different devices.
    """
    _check_disk_layout(values, meta)
    _check(x, (values, meta), bias, (len(meta), 8 * meta.shape[1]), values.dtype)
    tokens = _tokens(x)
    with _current(x.device):
        if values.dtype != torch.float32 and _decodes("linear_24_portable", tokens, len(meta)):
            y = _decode_portable(tokens, values, meta, bias)
        else:
            y = F.linear(tokens, _dense_portable(values, meta, workspace.scratch), bias)
    return y.view(*x.shape[:-1], len(meta))


@torch.library.custom_op("llmprune::dense_24", mutates_args=())
def dense_24(a: Tensor, e: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Expand a matrix in fragment order: [out_features, in_features] of `dtype`, in new memory."""
    with _current(a.device):
        return _dense(a, e, out_features, in_features, dtype, _new)


@torch.library.custom_op("llmprune::dense_24_portable", mutates_args=())
def dense_24_portable(values: Tensor, meta: Tensor) -> Tensor:
    """Expand a matrix in the layout on disk: [out_features, in_features], the values' dtype, in new memory."""
    _check_disk_layout(values, meta)
    with _current(values.device):
        return _dense_portable(values, meta, _new)


@linear_24.register_fake
def _(
    x: Tensor, a: Tensor, e: Tensor, bias: Tensor | None, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@linear_24_portable.register_fake
def _(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], meta.shape[0])


@dense_24.register_fake
def _(a: Tensor, e: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return a.new_empty(out_features, in_features, dtype=dtype)


@dense_24_portable.register_fake
def _(values: Tensor, meta: Tensor) -> Tensor:
    return values.new_empty(meta.shape[0], 8 * meta.shape[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, a, e, _, *ctx.shape_and_dtype = inputs
    ctx.save_for_backward(a, e)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    given = ctx.needs_input_grad
    towards_x = grad @ dense_24(*ctx.saved_tensors, *ctx.shape_and_dtype) if given[0] else None
    return towards_x, None, None, _towards_bias(grad) if given[3] else None, None, None, None


def _remember_portable(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _gradients_portable(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    given = ctx.needs_input_grad
    if given[1]:
        raise RuntimeError(
            "a gradient is required for packed 2:4 weights\n"
            "expected: packed weights are constants\n"
            "fix: call requires_grad_(False) on them; to train the weights, unpack the checkpoint"
        )
    towards_x = grad @ dense_24_portable(*ctx.saved_tensors) if given[0] else None
    return towards_x, None, None, _towards_bias(grad) if given[3] else None


def _towards_bias(grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


linear_24.register_autograd(_gradients, setup_context=_remember)
linear_24_portable.register_autograd(_gradients_portable, setup_context=_remember_portable)

# `register_autocast` casts to one dtype, fixed when the op is defined; here each call casts to its weights' dtype.
_autocast = torch.library.Library("llmprune", "FRAGMENT")


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    castable = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if castable else tensor  # type: ignore[union-attr]


def _linear_24_autocast(
    x: Tensor, a: Tensor, e: Tensor, bias: Tensor | None, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return linear_24(_cast(x, dtype), a, e, _cast(bias, dtype), out_features, in_features, dtype)


def _linear_24_portable_autocast(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return linear_24_portable(_cast(x, values.dtype), values, meta, _cast(bias, values.dtype))


for _key in ("AutocastCPU", "AutocastCUDA"):
    _autocast.impl("linear_24", _linear_24_autocast, _key)
    _autocast.impl("linear_24_portable", _linear_24_portable_autocast, _key)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _runs_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and _has_triton()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one: Triton launches on it, wherever its arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _decodes(op: str, tokens: Tensor, out_features: int) -> bool:
    """Whether this many tokens take the decode kernel."""
    if not _runs_kernels(tokens.device):
        return False
    shape = {"out_features": out_features, "in_features": tokens.shape[1]}
    return 0 < len(tokens) < configurations.dispatch_limit(op, tokens.device, HIGHEST_DECODE_TOKENS, **shape)


def _decode(tokens: Tensor, a: Tensor, e: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    from .decode import linear_24_decode, workspace_bytes

    count, in_features = tokens.shape
    configuration = decode_configuration(tokens.device, out_features, in_features, count)
    needed = workspace_bytes(count, out_features, in_features, configuration)
    space = workspace.partials(tokens.device, (needed // 4,))
    return linear_24_decode(tokens, a, e, bias, out_features, configuration, space)


def _decode_portable(tokens: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    from .portable import linear_24_decode_portable, workspace_bytes

    configuration = portable_configuration(tokens.device, len(meta), tokens.shape[1], len(tokens))
    space = workspace.partials(tokens.device, (workspace_bytes(len(tokens), len(meta), configuration) // 4,))
    return linear_24_decode_portable(tokens, values, meta, bias, configuration, space)


def _decode_bytes(device: torch.device, out_features: int, in_features: int, tokens: int) -> int:
    from .decode import workspace_bytes

    configuration = decode_configuration(device, out_features, in_features, tokens)
    return workspace_bytes(tokens, out_features, in_features, configuration)


def _portable_bytes(device: torch.device, out_features: int, in_features: int, tokens: int) -> int:
    from .portable import workspace_bytes

    return workspace_bytes(tokens, out_features, portable_configuration(device, out_features, in_features, tokens))


# Memory for a dense matrix: device, shape, dtype -> an uninitialised tensor.
_Allocate = Callable[[torch.device, tuple[int, int], torch.dtype], Tensor]


def _new(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _dense(
    a: Tensor, e: Tensor, out_features: int, in_features: int, dtype: torch.dtype, allocate: _Allocate
) -> Tensor:
    if not _runs_kernels(a.device):
        return dense_24_reference(*from_fragments(a, e, out_features, in_features, dtype))
    from .expand import expand_fragments

    check_fragments(a, e, out_features, in_features)
    weight = allocate(a.device, (out_features, in_features), dtype)
    expand_fragments(a, e, weight)
    return weight


def _dense_portable(values: Tensor, meta: Tensor, allocate: _Allocate) -> Tensor:
    if not _runs_kernels(values.device) or values.dtype == torch.float32:
        return dense_24_reference(values, meta)
    from .expand import expand

    weight = allocate(values.device, (len(meta), 8 * meta.shape[1]), values.dtype)
    expand(values, meta, weight)
    return weight


def _tokens(x: Tensor) -> Tensor:
    """Flatten x to [tokens, in_features]; copied if the kernels could not read it 16 bytes at a time."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    return tokens if tokens.data_ptr() % 16 == 0 else tokens.clone()


def _check(
    x: Tensor, weights: tuple[Tensor, Tensor], bias: Tensor | None, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    if x.shape[-1] != shape[1]:
        raise ValueError(f"x is {list(x.shape)}; expected [..., {shape[1]}] for a matrix of {shape[0]} x {shape[1]}")
    if x.dtype != dtype:
        raise TypeError(f"x is {x.dtype}, the weights {dtype}; cast x, or use torch.autocast, which casts it")
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}; expected [{shape[0]}]")
    if bias is not None and bias.dtype != dtype:
        raise TypeError(f"bias is {bias.dtype}, the weights {dtype}; cast it when the layer is built")
    devices = {tensor.device for tensor in (x, *weights, bias) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors on {', '.join(sorted(map(str, devices)))}; expected all on one device")


def _check_disk_layout(values: Tensor, meta: Tensor) -> None:
    if meta.dtype != torch.uint8 or values.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"values of {values.dtype}, meta of {meta.dtype}; expected 16-bit floats or float32, and uint8")
    if meta.ndim != 2 or values.shape != (len(meta), 4 * meta.shape[1]):
        raise ValueError(
            f"values {list(values.shape)} with meta {list(meta.shape)}; expected [out, in / 2] with [out, in / 8]"
        )
    if not (values.is_contiguous() and meta.is_contiguous()):
        raise ValueError(f"values with strides {values.stride()}, meta {meta.stride()}; expected both contiguous")
