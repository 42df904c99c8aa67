"""Which form a packed matrix gets, and what each form holds."""

from collections.abc import Iterator

import pytest
import torch
from folders import same
from torch import Tensor
from torch.nn import functional as F

from llmprune.patterns import NM
from llmprune.serving import forms
from llmprune.serving.forms import CUSPARSELT_TOKENS, Cusparselt, Served, choose_form
from llmprune.storage.formats import BitmaskLayout, BlockLayout, Layout, NMLayout, fit_layout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TWO_OF_FOUR = NMLayout((128, 256), 2, 4)
BLOCKS = BlockLayout((128, 256), 16, 8, balanced=True)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one with sparse tensor cores."""
    monkeypatch.setattr(forms.nm_linear, "supported", lambda device: None)
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)


def name(layout: Layout, device: torch.device, served: Served = "auto", dtype: torch.dtype = torch.bfloat16) -> str:
    return choose_form(layout, device, dtype, served).form.name


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("layout", "served", "dtype", "form"),
    [
        (TWO_OF_FOUR, "auto", torch.bfloat16, "fragments"),
        (TWO_OF_FOUR, "packed", torch.float16, "fragments"),
        (TWO_OF_FOUR, "dense", torch.bfloat16, "dense"),
        (TWO_OF_FOUR, "cusparselt", torch.bfloat16, "cusparselt"),
        (TWO_OF_FOUR, "auto", torch.float32, "dense"),
        (TWO_OF_FOUR, "packed", torch.float32, "unpacked"),
        (NMLayout((128, 96), 2, 4), "cusparselt", torch.bfloat16, "fragments"),
        (NMLayout((128, 256), 1, 4), "auto", torch.bfloat16, "dense"),
        (BLOCKS, "auto", torch.bfloat16, "blocks"),
        (BLOCKS, "dense", torch.bfloat16, "dense"),
        (BitmaskLayout((128, 256), 9), "auto", torch.bfloat16, "dense"),
        (BitmaskLayout((128, 256), 9), "packed", torch.bfloat16, "unpacked"),
    ],
)
def test_a_gpu_gets_the_fastest_form(layout: Layout, served: Served, dtype: torch.dtype, form: str) -> None:
    assert name(layout, CUDA, served, dtype) == form


@pytest.mark.usefixtures("a_gpu")
def test_a_gpu_without_sparse_tensor_cores_gets_the_portable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms.nm_linear, "supported", lambda device: "compute capability 7.5")
    choice = choose_form(TWO_OF_FOUR, CUDA, torch.float16)
    assert choice.form.name == "portable"
    assert dict(choice.refused)["fragments"] == "compute capability 7.5"


def test_without_triton_weights_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: False)
    assert "Triton" in dict(choose_form(TWO_OF_FOUR, CUDA, torch.bfloat16).refused)["portable"]


def test_a_cpu_multiplies_blocks_densely_unless_hardly_one_is_left() -> None:
    sparse, dense, finer, smaller = (
        BlockLayout((size, size), block, round(kept * (size // block) ** 2), balanced=False)
        for size, block, kept in ((1024, 64, 0.1), (1024, 64, 0.5), (1024, 16, 0.1), (512, 64, 0.1))
    )
    assert name(sparse, CPU) == "blocks"
    assert {name(layout, CPU) for layout in (dense, finer, smaller)} == {"dense"}
    assert name(dense, CPU) == "dense"
    assert name(dense, CPU, "packed") == "blocks"
    assert name(sparse, CPU, "dense") == "dense"


def test_every_form_but_the_chosen_one_has_a_reason() -> None:
    choice = choose_form(TWO_OF_FOUR, CPU, torch.bfloat16, "dense")
    assert [form for form, _ in choice.refused] == [
        "fragments",
        "portable",
        "blocks",
        "cpu-bitmask",
        "cpu-nm",
        "cpu-int8",
    ]
    assert all(reason for _, reason in choice.refused)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """cuSPARSELt's four functions in plain torch: what is called, in order."""
    called = []
    shape = TWO_OF_FOUR.shape

    def compress(dense: Tensor) -> Tensor:
        called.append("compress")
        return dense.flatten()

    def search(compressed: Tensor, x: Tensor, *, transpose_result: bool) -> int:
        called.append("search")
        return 7

    def multiply(compressed: Tensor, x: Tensor, *, bias: Tensor | None, transpose_result: bool, alg_id: int) -> Tensor:
        called.append(f"multiply by {alg_id}")
        assert x.shape[1] % 8 == 0
        assert transpose_result
        return F.linear(x.t(), compressed.view(shape), bias)

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    yield called
    forms._ALGORITHMS.clear()


def test_cusparselt_serves_prefill_and_fragments_serve_decode(library: list[str]) -> None:
    weight = torch.randn(TWO_OF_FOUR.shape).bfloat16()
    weight *= NM(2, 4).mask(weight.abs())
    layout = fit_layout("nm", weight, NM(2, 4))
    stored = layout.pack(weight)
    form, bias = Cusparselt(), torch.randn(128).bfloat16()
    held = form.build(layout, stored)
    restored = form.restore(layout, held)
    assert all(same(restored[key], stored[key]) for key in stored)
    for tokens in (1, CUSPARSELT_TOKENS - 1):
        x = torch.randn(tokens, 256).bfloat16()
        assert same(form.multiply(layout, held, x, bias), F.linear(x, weight, bias))
    assert library == ["compress"]
    x = torch.randn(2, CUSPARSELT_TOKENS // 2, 256).bfloat16()
    assert same(form.multiply(layout, held, x, bias), F.linear(x, weight, bias))
    x = x.flatten(0, 1)[: CUSPARSELT_TOKENS - 3].repeat(2, 1)
    assert same(form.multiply(layout, held, x, bias), F.linear(x, weight, bias))
    assert library == ["compress", "search", "multiply by 7", "multiply by 7"]
