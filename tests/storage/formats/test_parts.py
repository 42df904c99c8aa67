"""Cuts of packed matrices for ranks: together they are the whole matrix, and what cannot be cut is refused."""

from itertools import pairwise

import pytest
import torch
from folders import same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weights import pruned, without_negative_zeros

from llmprune.errors import FormatError, PatternError
from llmprune.patterns import NM, Block, Pattern, Unstructured
from llmprune.storage.formats import LAYOUTS, fit_layout, layout, quantise
from llmprune.storage.formats.parts import Packed, can_stack, cut_columns, cut_rows, share, stack

# layout: patterns, and what rows and columns are cut at multiples of
KINDS: dict[str, tuple[tuple[Pattern, ...], int, int]] = {
    "nm": ((NM(2, 4), NM(1, 4), NM(3, 5)), 1, 20),
    "block": ((Block(0.5, (16, 16)), Block(0.7, (32, 32))), 32, 32),
    "bitmask": ((Unstructured(0.6), Unstructured(1.0)), 1, 1),
    "int8-nm": ((NM(2, 4), NM(3, 5)), 1, 20),
    "int8-bitmask": ((Unstructured(0.6),), 1, 1),
    "dense": ((Unstructured(0.3),), 1, 1),
}


def packed(
    name: str, pattern: Pattern, shape: tuple[int, int], seed: int = 0, group: int = 24
) -> tuple[Packed, Tensor]:
    weight = pruned(pattern, shape, torch.bfloat16, seed=seed)
    if not name.startswith("int8"):
        fitted = fit_layout(name, weight, pattern)
    else:
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        weight = quantise(numbers.masked_fill(weight == 0, 0).to(torch.bfloat16), group)
        fitted = LAYOUTS[name].fit(weight, pattern, group)  # type: ignore[call-arg]
    return Packed(fitted, fitted.pack(weight)), weight


def dense(matrix: Packed) -> Tensor:
    return matrix.require().layout.unpack(matrix.tensors)


def expected(name: str, weight: Tensor) -> Tensor:
    return weight if name == "dense" else without_negative_zeros(weight)


cases = st.sampled_from([(name, pattern) for name, (patterns, _, _) in KINDS.items() for pattern in patterns])
parts = st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any)


def test_every_layout_is_tested() -> None:
    assert set(KINDS) == set(LAYOUTS)


@settings(max_examples=30)
@given(cases, parts, st.integers(0, 99))
def test_cuts_of_rows_are_the_matrix(case: tuple[str, Pattern], sizes: list[int], seed: int) -> None:
    name, pattern = case
    unit = KINDS[name][1]
    matrix, weight = packed(name, pattern, (unit * sum(sizes), 160), seed)
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    cuts = [cut_rows(matrix, unit * first, unit * last) for first, last in pairwise(ends)]
    assert same(torch.cat([dense(cut) for cut in cuts]), expected(name, weight))
    assert all(can_stack(matrix.layout, cut.layout) for cut in cuts)
    whole = stack(cuts)
    assert whole.layout.shape == matrix.layout.shape
    assert all(same(whole.tensors[suffix], tensor) for suffix, tensor in matrix.tensors.items())


@settings(max_examples=30)
@given(cases, parts, st.integers(0, 99))
def test_cuts_of_columns_are_the_matrix(case: tuple[str, Pattern], sizes: list[int], seed: int) -> None:
    name, pattern = case
    unit = KINDS[name][2]
    matrix, weight = packed(name, pattern, (32, unit * sum(sizes)), seed)
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    cuts = [cut_columns(matrix, unit * first, unit * last) for first, last in pairwise(ends)]
    assert same(torch.cat([dense(cut) for cut in cuts], 1), expected(name, weight))


@pytest.mark.parametrize("name", KINDS)
def test_columns_are_cut_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, weight = packed(name, KINDS[name][0][0], (64, 160))
    whole = cut_columns(matrix, 32, 96) if name == "block" else cut_columns(matrix, 20, 100)
    monkeypatch.setattr(layout, "_SLAB", 700)
    again = cut_columns(matrix, 32, 96) if name == "block" else cut_columns(matrix, 20, 100)
    assert again.layout == whole.layout
    assert all(same(again.tensors[suffix], tensor) for suffix, tensor in whole.tensors.items())
    assert same(dense(whole), expected(name, weight[:, 32:96] if name == "block" else weight[:, 20:100]))


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_matrix_is_not_copied(name: str) -> None:
    matrix, _ = packed(name, KINDS[name][0][0], (64, 160))
    assert cut_columns(matrix, 0, 160) is matrix
    assert stack([matrix]) is matrix
    rows = cut_rows(matrix, 0, 64)
    assert rows.layout == matrix.layout
    assert all(
        rows.tensors[suffix].data_ptr() == tensor.data_ptr()
        for suffix, tensor in matrix.tensors.items()
        if suffix != "crow"
    )


