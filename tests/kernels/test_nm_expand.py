import os

import pytest
import torch

from llmprune.kernels.nm_linear.fragments import to_fragments
from llmprune.kernels.nm_linear.reference import dense_24_reference

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")

from llmprune.kernels.nm_linear import expand as expand_module
from llmprune.kernels.nm_linear.expand import expand, expand_fragments

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
# Whole tiles, less than one tile, no multiples of 16 rows or 256 columns, several programs with a ragged last one.
SHAPES = [(16, 256), (1, 8), (24, 72), (40, 264), (33, 520), (48, 1000)]
PLACES = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])


def matrix_24(rows, columns, dtype):
    """Random values, meta and the dense matrix they stand for, written group by group; any 16 bits are a value."""
    generator = torch.Generator().manual_seed(rows * 10000 + columns)
    bits = torch.randint(-(2**15), 2**15, (rows, columns // 2), generator=generator).to(torch.int16)
    places = PLACES[torch.randint(0, 6, (rows, columns // 4), generator=generator)]
    dense = torch.zeros(rows, columns, dtype=torch.int16)
    for row in range(rows):
        for kept in range(columns // 2):
            dense[row, kept // 2 * 4 + places[row, kept // 2, kept % 2]] = bits[row, kept]
    nibbles = places[..., 0] | places[..., 1] << 2
    meta = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    return bits.view(dtype).to(DEVICE), meta.to(DEVICE), dense.view(dtype).to(DEVICE)


def poisoned(shape, dtype):
    """A view of memory with a row before and after, all of it NaN."""
    whole = torch.full((shape[0] + 2, shape[1]), torch.nan, dtype=dtype, device=DEVICE)
    return whole, whole[1:-1]


def same_bits(one, other):
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def check_written(write, dense):
    whole, out = poisoned(dense.shape, dense.dtype)
    write(out)
    assert same_bits(out, dense)
    assert whole[[0, -1]].isnan().all(), "wrote beyond the matrix"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_both_layouts_expand_bit_for_bit(rows, columns, dtype):
    values, meta, dense = matrix_24(rows, columns, dtype)
    # Plain torch makes signalling NaNs quiet; the kernels do not.
    torch.testing.assert_close(dense_24_reference(values, meta), dense, rtol=0, atol=0, equal_nan=True)
    check_written(lambda out: expand(values, meta, out), dense)
    a, e = to_fragments(values, meta)
    check_written(lambda out: expand_fragments(a, e, out), dense)


def test_many_programs_with_a_ragged_end():
    values, meta, dense = matrix_24(7, 4104, torch.float16)  # 3591 bytes of meta: 7 programs and a bit
    check_written(lambda out: expand(values, meta, out), dense)


def test_nothing_to_expand_launches_nothing(monkeypatch):
    launched = []
    monkeypatch.setattr(expand_module, "_expand_kernel", {(0,): lambda *_, **__: launched.append(0)})
    values, meta = torch.empty(0, 4, dtype=torch.float16), torch.empty(0, 1, dtype=torch.uint8)
    expand(values, meta, torch.empty(0, 8, dtype=torch.float16))
    assert not launched


def test_groups_with_fewer_than_two_non_zeros():
    values = torch.tensor([[0.0, 0.0, 3.0, 0.0, 0.0, 5.0, 7.0, 8.0]], dtype=torch.float16, device=DEVICE)
    # Places (0, 1), (2, 3) | (0, 1), (1, 2); the lower nibble is the earlier group.
    meta = torch.tensor([[0b1110_0100, 0b1001_0100]], dtype=torch.uint8, device=DEVICE)
    dense = torch.tensor([[0, 0, 0, 0, 0, 0, 3, 0, 0, 5, 0, 0, 0, 7, 8, 0]], dtype=torch.float16, device=DEVICE)
    check_written(lambda out: expand(values, meta, out), dense)
    a, e = to_fragments(values, meta)
    check_written(lambda out: expand_fragments(a, e, out), dense)
