from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from references import group_width, rounded, slow_mask, violations

from llmprune.errors import NumericsError, PatternError
from llmprune.patterns import NM, Block, Pattern, Unstructured, keep_highest, layer_shares, parse

# Thousandths are written as they are meant; arbitrary floats as well, because allocation makes them.
fractions = st.integers(0, 1000).map(lambda n: n / 1000) | st.floats(0, 1)
unstructured = st.builds(Unstructured, fractions, st.sampled_from([None, "row", "matrix", "layer"]))
groups = st.integers(1, 20).flatmap(lambda of: st.builds(NM, st.integers(0, of), st.just(of)))
sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))
blocks = st.builds(Block, fractions, sizes, st.sampled_from(["matrix", "row"]))
patterns = unstructured | groups | blocks


def fitting(pattern: Pattern, rows: int, columns: int) -> tuple[int, int]:
    """A shape of so many groups or blocks of the pattern."""
    height = pattern.size[0] if isinstance(pattern, Block) else 1
    return rows * height, columns * group_width(pattern)


def tied_scores(shape: tuple[int, int], seed: int = 0, values: int = 4) -> torch.Tensor:
    """Small integers, so that nearly every score has equals and sums of them are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-values, values, shape, generator=generator).float()


@given(patterns)
def test_printing_and_reading_are_inverse(pattern: Pattern) -> None:
    assert parse(str(pattern)) == pattern
    assert str(parse(str(pattern))) == str(pattern)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", Unstructured(0.5)),
        (0.5, Unstructured(0.5)),
        (1, Unstructured(1.0)),
        (" 50% ", Unstructured(0.5)),
        ("1e-3", Unstructured(0.001)),
        ("dense", Unstructured(0.0)),
        ("0.5/row", Unstructured(0.5, "row")),
        ("60%/layer", Unstructured(0.6, "layer")),
        ("2:4", NM(keep=2, of=4)),
        ("1:4", NM(keep=1, of=4)),
        ("0.5@64x32", Block(0.5, (64, 32))),
        ("0.5@64x32/matrix", Block(0.5, (64, 32), "matrix")),
        ("25%@8x1/row", Block(0.25, (8, 1), "row")),
    ],
)
def test_reading(text: str | float, expected: Pattern) -> None:
    assert parse(text) == expected


def test_numpy_numbers_print_as_numbers() -> None:
    assert str(Unstructured(np.float64(0.5), "row")) == "0.5/row"
    assert str(Block(np.float64(0.5), (8, 4))) == "0.5@8x4"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "half",
            ".",
            "0.5.1",
            "1e",
            "nan",
            "inf",
            "0,5",
            "50%%",
            "True",
            "0.5/",
            "/row",
            "0.5/column",
            "0.5 /row",
        ),
        *("2:", ":4", "2:4:8", "-2:4", "2.0:4", "2:4/row", "0.5@64", "0.5@64x", "0.5@-8x8", "0.5@8x8/layer"),
    ],
)
def test_unreadable_text_is_refused_with_the_syntax(text: str) -> None:
    with pytest.raises(PatternError, match="cannot be read") as caught:
        parse(text)
    assert repr(text) in caught.value.what
    assert "0.5/row" in caught.value.expected


@pytest.mark.parametrize("text", ["1.5", "50", "-0.1", "101%", "1e999", "5:4", "0:0", "-0.5@8x8", "2@8x8", "0.5@0x8"])
def test_numbers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(PatternError):
        parse(text)


def test_not_a_number_is_no_sparsity() -> None:
    with pytest.raises(PatternError, match="sparsity nan"):
        Unstructured(float("nan"))
    with pytest.raises(PatternError, match="sparsity nan"):
        Block(float("nan"), (2, 2))


@given(patterns, st.integers(1, 6), st.integers(1, 6))
def test_the_number_of_zeros_is_the_nearest_to_the_sparsity(pattern: Pattern, rows: int, columns: int) -> None:
    shape = fitting(pattern, rows, columns)
    zeros = pattern.zeros(shape)
    if isinstance(pattern, NM):
        assert zeros == shape[0] * shape[1] // pattern.of * (pattern.of - pattern.keep)
        return
    assert isinstance(pattern, Unstructured | Block)
    unit = pattern.size[0] * pattern.size[1] if isinstance(pattern, Block) else 1
    counted = [columns] * rows if pattern.over == "row" else [rows * columns]
    nearest = len(counted) * rounded(pattern.sparsity, counted[0])
    # A float product may fall on either side of an exact half.
    halves = (Fraction(str(float(pattern.sparsity))) * counted[0]) % 1 == Fraction(1, 2)
    assert zeros == nearest * unit or (halves and zeros == (nearest - len(counted)) * unit)


@given(patterns, st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_masks_have_the_exact_count_and_are_legal_even_where_scores_tie(
    pattern: Pattern, rows: int, columns: int, seed: int
) -> None:
    scores = tied_scores(fitting(pattern, rows, columns), seed)
    before = scores.clone()
    mask = pattern.mask(scores)
    assert mask.shape == scores.shape
    assert int((~mask).sum()) == pattern.zeros(tuple(scores.shape))
    assert violations(mask, pattern) == []
    assert torch.equal(scores, before)


@given(patterns, st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_masks_of_slices_add_up_to_the_whole(pattern: Pattern, rows: int, parts: list[int]) -> None:
    shape = fitting(pattern, rows, sum(parts))
    scores, start, zeros = tied_scores(shape), 0, 0
    for part in parts:
        stop = start + part * pattern.column_multiple
        mask = pattern.mask(scores[:, start:stop], start=start)
        if isinstance(pattern, NM) or pattern.sparsity in (0, 1):
            assert torch.equal(mask, pattern.mask(scores)[:, start:stop])
        zeros, start = zeros + int((~mask).sum()), stop
    assert zeros == pattern.zeros(shape)


def test_sparsity() -> None:
    sparsities = [parse(text).sparsity for text in ("0.3", "0.3/row", "2:4", "1:4", "0:2", "0.25@2x2")]
    assert sparsities == [0.3, 0.3, 0.5, 0.75, 1.0, 0.25]


def test_columns_that_are_decided_together() -> None:
    assert [parse(text).column_multiple for text in ("0.3", "3:6", "0.5@64x32")] == [1, 6, 32]


def test_the_method_fills_in_the_scope_only_where_the_pattern_leaves_it_open() -> None:
    assert Unstructured(0.5).compared("row") == Unstructured(0.5, "row")
    assert Unstructured(0.5, "layer").compared("row") == Unstructured(0.5, "layer")
    assert NM(2, 4).compared("row") == NM(2, 4)
    assert Block(0.5, (2, 2)).compared("row") == Block(0.5, (2, 2), "matrix")


@given(patterns, st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.integers(1, 50))
def test_masks_equal_the_sorting_reference(pattern: Pattern, rows: int, columns: int, seed: int, values: int) -> None:
    scores = tied_scores(fitting(pattern, rows, columns), seed, values)
    count = pattern.zeros(tuple(scores.shape))
    expected = slow_mask(scores.numpy(), pattern)
    # Where a half is rounded the other way, the reference has another count and nothing to say.
    if count == int((~expected).sum()):
        assert pattern.mask(scores).tolist() == expected.tolist()


@given(st.integers(1, 5), st.integers(1, 40), st.data())
def test_keep_highest_equals_the_sorting_reference(rows: int, columns: int, data: st.DataObject) -> None:
    values = st.sampled_from([float("-inf"), -1.5, -0.0, 0.0, 1e-45, 2.0, 3e38, float("inf")])
    rows_of_values = st.lists(values, min_size=columns, max_size=columns)
    scores = torch.tensor(data.draw(st.lists(rows_of_values, min_size=rows, max_size=rows)))
    count = data.draw(st.integers(0, columns))
    expected = [
        [index not in sorted(range(columns), key=lambda i: (row[i], i))[:count] for index in range(columns)]
        for row in scores.tolist()
    ]
    assert keep_highest(scores, count).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ties_in_many_groups_take_no_loop_over_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group-wise path, which is for one group, is never entered; some groups have no ties, one nothing else."""
    scores = tied_scores((40, 120), values=30).to(dtype)
    scores[3], scores[5], scores[7, 50:] = torch.arange(120), 1.0, -3.0
    monkeypatch.setattr("llmprune.patterns._keep_last", None)
    for count in (1, 37, 60, 119):
        expected = slow_mask(scores.float().numpy(), Unstructured(count / 120, "row"))
        assert keep_highest(scores, count).tolist() == expected.tolist()


