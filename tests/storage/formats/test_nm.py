import pytest
import torch
from folders import same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from weights import DTYPES, bits, hexadecimal, pruned, random_bits, without_negative_zeros

from llmprune.errors import FormatError, PatternError
from llmprune.patterns import NM
from llmprune.storage.formats import NMLayout, fit_layout, layout

patterns = st.integers(1, 40).flatmap(lambda of: st.builds(NM, st.integers(0, of), st.just(of)))
LONG = st.sampled_from([NM(3, 100), NM(64, 128), NM(1, 255), NM(0, 256), NM(200, 256), NM(256, 256)])


def slow_pack(weight: Tensor, keep: int, of: int) -> tuple[list[list[int]], list[list[int]]]:
    """Values (as bits) and meta by the letter of the specification, one weight after another."""
    width = max(1, (of - 1).bit_length())
    values, meta = [], []
    for row in bits(without_negative_zeros(weight)).tolist():
        stored: list[int] = []
        indices: list[int] = []
        for first in range(0, len(row), of):
            group = row[first : first + of]
            chosen = [index for index in range(of) if group[index] != 0]
            chosen += [index for index in range(of) if group[index] == 0][: keep - len(chosen)]
            indices += sorted(chosen)
            stored += [group[index] for index in sorted(chosen)]
        stream = sum(index << place * width for place, index in enumerate(indices))
        values.append(stored)
        meta.append(list(stream.to_bytes(-(-len(indices) * width // 8), "little")))
    return values, meta


@given(
    patterns | LONG,
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 0.4, 1]),
    st.integers(0, 99),
)
def test_packing_follows_the_specification_and_unpacking_inverts_it(
    pattern: NM, rows: int, groups: int, dtype: torch.dtype, further: float, seed: int
) -> None:
    weight = pruned(pattern, (rows, groups * pattern.of), dtype, seed=seed, further=further)
    fitted = fit_layout("nm", weight, pattern)
    packed = fitted.pack(weight)
    values, meta = slow_pack(weight, pattern.keep, pattern.of)
    assert bits(packed["values"]).tolist() == values
    assert packed["meta"].tolist() == meta
    assert same(fitted.unpack(packed), without_negative_zeros(weight))


def test_golden_bytes_of_two_of_four() -> None:
    weight = torch.tensor([[0, 1, -0.0, -2, 0.5, 0, 0, 0], [-0.0, 0, 0, 0, 0, 0, 3, 4]], dtype=torch.bfloat16)
    packed = NMLayout((2, 8), 2, 4).pack(weight)
    # Row 0: indices 1, 3 | 0, 1: 0b0100_1101. Row 1: 0, 1 | 2, 3: 0b1110_0100.
    assert hexadecimal(packed["meta"]) == "4d" + "e4"
    assert hexadecimal(packed["values"]) == "803f00c0003f0000" + "0000000040408040"


def test_golden_bytes_where_an_index_crosses_bytes() -> None:
    weight = torch.tensor([[0, 0, 0, 1, 0, 2, 0, 0, 0, 0, 0, -0.0]], dtype=torch.float16)
    packed = NMLayout((1, 12), 2, 6).pack(weight)
    # Three bits each, from the lowest: 3, 5, 0, 1 = 3 + (5 << 3) + (1 << 9) = 0x22b.
    assert hexadecimal(packed["meta"]) == "2b02"
    assert hexadecimal(packed["values"]) == "003c004000000000"


def test_golden_bytes_of_the_longest_groups() -> None:
    weight = torch.zeros(1, 512)
    weight[0, 255], weight[0, 256] = 1, 2
    packed = NMLayout((1, 512), 1, 256).pack(weight)
    assert hexadecimal(packed["meta"]) == "ff00"
    assert hexadecimal(packed["values"]) == "0000803f" + "00000040"


@pytest.mark.parametrize(
    ("itemsize", "keep", "of", "share"), [(2, 2, 4, 0.5625), (4, 2, 4, 0.53125), (2, 1, 4, 0.28125), (2, 4, 8, 0.59375)]
)
def test_share_of_the_dense_bytes(itemsize: int, keep: int, of: int, share: float) -> None:
    assert NMLayout((64, 128), keep, of).nbytes(itemsize) == share * 64 * 128 * itemsize


def test_a_weight_with_a_crowded_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_SLAB", 32)  # two rows at a time
    weight = pruned(NM(2, 4), (6, 16), torch.bfloat16)
    weight[3, 8:12] = torch.tensor([1, 0, float("nan"), 2])
    with pytest.raises(PatternError, match="row 3, columns from 8") as caught:
        NMLayout((6, 16), 2, 4).pack(weight)
    assert "at most 2 of every 4" in caught.value.expected
    assert caught.value.fix
    with pytest.raises(PatternError, match="row 0, columns from 0"):
        NMLayout((2, 8), 0, 4).pack(random_bits((2, 8), torch.float16))


def test_subnormal_weights_are_not_zero_even_where_the_processor_flushes_them() -> None:
    weight = torch.zeros(1, 4)
    bits(weight)[0, 2] = 1
    fitted = NMLayout((1, 4), 1, 4)
    flushes = torch.set_flush_denormal(True)
    try:
        packed = fitted.pack(weight)
    finally:
        torch.set_flush_denormal(False)
    assert flushes
    assert packed["meta"].tolist() == [[2]]
    assert same(fitted.unpack(packed), weight)


def example(keep: int, of: int) -> tuple[NMLayout, dict[str, Tensor]]:
    fitted = NMLayout((2, 2 * of), keep, of)
    return fitted, fitted.pack(pruned(NM(keep, of), (2, 2 * of), torch.bfloat16))


def test_an_index_out_of_range_is_refused() -> None:
    fitted, packed = example(1, 6)
    packed["meta"][1, 0] = 0b110  # the first index of the last row
    with pytest.raises(FormatError, match="index of 6") as caught:
        fitted.unpack(packed)
    assert caught.value.expected == "0 to 5"


@pytest.mark.parametrize(
    ("byte", "group"), [(0b0001, "3, 0"), (0b1010, "2, 2"), (0b0000, "0, 0"), (0b0111 << 4 | 0b1101, "3, 1")]
)
def test_indices_that_do_not_ascend_are_refused(byte: int, group: str) -> None:
    fitted, packed = example(2, 4)
    packed["meta"][1, 0] = byte | (0b0100 << 4 if byte < 16 else 0)
    with pytest.raises(FormatError, match="do not ascend"):
        fitted.unpack(packed)


def test_indices_may_descend_from_one_group_to_the_next() -> None:
    fitted = NMLayout((1, 8), 2, 4)
    packed = {"values": torch.tensor([[1.0, 2, 3, 4]]), "meta": torch.tensor([[0b0100_1110]], dtype=torch.uint8)}
    assert fitted.unpack(packed).tolist() == [[0, 0, 1, 2, 3, 4, 0, 0]]


@pytest.mark.parametrize("bit", [6, 7])
def test_bits_behind_the_last_index_are_refused(bit: int) -> None:
    fitted, packed = example(1, 8)
    packed["meta"][0, 0] |= 1 << bit
    with pytest.raises(FormatError, match="after the last index"):
        fitted.unpack(packed)


def test_zeros_and_their_signs_are_read_as_they_are() -> None:
    fitted = NMLayout((1, 4), 2, 4)
    packed = {"values": torch.tensor([[-0.0, 0.0]]), "meta": torch.tensor([[0b1110]], dtype=torch.uint8)}
    assert same(fitted.unpack(packed), torch.tensor([[0.0, 0, -0.0, 0]]))
