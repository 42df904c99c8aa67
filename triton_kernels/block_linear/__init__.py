"""Multiply by a matrix of which only some square blocks are stored: one op for decode and prefill, CPU and GPU."""

import contextlib
from functools import lru_cache

import torch
import torch.utils._triton  # `import torch` does not load it
from torch import Tensor
from torch.nn import functional as F

from .. import configurations, workspace
from .configuration import BLOCKS, DECODE_TOKENS, Configuration, choose_default
from .reference import block_linear_reference, expand, expand_into

__all__ = [
    "BLOCKS",
    "DECODE_TOKENS",
    "DTYPES",
    "NEVER",
    "Configuration",
    "block_linear",
    "choose_configuration",
    "choose_default",
    "dispatch_shape",
    "expand_into",
    "measured_shape",
    "reserve",
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# More tokens than this run with the choice that was measured for this many.
MEASURED_TOKENS = 8192

# From this number of tokens, a CPU is faster with the dense matrix, including the time to write it, if the fraction of
# stored blocks exceeds this density, by block size (eval/bench/LOG.md).
_CPU_TOKENS = 512
_CPU_DENSITY = {16: 0.014, 32: 0.022, 64: 0.05, 128: 0.11}

# A limit of tokens that means "the kernel is always faster", the default until something else is measured.
NEVER = 1 << 31


def block_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    out_features: int,
    per_row: int | None,
) -> Tensor:
    """Compute x @ W.T + bias, summed in float32, where W [out, in] is zero except for its stored blocks.

    The stored blocks are those of `torch.sparse_bsr_tensor`. Inside autocast, x is cast to the weights' dtype.
    Gradients flow to x and the bias, not to the weights.

    Args:
        x: [..., in], of the weights' dtype; `in` is a multiple of the block size B.
        values: [blocks, B, B], bfloat16, float16 or float32, contiguous; B is 16, 32, 64 or 128.
        crow: int32 [out / B + 1], where each block row begins in `values`; it ends with `blocks`.
        col: int32 [blocks], each block's block column, in [0, in / B). The content of crow and col is not checked here,
            since that would synchronise with the GPU; wrong indices read out of bounds.
        bias: [out] or None.
        out_features: the number of rows of W.
        per_row: the number of blocks in every block row, if it is the same (faster); otherwise None.

    Returns:
        [..., out], of x's dtype.

    Raises:
        TypeError: a dtype is not one of these, or x and the weights differ.
        ValueError: a shape, a device or the memory layout is not as above.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return block_linear(x.to(values.dtype), values, crow, col, bias, out_features, per_row)
    _check(x, values, crow, col, bias, out_features, per_row)
    y: Tensor = _operator(x, values, crow, col, bias, out_features, per_row)
    return y


def choose_configuration(
    tokens: int, in_features: int, out_features: int, values: Tensor, per_row: int | None
) -> Configuration:
    """Look up the measured choice for a shape on the GPU of `values`, or calculate a default.

    Raises:
        ValueError: the measured choice does not fit the block size.
    """
    shape = measured_shape(tokens, in_features, out_features, values, per_row)
    measured = configurations.measured("block_linear", values.device, **shape)
    blocks, block, _ = values.shape
    if measured is not None:
        chosen = Configuration(**{name: int(size) for name, size in measured.items()})
        chosen.check(block)
        return chosen
    processors = configurations.sm_count(values.device)
    itemsize, shared = values.element_size(), _shared_bytes(values.device)
    return choose_default(tokens, out_features, block, blocks, itemsize, processors, shared)


def measured_shape(
    tokens: int, in_features: int, out_features: int, values: Tensor, per_row: int | None
) -> dict[str, int]:
    """The named sizes under which a choice is recorded and found; tokens are rounded up to a power of two."""
    return {
        "tokens": min(1 << (tokens - 1).bit_length(), MEASURED_TOKENS),
        "in_features": in_features,
        "out_features": out_features,
        "block": values.shape[-1],
        "blocks": len(values),
        "balanced": int(per_row is not None),
        "itemsize": values.element_size(),
    }


def dispatch_shape(in_features: int, out_features: int, values: Tensor) -> dict[str, int]:
    """The named sizes under which the number of tokens is recorded from which the dense matrix is expanded."""
    blocks, block, _ = values.shape
    return {"in_features": in_features, "out_features": out_features, "block": block, "blocks": blocks}


def reserve(in_features: int, out_features: int, values: Tensor) -> None:
    """Allocate the scratch that the dense path needs if a limit was measured; call it when a layer is built."""
    if values.is_cuda and _dense_from(in_features, out_features, values) < NEVER:
        workspace.reserve(values.device, in_features * out_features * values.element_size(), 0)


def _dense_from(in_features: int, out_features: int, values: Tensor) -> int:
    shape = dispatch_shape(in_features, out_features, values)
    return configurations.dispatch_limit("block_linear", values.device, NEVER - 1, **shape)


@torch.library.custom_op("llmprune::block_linear", mutates_args=())
def _operator(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    out_features: int,
    per_row: int | None,
) -> Tensor:
    # Triton launches on the current device.
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        y = _multiply(x.reshape(-1, x.shape[-1]).contiguous(), values, crow, col, bias, out_features, per_row)
    return y.view(*x.shape[:-1], out_features)


def _multiply(
    rows: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    out_features: int,
    per_row: int | None,
) -> Tensor:
    if rows.is_cuda and len(rows) and _kernel_runs(rows.device):
        if len(rows) >= _dense_from(rows.shape[1], out_features, values):
            y = _expanded_product(rows, values, crow, col, bias, out_features)
        else:
            from .kernel import block_linear_allocating

            chosen = choose_configuration(len(rows), rows.shape[1], out_features, values, per_row)
            y = block_linear_allocating(rows, values, (crow, col), bias, out_features, per_row, chosen)
    elif len(rows) >= _CPU_TOKENS and len(values) > _CPU_DENSITY[values.shape[-1]] * _blocks(
        rows, out_features, values
    ):
        y = F.linear(rows, expand(values, crow, col, (out_features, rows.shape[1])), bias)
    else:
        y = block_linear_reference(rows, values, crow, col, bias, out_features)
    return y


def _blocks(rows: Tensor, out_features: int, values: Tensor) -> int:
    """The number of blocks if all were stored."""
    return rows.shape[1] * out_features // values.shape[-1] ** 2


def _expanded_product(
    rows: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Expand the dense matrix into the device's scratch, and multiply by it."""
    weight = workspace.scratch(rows.device, (out_features, rows.shape[1]), values.dtype)
    expand_into(weight, values, crow, col)
    return F.linear(rows, weight, bias)