TIES = [
    ("0.5/row", [[0, 0, 1, 1], [0, 0, 1, 1]]),
    ("0.5/matrix", [[0, 0, 0, 0], [1, 1, 1, 1]]),
    ("0.5", [[0, 0, 0, 0], [1, 1, 1, 1]]),
    ("0.375/layer", [[0, 0, 0, 1], [1, 1, 1, 1]]),
    ("1:2", [[0, 1, 0, 1], [0, 1, 0, 1]]),
    ("3:4", [[0, 1, 1, 1], [0, 1, 1, 1]]),
    ("0.5@1x2", [[0, 0, 0, 0], [1, 1, 1, 1]]),
    ("0.5@1x2/row", [[0, 0, 1, 1], [0, 0, 1, 1]]),
    ("0.5@2x1", [[0, 0, 1, 1], [0, 0, 1, 1]]),
]


@pytest.mark.parametrize(("text", "expected"), TIES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf")])
def test_of_equal_scores_the_lower_index_goes_first(text: str, expected: list[list[int]], value: float) -> None:
    mask = parse(text).mask(torch.full((2, 4), value))
    assert mask.int().tolist() == expected


@pytest.mark.parametrize("of", [16, 17, 32])
def test_short_and_long_groups_break_ties_alike(of: int) -> None:
    scores = torch.ones(3, 2 * of)
    expected = torch.arange(2 * of).expand(3, -1) % of >= of - 5
    assert torch.equal(NM(5, of).mask(scores), expected)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int64]
)
@pytest.mark.parametrize("text", ["0.3", "0.3/row", "2:4", "8:20", "0.5@2x2"])
def test_every_dtype_gives_the_same_mask(dtype: torch.dtype, text: str) -> None:
    scores = tied_scores((4, 40)).abs()
    assert torch.equal(parse(text).mask(scores.to(dtype)), parse(text).mask(scores.double()))


