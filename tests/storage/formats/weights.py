"""Weights that are hard to store: every bit pattern of their dtype, and zeros of both signs."""

import torch
from torch import Tensor

from llmprune.patterns import Pattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(weight: Tensor) -> Tensor:
    """The weight's bits as signed integers; the lowest of them is -0.0."""
    return weight.view(_INTEGERS[weight.dtype.itemsize])


def random_bits(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A weight of uniformly random bits: NaN with payloads, infinities and subnormal numbers among them."""
    generator = torch.Generator().manual_seed(seed)
    count = shape[0] * shape[1] * dtype.itemsize
    weight = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)
    bits(weight)[weight == 0] = 1  # so that zeros are only where they are meant to be
    return weight


def pruned(
    pattern: Pattern, shape: tuple[int, int], dtype: torch.dtype, *, seed: int = 0, further: float = 0.0
) -> Tensor:
    """Random bits with a pattern's zeros, a fraction of further ones, and -0.0 for half of both."""
    generator = torch.Generator().manual_seed(seed)
    keep = pattern.mask(torch.rand(shape, generator=generator)) & (torch.rand(shape, generator=generator) >= further)
    weight, negative = random_bits(shape, dtype, seed), torch.rand(shape, generator=generator) < 0.5
    words = bits(weight)
    words[~keep] = 0
    words[~keep & negative] = torch.iinfo(words.dtype).min
    return weight


def without_negative_zeros(weight: Tensor) -> Tensor:
    """The same bits, but 0.0 for -0.0."""
    words = bits(weight).clone()
    words[words == torch.iinfo(words.dtype).min] = 0
    return words.view(weight.dtype)


def hexadecimal(tensor: Tensor) -> str:
    """The bytes of a tensor as a little-endian machine stores them."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes().hex()
