"""How kernel configurations are searched, and where the best are recorded."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packed_models import save_packed
from torch.nn import functional as F

from llmprune.errors import NumericsError
from llmprune.kernels import configurations
from llmprune.measuring.bench import products, tuning
from llmprune.serving import forms, loader
from llmprune.timing import Effort, Timing

CPU = torch.device("cpu")
FAST = Effort(0.0, rotated_bytes=1)
# Blocks of 16 divide these.
SIZES = {"hidden_size": 64, "intermediate_size": 320}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU serve blocks as small as those of tiny models."""
    monkeypatch.setattr(forms, "CPU_BLOCK_SIZE", 16)
    monkeypatch.setattr(forms, "CPU_BLOCK_WEIGHTS", 0)
    monkeypatch.setattr(forms, "CPU_BLOCK_SPARSITY", 0.85)  # a tenth of few blocks is rounded up


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measured choices of this test alone."""
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
    configurations.forget()
    yield
    configurations.forget()


def load(folder: Path) -> Any:
    return loader.load(folder, device="cpu", dtype="bfloat16", fused=False)


@dataclass(frozen=True, slots=True)
class Configuration:
    warps: int
    splits: int = 1


class FakeKernel:
    """The product of a dense weight; a configuration of 8 warps is wrong, and more splits take less time."""

    op = "fake"
    tokens = (8,)
    values = {"warps": (2, 4, 8), "splits": (1, 2, 4, 8)}  # noqa: RUF012 - as the kernels have it

    def shape(self, tokens: int) -> dict[str, int]:
        return {"tokens": tokens}

    def present(self, tokens: int) -> Configuration:
        return Configuration(4)

    def fits(self, configuration: Configuration, tokens: int) -> bool:
        return configuration.splits <= 4

    def run(self, layer: torch.Tensor, x: torch.Tensor, configuration: Configuration) -> torch.Tensor:
        self.ran = configuration
        if configuration == Configuration(2, 4):
            raise ValueError("not made for this")
        return F.linear(x, layer) * (2 if configuration.warps == 8 else 1)


def test_the_search_keeps_what_is_fastest_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, weight = FakeKernel(), torch.randn(6, 16)

    def fake_time(calls: list[Any], *_: object) -> Timing:
        calls[0]()
        seconds = kernel.ran.warps / kernel.ran.splits
        return Timing(seconds, seconds, seconds, 1)

    monkeypatch.setattr(tuning, "time_calls", fake_time)
    found = tuning._search(kernel, [weight], (weight, None), 8, FAST)  # type: ignore[arg-type]
    assert found.choice == {"warps": 2, "splits": 2}
    assert (found.seconds, found.before_seconds) == (1.0, 4.0)
    assert found.tried == 5
    assert len(found.refused) == 2
    assert "wrong by 1" in found.refused[0]
    assert "not made for this" in found.refused[1]


def test_a_search_without_a_working_candidate_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, weight = FakeKernel(), torch.randn(6, 16)
    monkeypatch.setattr(kernel, "run", lambda layer, x, configuration: x.new_zeros(len(x), 6))
    with pytest.raises(NumericsError, match="none of 5 configurations works here"):
        tuning._search(kernel, [weight], (weight, None), 8, FAST)  # type: ignore[arg-type]
    tuned = tuning.Tuned("op", {}, {}, 1.0, math.inf, 2, ("a",)).to_dict()
    json.dumps(tuned, allow_nan=False)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("wins", "limit"), [((), 65), ((64,), 33), ((64, 32), 17), ((32,), 65)])
def test_the_dispatch_limit_is_where_the_dense_product_begins_to_win(
    monkeypatch: pytest.MonkeyPatch, wins: tuple[int, ...], limit: int
) -> None:
    layer = SimpleNamespace(device=CPU, fusion=None, layout=SimpleNamespace(shape=(16, 32)), held={}, bias=None)
    kernel = tuning.FragmentsKernel(layer)  # type: ignore[arg-type]
    seen: list[int] = []
    monkeypatch.setattr(kernel, "expanded", lambda layer, x, scratch: seen.append(len(x)))

    def fake_time(calls: list[Any], *_: object) -> Timing:
        calls[0]()
        seconds = 0.5 if seen[-1] in wins else 2.0
        return Timing(seconds, seconds, seconds, 1)

    monkeypatch.setattr(tuning, "time_calls", fake_time)
    weight = torch.zeros(16, 32)
    found = tuning._dispatch(kernel, [layer], weight, dict.fromkeys((8, 16, 32, 64), 1.0), FAST)  # type: ignore[list-item]
    assert found.choice == {"limit": limit}
    assert configurations.dispatch_limit("linear_24", CPU, 64, out_features=16, in_features=32) == limit


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("wins", "limit"), [((), 1 << 31), ((2048,), 1025)])
def test_blocks_have_a_dispatch_limit_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wins: tuple[int, ...], limit: int
) -> None:
    model = load(save_packed(tmp_path, "block", "0.9@16x16", **SIZES) / "packed")
    layer = next(p for p in products.packed_products(model) if p.shape == (64, 320)).layers[0]
    kernel = tuning.BlockKernel(layer)
    seen: list[int] = []
    multiply = kernel.expanded
    monkeypatch.setattr(kernel, "expanded", lambda *a: seen.append(len(a[1])) or multiply(*a))

    def fake_time(calls: list[Any], *_: object) -> Timing:
        calls[0]()
        return Timing(*[0.5 if seen[-1] in wins else 2.0] * 3, 1)

    monkeypatch.setattr(tuning, "time_calls", fake_time)
    found = tuning._dispatch(kernel, [layer], layer.unpack(), dict.fromkeys((16, 2048), 1.0), FAST)
    assert found.choice == {"limit": limit}
    assert configurations.measured(found.op, CPU, **found.shape) == {"limit": limit}


@pytest.mark.usefixtures("cache")
def test_choices_are_recorded_where_the_operations_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(forms.Fragments, "refusal", lambda *_: None)
    product = products.packed_products(load(save_packed(tmp_path, **SIZES) / "packed"))[0]
    assert list(tuning.tune_product(product, FAST)) == []
    monkeypatch.setattr(tuning, "_has_configurations", lambda device: True)
    dense = product.layers[0].unpack()
    monkeypatch.setattr(tuning.FragmentsKernel, "run", lambda self, layer, x, _: F.linear(x, dense, layer.bias))
    monkeypatch.setattr(tuning.FragmentsKernel, "expanded", lambda self, layer, x, _: F.linear(x, dense))
    found = list(tuning.tune_product(product, FAST))
    assert [row.op for row in found] == ["linear_24"] * 4 + ["linear_24.dispatch"]
    for row in found:
        assert configurations.measured(row.op, CPU, **row.shape) == row.choice
    assert {row.shape["tokens"] for row in found[:4]} == set(tuning.DECODE_TOKENS)


@pytest.mark.parametrize(("layout", "pattern", "form"), [("nm", "2:4", "portable"), ("block", "0.9@16x16", "blocks")])
def test_candidates_of_the_kernels_are_ones_that_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, pattern: str, form: str
) -> None:
    monkeypatch.setattr(forms.Portable, "refusal", lambda self, layout, *_: forms._not_two_of_four(layout))
    model = load(save_packed(tmp_path, layout, pattern, **SIZES) / "packed")
    product = next(p for p in products.packed_products(model) if p.shape == (64, 320))
    assert product.form == form
    kernel = tuning.KERNELS[form](product.layers[0])
    monkeypatch.setattr(sys.modules["llmprune.kernels.block_linear"], "_shared_bytes", lambda device: 200 << 10)
    for tokens in kernel.tokens:
        assert kernel.fits(kernel.present(tokens), tokens) or form == "portable"
        assert set(kernel.values) <= set(kernel.present(tokens).__slots__)
        assert kernel.shape(tokens)["tokens"] >= min(tokens, 8)