@pytest.mark.parametrize("text", ["0.3", "0.3/row", "2:4", "0.5@2x2", "0.5@2x2/row"])
def test_strides_do_not_matter(text: str) -> None:
    scores = tied_scores((8, 12))
    expected = parse(text).mask(scores)
    assert torch.equal(parse(text).mask(scores.T.contiguous().T), expected)
    assert torch.equal(parse(text).mask(scores.repeat_interleave(2, 1)[:, ::2]), expected)


def test_a_block_is_judged_by_the_sum_of_its_scores() -> None:
    scores = torch.tensor([[9.0, 0, 4, 4], [0, 0, 4, 4]])
    assert Block(0.5, (2, 2)).mask(scores).int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_a_matrix_without_weights_has_an_empty_mask() -> None:
    for text, shape in (("0.5", (0, 4)), ("0.5/row", (4, 0)), ("2:4", (0, 4)), ("0.5@2x2", (0, 4))):
        assert parse(text).mask(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("text", ["0.5", "0.5/row", "0", "1", "2:4", "4:4", "0:4", "8:20", "0.5@2x2", "1@2x2"])
def test_nan_scores_are_refused(text: str) -> None:
    scores = torch.rand(4, 40)
    scores[1, 5] = scores[2, 7] = float("nan")
    with pytest.raises(NumericsError, match="2 of"):
        parse(text).mask(scores)


@pytest.mark.parametrize(
    ("text", "shape"), [("2:4", (4, 6)), ("3:5", (5, 3)), ("0.5@2x4", (3, 8)), ("0.5@2x4", (4, 6)), ("0@64x64", (1, 1))]
)
def test_a_shape_that_does_not_divide_is_refused(text: str, shape: tuple[int, int]) -> None:
    pattern = parse(text)
    for refuse in (pattern.check, pattern.zeros, lambda shape: pattern.mask(torch.rand(shape))):
        with pytest.raises(PatternError, match=f"{shape[0]} x {shape[1]}") as caught:
            refuse(shape)
        assert caught.value.fix


@given(unstructured, st.integers(0, 9), st.integers(0, 9))
def test_unstructured_fits_every_shape(pattern: Unstructured, rows: int, columns: int) -> None:
    pattern.check((rows, columns))


def test_shape_annotations_are_executed() -> None:
    with pytest.raises(TypeCheckError):
        keep_highest(torch.rand(4), 2)
    with pytest.raises(TypeCheckError):
        NM(2, 4).mask(torch.rand(1, 4, 4))


@given(fractions, st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5))
def test_layer_shares_add_up_and_equal_one_comparison(sparsity: float, shapes: list[tuple[int, int]]) -> None:
    scores = {f"matrix{i}": tied_scores(shape, seed=i) for i, shape in enumerate(shapes)}
    shares = layer_shares(scores, sparsity)
    assert list(shares) == list(scores)
    flat = torch.cat([values.view(-1) for values in scores.values()])
    together = Unstructured(sparsity, "matrix").mask(flat[None])[0].split([s.numel() for s in scores.values()])
    for (name, values), expected in zip(scores.items(), together, strict=True):
        assert shares[name].over == "matrix"
        assert shares[name].zeros(tuple(values.shape)) == int((~expected).sum())
        assert torch.equal(shares[name].mask(values).view(-1), expected)


def test_layer_shares_survive_printing_at_the_size_of_a_real_matrix() -> None:
    """A share is a fraction; 58 million weights must still come out exact, from a report as well."""
    for zeros in (1, 12_345_679, 29_360_129, 58_720_255):
        share = Unstructured(1 - (58_720_256 - zeros) / 58_720_256, "matrix")
        assert parse(str(share)).zeros((14336, 4096)) == zeros
