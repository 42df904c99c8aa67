"""What all layouts have in common; a new one is covered by its row in `CASES`."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from folders import same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from weights import DTYPES, pruned, without_negative_zeros

from llmprune.errors import FormatError, PatternError
from llmprune.patterns import NM, Block, Pattern, Unstructured, parse
from llmprune.storage.formats import LAYOUTS, Layout, fit_layout, layout, layout_from_dict, quantise

# layout: (pattern, a shape that it fits)
CASES: dict[str, tuple[Pattern, tuple[int, int]]] = {
    "nm": (NM(2, 4), (5, 12)),
    "block": (Block(0.5, (16, 16)), (48, 64)),
    "bitmask": (Unstructured(0.6), (7, 13)),
    "int8-nm": (NM(2, 4), (5, 12)),
    "int8-bitmask": (Unstructured(0.6), (7, 13)),
    "dense": (Unstructured(0.3), (3, 5)),
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def example(name: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[Layout, Tensor]:
    pattern, shape = CASES[name]
    weight = pruned(pattern, shape, dtype, **options)
    if name.startswith("int8"):
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        weight = quantise(numbers.masked_fill(weight == 0, 0).to(dtype))
    return fit_layout(name, weight, pattern), weight


def test_every_layout_is_tested() -> None:
    assert set(CASES) == set(LAYOUTS)
    assert all(LAYOUTS[name].name == name for name in LAYOUTS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_unpacking_gives_every_bit_back(name: str, dtype: torch.dtype, device: str) -> None:
    if name.startswith("int8") and dtype not in (torch.bfloat16, torch.float16, torch.float32):
        with pytest.raises(FormatError, match="8-bit weights of dtype"):
            example(name, dtype)
        return
    fitted, weight = example(name, dtype, further=0.2)
    weight = weight.to(device)
    before = weight.clone()
    packed = fitted.pack(weight)
    found = fitted.unpack(packed)
    assert same(weight, before)
    assert found.device == weight.device
    assert found.is_contiguous()
    assert same(found, weight if name == "dense" else without_negative_zeros(weight))
    assert all(same(packed[suffix], again) for suffix, again in fitted.pack(found).items())


@pytest.mark.parametrize("name", CASES)
def test_the_layout_alone_tells_the_tensors(name: str) -> None:
    fitted, weight = example(name)
    packed = fitted.pack(weight)
    found = {suffix: (tuple(tensor.shape), tensor.dtype) for suffix, tensor in packed.items()}
    told = {suffix: (spec.shape, spec.dtype or weight.dtype) for suffix, spec in fitted.tensors().items()}
    assert found == told
    assert fitted.nbytes(2) == sum(tensor.nbytes for tensor in packed.values())


@pytest.mark.parametrize("name", [name for name in CASES if name != "dense"])
def test_packed_tensors_do_not_keep_the_weight_alive(name: str) -> None:
    fitted, weight = example(name)
    memory = {tensor.untyped_storage().data_ptr() for tensor in fitted.pack(weight).values()}
    assert weight.untyped_storage().data_ptr() not in memory


@pytest.mark.parametrize("name", CASES)
def test_strides_and_gradients_do_not_matter(name: str) -> None:
    fitted, weight = example(name)
    for variant in (weight.T.contiguous().T, nn.Parameter(weight), weight.repeat_interleave(2, 1)[:, ::2]):
        packed = fitted.pack(variant)
        assert all(same(tensor, packed[suffix]) for suffix, tensor in fitted.pack(weight).items())
        assert not any(tensor.requires_grad for tensor in packed.values())
    packed = {suffix: torch.stack([tensor, tensor], -1)[..., 0] for suffix, tensor in fitted.pack(weight).items()}
    assert same(fitted.unpack(packed), fitted.unpack(fitted.pack(weight)))


@pytest.mark.parametrize("name", CASES)
def test_large_matrices_are_done_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, weight = example(name)
    whole = fitted.pack(weight)
    monkeypatch.setattr(layout, "_SLAB", 30)
    pattern, _ = CASES[name]
    assert fit_layout(name, weight, pattern) == fitted
    assert all(same(tensor, whole[suffix]) for suffix, tensor in fitted.pack(weight).items())
    assert same(fitted.unpack(whole), weight if name == "dense" else without_negative_zeros(weight))


def test_pieces_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_SLAB", 30)
    for rows, columns, expected in ((7, 10, [3, 3, 1]), (2, 31, [1, 1]), (0, 5, []), (4, 0, [4])):
        pieces = list(layout.slabs(rows, columns))
        assert [row for piece in pieces for row in range(rows)[piece]] == list(range(rows))
        assert [piece.stop - piece.start for piece in pieces] == expected


@given(st.integers(1, 5), st.integers(0, 40), st.integers(0, 99))
def test_bits_and_bytes_are_inverse(rows: int, length: int, seed: int) -> None:
    found = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    bytes_ = layout.to_bytes(found)
    assert bytes_.tolist() == [
        [sum(int(bit) << place for place, bit in enumerate(row[first : first + 8])) for first in range(0, length, 8)]
        for row in found.tolist()
    ]
    again = layout.from_bytes(bytes_, length)
    assert again is not None
    assert torch.equal(again, found)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("nm", {"layout": "nm", "shape": [5, 12], "keep": 2, "of": 4}),
        ("block", {"layout": "block", "shape": [48, 64], "block": 16, "blocks": 6, "balanced": False}),
        ("bitmask", {"layout": "bitmask", "shape": [7, 13], "nonzeros": 36}),
        ("int8-nm", {"layout": "int8-nm", "shape": [5, 12], "keep": 2, "of": 4, "group": 12}),
        ("int8-bitmask", {"layout": "int8-bitmask", "shape": [7, 13], "nonzeros": 36, "group": 13}),
        ("dense", {"layout": "dense", "shape": [3, 5]}),
    ],
)
def test_rows_of_the_configuration(name: str, row: dict[str, Any]) -> None:
    fitted, _ = example(name)
    assert fitted.to_dict() == row
    assert layout_from_dict(json.loads(json.dumps(row))) == fitted


NM_ROW = {"layout": "nm", "shape": [5, 12], "keep": 2, "of": 4}
BLOCK_ROW = {"layout": "block", "shape": [48, 64], "block": 16, "blocks": 6, "balanced": True}


@pytest.mark.parametrize(
    "row",
    [
        {},
        {**NM_ROW, "layout": "csr"},
        {**NM_ROW, "layout": None},
        {**NM_ROW, "layout": ["nm"]},
        {**NM_ROW, "more": 1},
        {key: NM_ROW[key] for key in NM_ROW if key != "of"},
        {**NM_ROW, "keep": 2.0},
        {**NM_ROW, "keep": True},
        {**NM_ROW, "keep": 5},
        {**NM_ROW, "keep": -1},
        {**NM_ROW, "of": 5},
        {**NM_ROW, "of": 0},
        {**NM_ROW, "shape": 5},
        {**NM_ROW, "shape": [5]},
        {**NM_ROW, "shape": [5, 12, 1]},
        {**NM_ROW, "shape": [5, 12.0]},
        {**NM_ROW, "shape": ["5", "12"]},
        {**NM_ROW, "shape": [-5, 12]},
        {**NM_ROW, "shape": [4, 512], "of": 512},
        {**BLOCK_ROW, "balanced": 1},
        {**BLOCK_ROW, "blocks": 7},
        {**BLOCK_ROW, "blocks": 15},
        {**BLOCK_ROW, "blocks": -3},
        {**BLOCK_ROW, "block": 24},
        {**BLOCK_ROW, "shape": [40, 64]},
        {"layout": "bitmask", "shape": [7, 13], "nonzeros": 92},
        {"layout": "bitmask", "shape": [7, 13], "nonzeros": -1},
        {"layout": "int8-nm", "shape": [5, 12], "keep": 2, "of": 4, "group": 13},
        {"layout": "int8-bitmask", "shape": [7, 13], "nonzeros": 36, "group": 0},
        {"layout": "int8-bitmask", "shape": [7, 13], "nonzeros": 92, "group": 13},
        {"layout": "dense", "shape": [0, -3]},
    ],
    ids=str,
)
def test_a_damaged_row_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as caught:
        layout_from_dict(row)
    assert caught.value.expected


def test_unknown_layouts_are_refused() -> None:
    with pytest.raises(PatternError, match="'csr'") as caught:
        fit_layout("csr", torch.zeros(4, 4), NM(2, 4))
    assert "bitmask" in caught.value.expected


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("nm", "0.5"),
        ("nm", "0.5@16x16"),
        ("block", "2:4"),
        ("block", "0.5"),
        ("block", "0.5@16x32"),
        ("block", "0@8x8"),
    ],
)
def test_a_layout_refuses_other_patterns(name: str, pattern: str) -> None:
    with pytest.raises(PatternError, match=name) as caught:
        fit_layout(name, torch.zeros(64, 64), parse(pattern))
    assert caught.value.expected


@pytest.mark.parametrize(("name", "pattern"), [("nm", "2:4"), ("block", "0.5@32x32")])
def test_a_pattern_that_does_not_divide_is_refused(name: str, pattern: str) -> None:
    with pytest.raises(PatternError, match="32 x 50"):
        fit_layout(name, torch.zeros(32, 50), parse(pattern))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_only_floating_weights_are_stored(name: str, dtype: torch.dtype) -> None:
    fitted, weight = example(name)
    with pytest.raises(FormatError, match=str(dtype)):
        fitted.pack(torch.zeros(weight.shape, dtype=dtype))


@pytest.mark.parametrize("name", CASES)
def test_a_weight_of_another_shape_is_refused(name: str) -> None:
    fitted, weight = example(name)
    for other in (weight.T, weight[:1], weight[:, :1]):
        with pytest.raises(FormatError, match="shape"):
            fitted.pack(other.contiguous())


def damages(packed: dict[str, Tensor], suffix: str) -> dict[str, dict[str, Tensor]]:
    """What can be wrong with one tensor of any layout."""
    tensor, rest = packed[suffix], {key: packed[key] for key in packed if key != suffix}
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "longer": lambda t: torch.cat([t, t[:1]]),
        "shorter": lambda t: t[:-1],
        "flat or deep": lambda t: t.flatten() if t.dim() > 1 else t.unsqueeze(0),
        "wider integers": lambda t: torch.zeros_like(t, dtype=torch.int64),
        "a bool": lambda t: torch.zeros_like(t, dtype=torch.bool),
        "complex": lambda t: torch.zeros_like(t, dtype=torch.complex64),
    }
    return {
        "missing": rest,
        "another name": {**rest, "weights": tensor},
        "extra": {**packed, suffix + "_scale": tensor},
        **{name: {**rest, suffix: change(tensor)} for name, change in changes.items()},
    }


@pytest.mark.parametrize(
    ("name", "suffix"), [(name, suffix) for name in CASES for suffix in example(name)[0].tensors()]
)
def test_tensors_of_another_kind_are_refused(name: str, suffix: str) -> None:
    fitted, weight = example(name)
    for what, damaged in damages(fitted.pack(weight), suffix).items():
        with pytest.raises(FormatError, match=f"a {name} matrix of") as caught:
            fitted.unpack(damaged)
        assert all((caught.value.expected, caught.value.fix)), what
