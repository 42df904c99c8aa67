from itertools import pairwise

import pytest
import torch
from folders import same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from weights import DTYPES, hexadecimal, pruned, random_bits, without_negative_zeros

from llmprune.errors import FormatError, PatternError
from llmprune.patterns import Block
from llmprune.storage.formats import BlockLayout, fit_layout


def weight_of(blocks: list[list[int]], size: int = 16, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A weight with random bits in the blocks marked 1."""
    mask = torch.tensor(blocks).bool().repeat_interleave(size, 0).repeat_interleave(size, 1)
    weight = random_bits(tuple(mask.shape), dtype)
    weight[~mask] = 0
    return weight


def fit(weight: Tensor, size: int = 16) -> BlockLayout:
    layout = fit_layout("block", weight, Block(0.5, (size, size)))
    assert isinstance(layout, BlockLayout)
    return layout


def stored(layout: BlockLayout, packed: dict[str, Tensor]) -> list[list[int]]:
    """The block columns of every block row."""
    crow, col = packed["crow"].tolist(), packed["col"].tolist()
    return [col[first:last] for first, last in pairwise(crow)]


@given(
    st.sampled_from([16, 32]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([0, 0.3, 0.5, 0.75, 1]),
    st.sampled_from(["matrix", "row"]),
    st.sampled_from(DTYPES[:3]),
    st.integers(0, 9),
)
def test_unpacking_gives_every_bit_back(
    size: int, rows: int, columns: int, sparsity: float, over: str, dtype: torch.dtype, seed: int
) -> None:
    pattern = Block(sparsity, (size, size), over)  # type: ignore[arg-type]
    weight = pruned(pattern, (rows * size, columns * size), dtype, seed=seed, further=0.2)
    layout = fit(weight, size)
    packed = layout.pack(weight)
    assert layout.balanced or over == "matrix"
    assert same(layout.unpack(packed), without_negative_zeros(weight))
    for row, found in enumerate(stored(layout, packed)):
        kept = [column for column in range(columns) if _block(weight, row, column, size).count_nonzero()]
        assert found == sorted(found)
        assert set(kept) <= set(found)
        assert layout.balanced or kept == found
    for place, (row, column) in enumerate(
        (row, column) for row, found in enumerate(stored(layout, packed)) for column in found
    ):
        assert same(packed["values"][place], without_negative_zeros(_block(weight, row, column, size)))


def _block(weight: Tensor, row: int, column: int, size: int) -> Tensor:
    return weight[row * size : (row + 1) * size, column * size : (column + 1) * size].contiguous()


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
@pytest.mark.parametrize("blocks", [[[0, 1, 1], [0, 0, 0]], [[1, 0, 1], [0, 1, 1]]])
def test_the_tensors_are_those_of_torch_bsr(blocks: list[list[int]]) -> None:
    weight = weight_of(blocks, dtype=torch.float32).nan_to_num()
    packed = fit(weight).pack(weight)
    bsr = weight.to_sparse_bsr((16, 16))
    assert torch.equal(packed["crow"], bsr.crow_indices().int())
    assert torch.equal(packed["col"], bsr.col_indices().int())
    assert same(packed["values"], bsr.values())


def test_golden_bytes() -> None:
    weight = torch.zeros(32, 48, dtype=torch.float16)
    weight[0, 17], weight[15, 47], weight[16, 0] = 1, -2, 0.5
    weight[0, 0], weight[0, 16] = -0.0, -0.0
    layout = fit(weight)
    packed = layout.pack(weight)
    assert layout == BlockLayout((32, 48), 16, 3, balanced=False)
    assert hexadecimal(packed["crow"]) == "00000000" + "02000000" + "03000000"
    assert hexadecimal(packed["col"]) == "01000000" + "02000000" + "00000000"
    zeros = "0000" * 254
    assert hexadecimal(packed["values"]) == "0000003c" + zeros + zeros + "000000c0" + "0038" + "0000" + zeros


def test_balanced_rows_are_filled_at_the_lowest_unused_columns() -> None:
    weight = weight_of([[0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    layout = BlockLayout((48, 64), 16, 6, balanced=True)
    packed = layout.pack(weight)
    assert layout.per_row == 2
    assert packed["crow"].tolist() == [0, 2, 4, 6]
    assert stored(layout, packed) == [[2, 3], [0, 1], [0, 1]]
    assert not packed["values"][3:].count_nonzero()
    assert same(layout.unpack(packed), weight)


def test_rows_are_balanced_only_where_that_costs_little() -> None:
    equal = [[1, 0, 1, 0], [0, 1, 1, 0]]
    assert fit(weight_of(equal)) == BlockLayout((32, 64), 16, 4, balanced=True)
    assert fit(weight_of([[1, 0], [1, 1]])) == BlockLayout((32, 32), 16, 3, balanced=False)
    assert fit(weight_of([[0, 0], [0, 0]])) == BlockLayout((32, 32), 16, 0, balanced=True)
    # One block in 50 is 2 %, one in 49 is more.
    fifty = weight_of([[1] * 17, [1] * 17, [0] + [1] * 16])
    assert fit(fifty) == BlockLayout((48, 272), 16, 51, balanced=True)
    forty_nine = weight_of([[1] * 25, [0] + [1] * 24])
    assert fit(forty_nine) == BlockLayout((32, 400), 16, 49, balanced=False)
    assert fit(weight_of(equal)).per_row == 2
    assert fit(weight_of([[1, 0], [1, 1]])).per_row is None


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_every_size_of_blocks(size: int) -> None:
    weight = weight_of([[1, 0], [0, 1]], size)
    layout = fit(weight, size)
    assert (layout.grid, layout.blocks) == ((2, 2), 2)
    assert same(layout.unpack(layout.pack(weight)), weight)


def test_a_weight_with_other_blocks_is_refused() -> None:
    weight = weight_of([[1, 0, 1], [1, 1, 0]])
    for count in (3, 5):
        with pytest.raises(PatternError, match="4 non-zero blocks") as caught:
            BlockLayout((32, 48), 16, count, balanced=False).pack(weight)
        assert caught.value.expected == str(count)
    with pytest.raises(PatternError, match="too many blocks in a block row"):
        BlockLayout((32, 48), 16, 2, balanced=True).pack(weight)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("crow", [1, 2, 3, 5], "'crow' is not a running count"),
        ("crow", [0, 3, 2, 5], "'crow' is not a running count"),
        ("crow", [0, -1, 3, 5], "'crow' is not a running count"),
        ("crow", [0, 2, 3, 4], "'crow' is not a running count"),
        ("crow", [0, 2, 6, 5], "'crow' is not a running count"),
        ("col", [0, 2, 1, 0, 3], "out of range"),
        ("col", [0, 2, 1, -1, 2], "out of range"),
        ("col", [0, 2, 1, 2, 0], "does not ascend"),
        ("col", [0, 2, 1, 2, 2], "does not ascend"),
    ],
)
def test_damaged_places_are_refused(tensor: str, value: list[int], message: str) -> None:
    weight = weight_of([[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    layout = fit(weight)
    packed = layout.pack(weight)
    assert (packed["crow"].tolist(), packed["col"].tolist()) == ([0, 2, 3, 5], [0, 2, 1, 0, 2])
    with pytest.raises(FormatError, match=message) as caught:
        layout.unpack({**packed, tensor: torch.tensor(value, dtype=torch.int32)})
    assert caught.value.expected


def test_uneven_rows_of_a_balanced_matrix_are_refused() -> None:
    weight = weight_of([[1, 0, 1], [0, 1, 1]])
    layout = fit(weight)
    packed = layout.pack(weight)
    assert layout.balanced
    packed["crow"][1] = 1
    with pytest.raises(FormatError, match="unequal length"):
        layout.unpack({**packed, "col": torch.tensor([0, 0, 1, 2], dtype=torch.int32)})


def test_columns_may_descend_from_one_row_to_the_next() -> None:
    weight = weight_of([[0, 1], [1, 0]])
    assert same(fit(weight).unpack(fit(weight).pack(weight)), weight)