def test_groups_of_eight_bits_become_smaller_where_a_cut_divides_them() -> None:
    matrix, weight = packed("int8-bitmask", Unstructured(0.5), (8, 96), group=32)
    halves = [cut_columns(matrix, 0, 48), cut_columns(matrix, 48, 96)]
    assert [half.layout.group for half in halves] == [16, 16]  # type: ignore[attr-defined]
    assert cut_columns(matrix, 32, 96).layout.group == 32  # type: ignore[attr-defined]
    assert same(torch.cat([dense(half) for half in halves], 1), without_negative_zeros(weight))


def test_a_cut_of_a_balanced_matrix_says_whether_it_still_is() -> None:
    weight = torch.zeros(32, 64)
    weight[:16, 16:48], weight[16:, :32] = 1.0, 1.0
    fitted = fit_layout("block", weight, Block(0.5, (16, 16)))
    matrix = Packed(fitted, fitted.pack(weight))
    assert fitted.per_row == 2  # type: ignore[attr-defined]
    left = cut_columns(matrix, 0, 32)
    assert left.layout.per_row is None  # type: ignore[attr-defined]
    assert same(dense(left), weight[:, :32])
    assert cut_rows(matrix, 0, 16).layout.per_row == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "rows", "first", "message"),
    [
        ("nm", False, 6, r"a nm matrix of 64 x 160 .* cut at 6 and 80, inside its groups of 4"),
        ("int8-nm", False, 6, r"a nm matrix of 64 x 160 .* inside its groups of 4"),
        ("block", False, 24, r"inside its blocks of 16(.|\n)*fix: use fewer ranks, or unpack"),
        ("block", True, 8, r"a block matrix of 64 x 160 .* cut at 8 and 64, inside its blocks of 16"),
    ],
)
def test_cuts_inside_a_group_are_refused(name: str, rows: bool, first: int, message: str) -> None:
    matrix, _ = packed(name, KINDS[name][0][0], (64, 160))
    with pytest.raises(PatternError, match=message):
        cut_rows(matrix, first, 64) if rows else cut_columns(matrix, first, 80)


@pytest.mark.parametrize("cut", [cut_rows, cut_columns])
def test_cuts_outside_are_refused(cut: object) -> None:
    matrix, _ = packed("nm", NM(2, 4), (8, 8))
    with pytest.raises(FormatError, match="4 to 12 of 8"):
        cut(matrix, 4, 12)  # type: ignore[operator]


def test_damaged_tensors_are_refused() -> None:
    bitmask, _ = packed("bitmask", Unstructured(0.5), (8, 24))
    torch.bitwise_xor(bitmask.tensors["mask"], 1, out=bitmask.tensors["mask"])
    block, _ = packed("block", Block(0.5, (16, 16)), (64, 64))
    block.tensors["crow"][1] = 99
    for matrix, message in ((bitmask, "set bits"), (block, "'crow' is not a running count")):
        for cut in (cut_rows, cut_columns):
            with pytest.raises(FormatError, match=message):
                cut(matrix, 0, 16 if matrix is block else 4)
    shorter = Packed(bitmask.layout, {**bitmask.tensors, "values": bitmask.tensors["values"][1:]})
    with pytest.raises(FormatError, match="'values' has shape"):
        shorter.require()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))
def test_ranks_share_a_dimension(parts: int, copies: int, size: int) -> None:
    ranks = parts * copies
    held = [share(parts * size, size, rank, ranks) for rank in range(ranks)]
    assert held == [(rank // copies * size, rank // copies * size + size) for rank in range(ranks)]


def test_uneven_shares_are_refused() -> None:
    for whole, part, ranks in ((10, 3, 3), (12, 4, 2), (4, 0, 1)):
        with pytest.raises(PatternError, match=f"parts of {part} of a dimension of {whole} on {ranks} ranks"):
            share(whole, part, 0, ranks)


def test_matrices_of_different_kinds_are_not_stacked() -> None:
    two, three = packed("nm", NM(2, 4), (8, 20))[0].layout, packed("nm", NM(3, 5), (8, 20))[0].layout
    assert not can_stack(two, three)
    assert not can_stack(two, packed("nm", NM(2, 4), (8, 40))[0].layout)
    assert not can_stack(two, packed("bitmask", Unstructured(0.5), (8, 20))[0].layout)
    narrow, wide = (packed("int8-nm", NM(2, 4), (8, 40), group=group)[0].layout for group in (8, 20))
    assert not can_stack(narrow, wide)
    bits = [packed("bitmask", Unstructured(part), (8, 20))[0].layout for part in (0.5, 0.8)]
    assert can_stack(*bits)
