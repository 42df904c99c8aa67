"""Blocks coded and decoded: every bit comes back, zeros cost a bit, and damaged parts are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.errors import FormatError
from llmprune.storage.archives.coding import Coding, Kind, decode, encode, zstd

KINDS = [Kind(word, floating, text=False) for word in (1, 2, 4, 8) for floating in (True, False)]


def raw_of(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kind", [*KINDS, Kind()], ids=str)
@given(raw=st.binary(max_size=96), zeros=st.sampled_from([0.0, 0.5, 1.0]), negative=st.booleans())
def test_every_bit_comes_back(kind: Kind, raw: bytes, zeros: float, negative: bool) -> None:
    words = np.frombuffer(raw[: len(raw) // kind.word * kind.word], f"<u{kind.word}").copy()
    zero = 1 << (8 * kind.word - 1) if negative else 0
    words[: int(zeros * len(words))] = zero
    coding, parts = encode(words.tobytes(), kind)
    assert decode(coding, words.nbytes, parts) == words.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_special_values_of_every_dtype_come_back(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, float("nan"), -1.5, 3e-5, 448.0, 0.0, 0.0]).repeat(16).to(dtype)
    raw = raw_of(values)
    coding, parts = encode(raw, Kind(dtype.itemsize, True, text=False))
    assert (coding.mask, coding.signs) == (True, True)
    assert decode(coding, len(raw), parts) == raw


def test_half_of_bfloat16_takes_two_fifths() -> None:
    weight = torch.randn(1 << 18)
    weight[weight.abs() < weight.abs().median()] = 0
    coding, parts = encode(raw_of(weight.bfloat16()), Kind(2, True, text=False))
    assert (coding.mask, coding.signs) == (True, False)
    assert 0.35 < sum(map(len, parts)) / (2 * len(weight)) < 0.38
    # The mask of 2:4 is no random one.
    pairs = torch.randn(1 << 16, 4)
    pairs.scatter_(1, pairs.abs().topk(2, dim=1, largest=False).indices, 0)
    masked = encode(raw_of(pairs.bfloat16()), Kind(2, True, text=False))[1][0]
    assert len(masked) < 0.7 * pairs.numel() / 8


def test_negative_zeros_cost_little_more() -> None:
    weight = torch.randn(1 << 16)
    small = weight.abs() < weight.abs().median()
    plain, signed = (
        sum(map(len, encode(raw_of(torch.where(small, weight * scale, weight).bfloat16()), Kind(2, True, False))[1]))
        for scale in (torch.zeros_like(weight).copysign(weight), torch.zeros_like(weight))
    )
    assert plain < signed < plain + len(weight) / 8


def test_few_zeros_need_no_mask() -> None:
    assert encode(raw_of(torch.randn(1000).bfloat16()), Kind(2, True, False))[0] == Coding(2, True)


MASKED = encode(raw_of(torch.tensor([0.0, -0.0, 1.0, 2.0, 0.0]).bfloat16()), Kind(2, True, text=False))


def frame(content: bytes) -> bytes:
    return bytes(zstd().compress(content))


@pytest.mark.parametrize(
    "parts",
    [
        MASKED[1][:-1],
        [*MASKED[1], MASKED[1][0]],
        [frame(b"\xff"), *MASKED[1][1:]],  # bits after the last word, and more words than there are
        [frame(b"\x1c"), *MASKED[1][1:]],  # three words stored
        [frame(b""), *MASKED[1][1:]],
        [*MASKED[1][:2], frame(b"1"), MASKED[1][3]],
        [*MASKED[1][:2], frame(bytes(1 << 20)), MASKED[1][3]],
        [*MASKED[1][:3], MASKED[1][3] + b"x"],
        [*MASKED[1][:3], MASKED[1][3][:-1]],
        [*MASKED[1][:3], b"not a frame"],
    ],
)
def test_damaged_parts_are_refused(parts: list[bytes]) -> None:
    assert len(MASKED[1]) == 4
    with pytest.raises(FormatError) as caught:
        decode(MASKED[0], 10, parts)
    assert caught.value.fix


@pytest.mark.parametrize(("coding", "nbytes"), [(MASKED[0], 11), (MASKED[0], 6), (Coding(2, True, False, True), 4)])
def test_codings_that_do_not_fit_are_refused(coding: Coding, nbytes: int) -> None:
    with pytest.raises(FormatError):
        decode(coding, nbytes, MASKED[1] if coding.mask else [frame(b"12")] * 3)
