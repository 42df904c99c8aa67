"""8-bit layouts: their bytes, what they refuse, and that a quantised weight has one form only."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weights import hexadecimal

from llmprune.errors import FormatError, PatternError
from llmprune.patterns import NM, Unstructured
from llmprune.storage.formats import Int8BitmaskLayout, Int8NMLayout, fit_layout, quantise, quantised_group

TYPES = (torch.bfloat16, torch.float16, torch.float32)

# Two groups of four columns with the peaks 127 and 2, and a row without weights.
WEIGHT = torch.tensor([[127.0, 0, -3, 0, 0, 2, -2, 0], [0] * 8])


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (
            Int8BitmaskLayout((2, 8), 4, 4),
            {"values": "7ffd7f81", "mask": "6500", "peaks": "fe42004000000000"},
        ),
        (
            Int8NMLayout((2, 8), 2, 4, 4),
            {"values": "7ffd7f8100000000", "meta": "9844", "peaks": "fe42004000000000"},
        ),
    ],
    ids=["bitmask", "nm"],
)
def test_the_bytes_are_as_specified(layout, expected):
    packed = layout.pack(WEIGHT.bfloat16())
    assert {suffix: hexadecimal(tensor) for suffix, tensor in packed.items()} == expected
    assert torch.equal(layout.unpack(packed), WEIGHT.bfloat16())


def test_half_of_the_weights_take_0_32_of_the_bytes():
    weight = torch.ones(128, 1024).bfloat16()
    weight[:, ::2] = 0
    for name, pattern in (("int8-bitmask", Unstructured(0.5)), ("int8-nm", NM(2, 4))):
        layout = fit_layout(name, weight, pattern)
        assert layout.group == 128
        assert layout.nbytes(2) / weight.nbytes == 0.3203125


@given(st.sampled_from(TYPES), st.integers(1, 40), st.integers(0, 99), st.floats(-20, 20))
def test_a_quantised_weight_is_found_from_its_values(dtype, group, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 40, generator=generator) * (torch.rand(3, 40, generator=generator) < 0.5)
    if dtype == torch.float16:
        scale /= 3
    weight = (weight * math.exp(scale)).to(dtype)
    quantised = quantise(weight, group)
    layout = Int8BitmaskLayout.fit(quantised, Unstructured(0.5), group)
    packed = layout.pack(quantised)
    assert torch.equal(layout.unpack(packed), quantised)
    assert torch.equal(quantise(quantised, group), quantised)
    assert bool((quantised[weight == 0] == 0).all())
    peaks = packed["peaks"].double().repeat_interleave(group, 1)[:, :40]
    rounding = torch.finfo(dtype)
    allowed = peaks / 254 + weight.double().abs() * 2 * rounding.eps + rounding.smallest_normal * rounding.eps
    assert bool(((quantised.double() - weight.double()).abs() <= allowed).all())


@pytest.mark.parametrize("group", [32, 64, 128, 256, 500])
def test_the_usual_groups_are_found(group):
    weight = torch.randn(20, 500, generator=torch.Generator().manual_seed(group)).bfloat16()
    assert quantised_group(quantise(weight, group)) == group
    assert quantised_group(weight) is None


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_that_are_not_quantised_are_refused(dtype):
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    by_row = quantise(weight, 256)
    for group, other in ((128, weight), (128, by_row), (256, quantise(weight, 128))):
        layout = Int8BitmaskLayout.fit(other, Unstructured(0.0), group)
        with pytest.raises(PatternError, match="8 bits") as caught:
            layout.pack(other)
        assert "quantise" in caught.value.fix
    assert Int8BitmaskLayout.fit(by_row, Unstructured(0.0), 256).pack(by_row)["peaks"].shape == (4, 1)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_only_finite_weights_are_quantised(wrong):
    weight = torch.ones(2, 8)
    weight[1, 3] = wrong
    for call in (quantise, Int8NMLayout((2, 8), 4, 4, 8).pack):
        with pytest.raises(FormatError, match="not finite"):
            call(weight)


@pytest.mark.parametrize(
    ("suffix", "number", "message"),
    [
        ("values", -128, "-128"),
        ("peaks", -1.0, "negative"),
        ("peaks", torch.nan, "finite"),
        ("peaks", torch.inf, "finite"),
    ],
)
def test_numbers_out_of_range_are_refused(suffix, number, message):
    layout = Int8BitmaskLayout((2, 8), 4, 4)
    packed = layout.pack(WEIGHT.bfloat16())
    packed[suffix].view(-1)[1] = number
    with pytest.raises(FormatError, match=message):
        layout.unpack(packed)


def test_matrices_without_rows_or_columns():
    for shape in ((0, 8), (8, 0)):
        weight = torch.zeros(shape).bfloat16()
        layout = fit_layout("int8-bitmask", quantise(weight), Unstructured(0.5))
        assert layout.unpack(layout.pack(weight)).shape == shape
