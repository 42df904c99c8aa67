import torch
from folders import same
from hypothesis import given
from hypothesis import strategies as st
from weights import DTYPES, hexadecimal, pruned

from llmprune.patterns import NM, Unstructured
from llmprune.storage.formats import DenseLayout, fit_layout


@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from(DTYPES), st.integers(0, 99))
def test_nothing_changes_not_even_negative_zeros(rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    weight = pruned(Unstructured(0.5, "matrix"), (rows, columns), dtype, seed=seed)
    layout = fit_layout("dense", weight, NM(2, 4))
    packed = layout.pack(weight)
    assert same(packed["weight"], weight)
    assert same(layout.unpack(packed), weight)


def test_golden_bytes() -> None:
    weight = torch.tensor([[1, -0.0], [0, -2]], dtype=torch.bfloat16)
    packed = DenseLayout((2, 2)).pack(weight)
    assert list(packed) == ["weight"]
    assert hexadecimal(packed["weight"]) == "803f0080" + "000000c0"
