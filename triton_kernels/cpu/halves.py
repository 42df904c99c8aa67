"""Products of dense 16-bit weights and float32 activations, for processors that multiply only float32.

A copy of the weights in float32 would take twice the bytes: in memory, and for each token, which is bound by reading
them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .finding import library
from .operator import is_plain, scratch_rows

HALVES = (torch.bfloat16, torch.float16)

# Up to here the kernel, which reads the weights once for two tokens, is the faster one (eval/bench/LOG.md).
MOST_TOKENS = 16

# Bytes of the float32 rows that are made and multiplied at a time: they stay in the cache.
_PIECE = 2 << 20


def halves_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x @ W.T + bias with float32 sums; every result of up to `MOST_TOKENS` tokens is added up in one order.

    Args:
        x: [..., in], float32 on the CPU; others are multiplied by torch.
        weight: [out, in], bfloat16 or float16, contiguous, a constant.
        bias: [out], of x's dtype, or None.

    Returns:
        [..., out], of x's dtype.
    """
    fits = x.dtype is torch.float32 and x.device.type == "cpu" and x.shape[-1] == weight.shape[1]
    if torch.compiler.is_compiling() or not fits or not is_plain(x, bias):
        return F.linear(x, weight.to(x.dtype), bias)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(len(tokens), len(weight))
    if len(tokens) <= MOST_TOKENS:
        library().multiply_rows(weight, tokens, bias, y)
    else:
        _multiply_pieces(tokens, weight, bias, y)
    return y.view(*x.shape[:-1], y.shape[1])


def _multiply_pieces(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    columns = weight.shape[1]
    step = max(16, _PIECE // max(1, columns * x.itemsize) // 16 * 16)
    room = scratch_rows(min(step, len(weight)), columns, x.dtype)
    for start in range(0, len(weight), step):
        place = slice(start, start + step)
        rows = room[: len(weight[place])].copy_(weight[place])
        y[:, place] = F.linear(x, rows, None if bias is None else bias[place])
