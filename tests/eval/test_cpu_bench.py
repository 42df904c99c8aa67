"""The bench of the CPU kernels: what it writes, and that it times nothing wrong."""

import json
from pathlib import Path

import pytest
import torch
from cpu_matrices import needs_kernels

from llmprune.eval.bench import cpu as bench
from llmprune.kernels import cpu

pytestmark = needs_kernels

SMALL = ("--shapes", "64x96", "--tokens", "1,3", "--seconds", "0")


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "rotated_bytes", lambda device: 1 << 16)
    monkeypatch.setattr(bench, "_STREAMED", 1 << 16)


def test_every_product_is_compared_with_all_dense_ones(tmp_path: Path) -> None:
    bench.main([*SMALL, "--json", str(tmp_path / "cpu.json")])
    result = json.loads((tmp_path / "cpu.json").read_text("utf-8"))
    assert result["threads"] == torch.get_num_threads()
    assert result["kernels"] == cpu.LEVELS[cpu.library().level]
    assert [(row["shape"], row["tokens"], row["wrong"]) for row in result["rows"]] == [
        ([64, 96], 1, []),
        ([64, 96], 3, []),
    ]
    for row in result["rows"]:
        found = row["products"]
        assert row["stream_bytes_per_second"] > 0
        assert list(found) == [*bench.dense_products(), "0.5", "0.6", "2:4", "int8-0.5", "int8-2:4"]
        best = min(found[name]["median_us"] for name in bench.dense_products())
        for product in found.values():
            assert product["low_us"] <= product["median_us"] <= product["high_us"]
            assert product["over_best_dense"] == pytest.approx(best / product["median_us"], abs=0.002, rel=0.002)
            assert product["share"] > 0
        assert found["0.6"]["bytes"] < found["0.5"]["bytes"] < found["linear"]["bytes"] == 64 * 96 * 2


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.cpu.linear
    monkeypatch.setattr(bench.cpu, "linear", lambda *args: real(*args) * 1.1)
    (row,) = bench.measure((64, 96), [1], ["0.5"], 0.0)
    assert row["wrong"] == ["0.5"]
    assert list(row["products"]) == list(bench.dense_products())


def test_huge_pages_hold_the_same_weights() -> None:
    weight = torch.randn(1024, 2048).bfloat16()
    copied = bench.in_huge_pages(weight)
    assert torch.equal(copied, weight)
    assert copied.data_ptr() % (2 << 20) == 0


def test_without_kernels_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.cpu, "unavailable", lambda: "no compiler")
    with pytest.raises(SystemExit, match="no compiler"):
        bench.main([])
