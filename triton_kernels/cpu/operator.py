"""The operation: opaque to `torch.compile`, and called directly, past torch's dispatcher, where nothing needs that."""

import math
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .choices import FEWEST_TOKENS, dense_from
from .finding import library
from .library import TYPES, Described, new_memory

# Bytes of the dense rows that are expanded and multiplied at a time: copying results together costs more than memory.
_SLAB = 64 << 20

# The same where they become wider than they are stored, which costs less while they stay in the cache.
PIECE = 4 << 20
_scratch = threading.local()


def pack(
    kind: str, shape: tuple[int, int], bits: Tensor, values: Tensor, peaks: Tensor | None = None, group: int = 0
) -> Tensor:
    """Pack the tensors on disk for the CPU.

    Args:
        kind: "bitmask" or "nm" (2:4).
        shape: (out, in); for 2:4 a multiple of 4 columns.
        bits: uint8, the mask or the meta of the layout.
        values: bfloat16, float16, float32 or int8, its stored weights.
        peaks: for int8 weights, [out, groups] of the dense weights' dtype.
        group: columns that share a peak: a multiple of 128, or all of them.

    Returns:
        One tensor of the dense weights' dtype, whose numbers mean nothing; on the meta device, an empty one of the same
        size.

    Raises:
        CorruptMatrixError: mask or meta is not as its layout says.
        ValueError: a shape is not as above.
    """
    dtype = values.dtype if peaks is None else peaks.dtype
    stored = values if values.is_meta else _narrowed(values)
    # The dtype of int8 weights is that of their peaks; others are what is stored.
    nonzeros = values.numel() if kind == "bitmask" else 0
    found = Described(kind, stored.dtype, shape, nonzeros, group, stored.dtype if peaks is None else dtype)
    if values.is_meta:
        return torch.empty(library().size(found) // dtype.itemsize, dtype=dtype, device="meta")
    return library().pack(found, bits, stored, peaks, dtype)


def unpack(packed: Tensor) -> tuple[Tensor, ...]:
    """The tensors on disk, bits and values, and peaks of int8 weights, bit for bit; the inverse of `pack`."""
    found = library().describe(packed)
    out, columns = found.shape
    bits = torch.zeros(out, -(-columns // 8), dtype=torch.uint8, device=packed.device)
    count = (out, columns // 2) if found.kind == "nm" else (found.nonzeros,)
    values = torch.empty(count, dtype=found.stored, device=packed.device)
    if not found.group:
        library().unpack(packed, bits, values, None)
        return bits, values.to(packed.dtype)
    peaks = torch.empty(out, -(-columns // found.group), dtype=found.dtype, device=packed.device)
    library().unpack(packed, bits, values, peaks)
    return bits, values, peaks


def linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, sizes: list[int]) -> Tensor:
    """Compute x @ W.T + bias for packed matrices that are stacked along the output dimension.

    Args:
        x: [..., in] on the CPU, of the matrices' dtype.
        packed: from `pack`, of the same kind, dtype and columns.
        bias: [sum of sizes], of x's dtype, or None.
        sizes: the rows of each matrix.

    Returns:
        [..., sum of sizes], of x's dtype.

    Raises:
        TypeError: x or the bias is not of the matrices' dtype.
        ValueError: a shape or an address is not as above, or a packed tensor is damaged.
    """
    if not torch.compiler.is_compiling():
        if is_transformed():
            return _transformable_linear(x, packed, bias, sizes)
        # The dispatcher costs several times what the call itself does, more than a small matrix.
        if is_plain(x, bias):
            return _linear(x, packed, bias, sizes)
    y: Tensor = _operator(x, packed, bias, sizes)
    return y


def dense(packed: Tensor) -> Tensor:
    """The dense matrix [out, in], of the dtype of `packed`."""
    found = library().describe(packed)
    rows = torch.empty(found.shape, dtype=found.dtype, device=packed.device)
    library().expand(packed, range(found.shape[0]), rows)
    return rows.to(packed.dtype)


@torch.library.custom_op("llmprune::cpu_linear", mutates_args=())
def _operator(x: Tensor, packed: list[Tensor], bias: Tensor | None, sizes: list[int]) -> Tensor:
    return _linear(x, packed, bias, sizes)


@_operator.register_fake
def _(x: Tensor, packed: list[Tensor], bias: Tensor | None, sizes: list[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(sizes))


@torch.library.custom_op("llmprune::cpu_dense", mutates_args=())
def _dense_operator(packed: Tensor, out: int, columns: int) -> Tensor:
    return dense(packed)


@_dense_operator.register_fake
def _(packed: Tensor, out: int, columns: int) -> Tensor:
    return packed.new_empty(out, columns)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, _, ctx.sizes = inputs
    ctx.columns = x.shape[-1]
    ctx.save_for_backward(*packed)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    parts = gradient.split(ctx.sizes, dim=-1)
    towards_x = None
    if ctx.needs_input_grad[0]:
        matrices = zip(parts, ctx.saved_tensors, ctx.sizes, strict=True)
        towards_x = torch.stack([part @ _dense_operator(m, size, ctx.columns) for part, m, size in matrices]).sum(0)
    towards_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return towards_x, [None] * len(ctx.saved_tensors), towards_bias, None


_operator.register_autograd(_gradients, setup_context=_remember)


def _linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, sizes: list[int]) -> Tensor:
    _check(x, packed, bias, sizes)
    tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    count = len(tokens)
    if count >= FEWEST_TOKENS and count >= dense_from(packed, sizes):
        y = expanded_linear(tokens, packed, bias, sizes)
    else:
        y = x.new_empty(count, sum(sizes))
        library().multiply(packed, tokens, bias, y)
    return y.view(*x.shape[:-1], y.shape[1])


def expanded_linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, sizes: list[int]) -> Tensor:
    """X @ W.T + bias, [tokens, out], for X [tokens, in]: the dense rows are expanded and multiplied by the library."""
    columns, stored = x.shape[1], library().describe(packed[0]).dtype
    is_wider = stored is not x.dtype
    step = max(16, (PIECE if is_wider else _SLAB) // max(1, columns * x.itemsize) // 16 * 16)
    if sum(sizes) <= step and not is_wider:
        weight = scratch_rows(sum(sizes), columns, stored)
        for matrix, size, rows in zip(packed, sizes, weight.split(sizes), strict=True):
            library().expand(matrix, range(size), rows)
        return F.linear(x, weight, bias)
    first, y = 0, x.new_empty(len(x), sum(sizes))
    for matrix, size in zip(packed, sizes, strict=True):
        for start in range(0, size, step):
            rows = range(start, min(start + step, size))
            dense_rows = scratch_rows(len(rows), columns, stored)
            library().expand(matrix, rows, dense_rows)
            if is_wider:
                dense_rows = scratch_rows(len(rows), columns, x.dtype, "wide").copy_(dense_rows)
            place = slice(first + rows.start, first + rows.stop)
            y[:, place] = F.linear(x, dense_rows, None if bias is None else bias[place])
        first += size
    return y


def scratch_rows(rows: int, columns: int, dtype: torch.dtype, name: str = "stored") -> Tensor:
    """Rows of this thread's scratch memory: new memory for each product would cost more time than expanding them."""
    count = rows * columns * dtype.itemsize
    held: Tensor | None = getattr(_scratch, name, None)
    if held is None or held.nbytes < count:
        held = new_memory(count)
        setattr(_scratch, name, held)
    return held[:count].view(dtype).view(rows, columns)


def _narrowed(values: Tensor) -> Tensor:
    """The values as bfloat16 if it holds every bit of them."""
    if values.dtype != torch.float32 or bool((values.contiguous().view(torch.int32) & 0xFFFF).any()):
        return values
    # The upper halves as they are: a conversion would change the bits of some NaNs.
    return values.contiguous().view(torch.bfloat16).view(*values.shape, 2)[..., 1].contiguous()


def is_transformed() -> bool:
    """Whether torch.func transforms the call, or derivatives are carried forward through it."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _transformable_linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, sizes: list[int]) -> Tensor:
    """The product by the dense matrix: transforms know no operator of ours, or take its derivative for zero."""
    rows = [_dense_operator(matrix, size, x.shape[-1]) for matrix, size in zip(packed, sizes, strict=True)]
    return F.linear(x, torch.cat(rows), bias)


def _is_recorded(x: Tensor) -> bool:
    """Whether a tensor subclass, a mode or a trace has to see the call: what is written to memory it does not see."""
    modes = torch._C._len_torch_dispatch_stack()
    return type(x) is not Tensor or modes > 0 or torch._C._get_tracing_state() is not None


def _needs_gradients(*operands: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in operands)


def is_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing but the numbers is wanted of a product: no trace and no gradient."""
    return not (_is_recorded(x) or _needs_gradients(x, *others))


def _check(x: Tensor, packed: list[Tensor], bias: Tensor | None, sizes: list[int]) -> None:
    dtype = packed[0].dtype
    if x.dtype is not dtype or (bias is not None and bias.dtype is not dtype) or dtype not in TYPES:
        found = x.dtype if bias is None or x.dtype is not dtype else bias.dtype
        raise TypeError(f"cpu_linear: x or bias is {found}; expected {dtype}, the weights' dtype")
    if x.device.type != "cpu":
        raise ValueError(f"cpu_linear: x on {x.device}; expected the CPU")
    if bias is not None and (bias.shape != (sum(sizes),) or not bias.is_contiguous()):
        raise ValueError(f"cpu_linear: bias is {list(bias.shape)}; expected [{sum(sizes)}], contiguous")
    shapes, columns = [library().shape(matrix) for matrix in packed], x.shape[-1]
    if shapes != [(size, columns) for size in sizes]:
        raise ValueError(f"cpu_linear: x has {columns} columns, sizes are {sizes}; expected those of matrices {shapes}")
