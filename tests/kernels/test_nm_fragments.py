import pytest
import torch

from llmprune.kernels.nm_linear.fragments import activation_fragments_reference, from_fragments, to_fragments
from llmprune.kernels.nm_linear.reference import dense_24_reference, linear_24_reference

SHAPES = [(16, 256), (24, 264), (1, 8), (40, 1032), (33, 1800)]


def matrix(rows, inputs, dtype, seed=0):
    """Random values and meta; a quarter of the groups have fewer than two non-zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, inputs // 4, 2, generator=generator) / inputs**0.5
    values[torch.rand(values.shape, generator=generator) < 0.15] = 0
    pairs = torch.tensor([low | high << 2 for high in range(4) for low in range(high)])
    nibbles = pairs[torch.randint(6, (rows, inputs // 8, 2), generator=generator)]
    meta = nibbles[..., 0] | nibbles[..., 1] << 4
    return values.view(rows, inputs // 2).to(dtype), meta.to(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_fragments_come_back_bit_for_bit(rows, inputs, dtype):
    values, meta = matrix(rows, inputs, dtype)
    values.view(torch.int16)[0, :3] = torch.tensor([0x7FC1, 0x7F81, 0x0001])  # NaN payloads and a subnormal
    a, e = to_fragments(values, meta)
    tiles, steps = -(-rows // 16), -(-inputs // 256)
    assert a.shape == (tiles, steps, 8, 32, 4)
    assert e.shape == (tiles, steps, 32, 4)
    assert a.is_contiguous()
    assert e.is_contiguous()
    back, back_meta = from_fragments(a, e, rows, inputs, dtype)
    assert torch.equal(back.view(torch.int16), values.view(torch.int16))
    assert torch.equal(back_meta, meta)


def test_fragments_take_0_5625_of_the_dense_bytes():
    a, e = to_fragments(*matrix(32, 512, torch.bfloat16))
    assert 4 * (a.numel() + e.numel()) == 0.5625 * 2 * 32 * 512


def test_places_of_weights_follow_the_figure():
    """Row 9 (g = 1, second half), kept column 13 of product 2 of step 1: t = 2, second value, second column half."""
    values, meta = torch.zeros(16, 256, dtype=torch.float16), torch.full((16, 64), 0x44, dtype=torch.uint8)
    values.view(torch.int16)[9, 128 + 2 * 16 + 13] = 0x1234
    # Groups 22 and 23 are the seventh and eighth of product 2, in its second 16 columns: selector 0, lane t = 1.
    meta[9, 32 + 8 + 3] = 0x8 | 0xE << 4
    a, e = to_fragments(values, meta)
    assert a[0, 1, 2, 4 * 1 + 2, 3] == 0x1234 << 16
    assert a.count_nonzero() == 1
    assert e[0, 1, 4 * 1 + 1, 1] & 0xFFFFFFFF == 0xE8444444
    assert (e & 0xFFFFFFFF != 0x44444444).sum() == 1


def test_padding_is_zero_with_two_places():
    a, e = to_fragments(*matrix(3, 8, torch.float16))
    assert a[:, :, 1:].count_nonzero() == 0
    assert bool((e[:, :, :, 1:] == 0x44444444).all())


def test_places_of_activations_follow_the_figure():
    x = torch.arange(9 * 264, dtype=torch.int16).view(9, 264)
    fragments = activation_fragments_reference(x.view(torch.float16), 2)
    assert fragments.shape == (2, 2, 8, 32, 4)
    # Token 3, inputs 2 * 32 + 8 * 1 + 2 * 2 and the next: product 2, lane 4 * 3 + 2, word 1.
    assert fragments[0, 0, 2, 14, 1] == x[3, 76].item() | x[3, 77].item() << 16
    assert fragments[1, :, :, 4:].count_nonzero() == 0
    assert fragments[:, 1, 1:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values, meta: (values.float(), meta), "bfloat16 or float16"),
        (lambda values, meta: (values, meta.to(torch.int8)), "uint8"),
        (lambda values, meta: (values[:, :-4], meta), r"\[out, in / 8\]"),
    ],
)
def test_what_is_no_2_4_matrix_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        to_fragments(*change(*matrix(16, 64, torch.float16)))


def test_fragments_of_another_shape_are_refused():
    a, e = to_fragments(*matrix(16, 64, torch.float16))
    with pytest.raises(ValueError, match="17 x 64"):
        from_fragments(a, e, 17, 64, torch.float16)
    with pytest.raises(ValueError, match="multiple of 8"):
        from_fragments(a, e, 16, 60, torch.float16)
    with pytest.raises(ValueError, match="contiguous"):
        from_fragments(a, e.transpose(2, 3).contiguous().transpose(2, 3), 16, 64, torch.float16)


def test_reference_is_the_product_with_the_dense_matrix():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 0.0, 0.0]])
    meta = torch.tensor([[0x4 | 0xE << 4], [0x8 | 0x4 << 4]], dtype=torch.uint8)
    dense = torch.tensor([[1.0, 2, 0, 0, 0, 0, 3, 4], [5, 0, 6, 0, 0, 0, 0, 0]])
    assert torch.equal(dense_24_reference(values, meta), dense)
    x, bias = torch.randn(2, 3, 8), torch.randn(2)
    torch.testing.assert_close(linear_24_reference(x, values, meta, bias), x @ dense.T + bias)


def test_reference_sums_in_float32():
    values, meta = torch.full((1, 2048), 1.0, dtype=torch.float16), torch.full((1, 512), 0x44, dtype=torch.uint8)
    x = torch.full((1, 4096), 1.0, dtype=torch.float16)
    x[:, 0] = 4096.0
    # In float16 arithmetic 4096 + 1 stays 4096.
    assert linear_24_reference(x, values, meta).item() == 4096 + 2047 + 1
