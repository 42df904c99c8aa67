import pytest
import torch
from folders import same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from weights import DTYPES, bits, hexadecimal, pruned, random_bits, without_negative_zeros

from llmprune.errors import FormatError, PatternError
from llmprune.patterns import Unstructured
from llmprune.storage.formats import BitmaskLayout, fit_layout


@given(
    st.integers(1, 6),
    st.integers(1, 30),
    st.sampled_from([0, 0.01, 0.5, 0.97, 1]),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_unpacking_gives_every_bit_back(
    rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int
) -> None:
    weight = pruned(Unstructured(sparsity, "matrix"), (rows, columns), dtype, seed=seed)
    layout = fit_layout("bitmask", weight, Unstructured(sparsity))
    packed = layout.pack(weight)
    expected = without_negative_zeros(weight)
    assert bits(packed["values"]).tolist() == [word for row in bits(expected).tolist() for word in row if word]
    assert same(layout.unpack(packed), expected)


def test_golden_bytes() -> None:
    weight = torch.zeros(2, 10, dtype=torch.bfloat16)
    weight[0, 1], weight[0, 7], weight[0, 9], weight[1, 0], weight[1, 2] = 1, -2, 0.5, 3, -0.0
    layout = fit_layout("bitmask", weight, Unstructured(0.5))
    packed = layout.pack(weight)
    assert layout == BitmaskLayout((2, 10), 4)
    assert hexadecimal(packed["mask"]) == "8202" + "0100"
    assert hexadecimal(packed["values"]) == "803f" + "00c0" + "003f" + "4040"


def test_zeros_of_any_pattern_are_counted() -> None:
    weight = random_bits((6, 9), torch.float16)
    weight[:, 3:] = 0
    assert fit_layout("bitmask", weight, Unstructured(0.1)) == BitmaskLayout((6, 9), 18)


def example() -> tuple[BitmaskLayout, Tensor, dict[str, Tensor]]:
    weight = pruned(Unstructured(0.5, "matrix"), (4, 11), torch.float32)
    layout = BitmaskLayout((4, 11), 22)
    return layout, weight, layout.pack(weight)


def test_a_weight_with_another_number_of_nonzeros_is_refused() -> None:
    _, weight, _ = example()
    for count in (21, 23):
        with pytest.raises(PatternError, match="22 non-zeros") as caught:
            BitmaskLayout((4, 11), count).pack(weight)
        assert caught.value.expected == str(count)


@pytest.mark.parametrize("row", range(4))
def test_a_flipped_bit_of_the_mask_is_refused(row: int) -> None:
    layout, _, packed = example()
    for bit in range(8):
        mask = packed["mask"].clone()
        mask[row, 0] ^= 1 << bit
        with pytest.raises(FormatError, match="number of set bits") as caught:
            layout.unpack({**packed, "mask": mask})
        assert caught.value.expected == "22 set bits"


@pytest.mark.parametrize("bit", [3, 7])
def test_bits_behind_the_last_column_are_refused(bit: int) -> None:
    layout, _, packed = example()
    packed["mask"][2, 1] |= 1 << bit
    with pytest.raises(FormatError, match="after the last column"):
        layout.unpack(packed)


def test_a_stored_value_may_be_zero() -> None:
    layout = BitmaskLayout((1, 3), 2)
    packed = {"values": torch.tensor([0.0, 2.0]), "mask": torch.tensor([[0b101]], dtype=torch.uint8)}
    assert layout.unpack(packed).tolist() == [[0, 0, 2]]
