"""Products of dense 16-bit weights and float32 activations, for processors that multiply only float32.

A copy of the weights in float32 would take twice the bytes: in memory, and for each token, which is bound by reading
them.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .finding import library
from .operator import PIECE, is_plain, is_transformed, scratch_rows

HALVES = (torch.bfloat16, torch.float16)

# Up to here the kernel, which reads the weights once for two tokens, is the faster one (eval/bench/LOG.md).
MOST_TOKENS = 64


def halves_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x @ W.T + bias with float32 sums; every result of up to `MOST_TOKENS` tokens is added up in one order.

    Args:
        x: [..., in], float32 on the CPU.
        weight: [out, in], bfloat16 or float16.
        bias: [out], float32, or None.

    Returns:
        [..., out], float32.

    Raises:
        ValueError: a shape, dtype or device is not as above.
    """
    if not torch.compiler.is_compiling():
        if is_transformed():
            return F.linear(x, weight.to(x.dtype), bias)
        if is_plain(x, weight, bias):
            return _linear(x, weight, bias)
    y: Tensor = _operator(x, weight, bias)
    return y


@torch.library.custom_op("llmprune::cpu_halves", mutates_args=())
def _operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(x, weight, bias)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    rows = gradient.reshape(-1, gradient.shape[-1])
    of_x = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = _times(rows, weight).view(*gradient.shape[:-1], weight.shape[1])
    if ctx.needs_input_grad[1]:
        of_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        of_bias = rows.sum(0)
    return of_x, of_weight, of_bias


_operator.register_autograd(_gradients, setup_context=_remember)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    tokens, weight = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous(), weight.contiguous()
    y = x.new_empty(len(tokens), len(weight))
    if len(tokens) <= MOST_TOKENS:
        library().multiply_rows(weight, tokens, bias, y)
    else:
        for place, rows in _pieces(weight):
            torch.mm(tokens, rows.T, out=y[:, place])
        if bias is not None:
            y += bias
    return y.view(*x.shape[:-1], y.shape[1])


@torch.library.custom_op("llmprune::cpu_halves_gradient", mutates_args=())
def _times(gradient: Tensor, weight: Tensor) -> Tensor:
    """Gradients of y [tokens, out] times the weight: those of x, [tokens, in]."""
    total = gradient.new_zeros(len(gradient), weight.shape[1])
    for place, rows in _pieces(weight):
        total.addmm_(gradient[:, place], rows)
    return total


@_times.register_fake
def _(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient.new_empty(len(gradient), weight.shape[1])


def _pieces(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a weight in float32, some at a time, in the same memory."""
    columns = weight.shape[1]
    step = max(16, PIECE // max(1, columns * 4) // 16 * 16)
    room = scratch_rows(min(step, len(weight)), columns, torch.float32, "wide")
    for start in range(0, len(weight), step):
        place = slice(start, min(start + step, len(weight)))
        yield place, room[: place.stop - start].copy_(weight[place])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    floats = [x] if bias is None else [x, bias]
    if weight.dtype not in HALVES or any(one.dtype is not torch.float32 for one in floats):
        found = [str(one.dtype) for one in (*floats, weight)]
        raise ValueError(f"cpu_halves: {found}; expected float32, and weights of 16 bits")
    if any(one.device.type != "cpu" for one in (*floats, weight)):
        raise ValueError(f"cpu_halves: x on {x.device}, weights on {weight.device}; expected the CPU")
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"cpu_halves: x is {list(x.shape)}; expected columns of weights {list(weight.shape)}")
    if bias is not None and (bias.shape != (len(weight),) or not bias.is_contiguous()):
        raise ValueError(f"cpu_halves: bias is {list(bias.shape)}; expected [{len(weight)}], contiguous")