@_operator.register_fake
def _(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    out_features: int,
    per_row: int | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, values, crow, col, _, out_features, _ = inputs
    if values.requires_grad:
        raise ValueError("block_linear: the weights require a gradient; expected values.requires_grad_(False)")
    ctx.save_for_backward(values, crow, col)
    ctx.shape = (out_features, x.shape[-1])


def _backward(ctx, gradient):  # type: ignore[no-untyped-def]
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        values, crow, col = ctx.saved_tensors
        of_x = gradient @ expand(values, crow, col, ctx.shape)
    if ctx.needs_input_grad[4]:
        of_bias = gradient.flatten(0, -2).sum(0)
    return of_x, None, None, None, of_bias, None, None


_operator.register_autograd(_backward, setup_context=_remember)


def _check(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, out_features: int, per_row: int | None
) -> None:
    if values.dtype not in DTYPES:
        raise TypeError(f"block_linear: values are {values.dtype}; expected bfloat16, float16 or float32")
    if x.dtype != values.dtype:
        raise TypeError(f"block_linear: x is {x.dtype}; expected {values.dtype}, the weights' dtype")
    if crow.dtype != torch.int32 or col.dtype != torch.int32:
        raise TypeError(f"block_linear: crow is {crow.dtype} and col {col.dtype}; expected int32")
    blocks, block = len(values), values.shape[-1]
    if values.shape != (blocks, block, block) or block not in BLOCKS:
        raise ValueError(f"block_linear: values are {list(values.shape)}; expected [blocks, B, B] with B in {BLOCKS}")
    if out_features % block or x.shape[-1] % block:
        raise ValueError(
            f"block_linear: a matrix of {out_features} x {x.shape[-1]} (out x in); expected multiples of {block}"
        )
    block_rows = out_features // block
    if crow.shape != (block_rows + 1,) or col.shape != (blocks,):
        raise ValueError(
            f"block_linear: crow is {list(crow.shape)} and col {list(col.shape)}; "
            f"expected [{block_rows + 1}] and [{blocks}]"
        )
    if per_row is not None and per_row * block_rows != blocks:
        raise ValueError(f"block_linear: {blocks} blocks; expected {block_rows} rows of {per_row}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"block_linear: bias is {list(bias.shape)}; expected [{out_features}]")
    operands = [values, crow, col] if bias is None else [values, crow, col, bias]
    if any(operand.device != x.device for operand in operands):
        raise ValueError(f"block_linear: operands on {sorted({str(o.device) for o in operands})}; expected {x.device}")
    if not all(operand.is_contiguous() for operand in operands):
        raise ValueError("block_linear: values, crow, col or bias is not contiguous; expected contiguous tensors")


@lru_cache
def _kernel_runs(device: torch.device) -> bool:
    """Whether this GPU has Triton and tensor cores that multiply bfloat16."""
    return torch.utils._triton.has_triton() and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def _shared_bytes(device: torch.device) -> int:
    """The shared memory that one program may use; if PyTorch does not report it, what every GPU has."""
    if device.type != "cuda":
        return 48 << 10
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 << 10)
