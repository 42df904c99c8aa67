"""The GPU bench, rehearsed: its bookkeeping, its random weights, and every line of it on a CPU."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune.eval.bench import blocks, gpu, gpu_checks, gpu_model, gpu_products, peers
from llmprune.eval.bench.gpu_plan import SHAPES, Plan, rehearsal
from llmprune.serving import cpu_forms, forms
from llmprune.storage.formats import NMLayout

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal stands for a GPU, to which the kernels of a CPU do not belong."""
    monkeypatch.setattr(cpu_forms.cpu, "unavailable", lambda: "a rehearsal")


class Clock:
    """A second passes with each row."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def rows(self, count: int, **values: Any) -> Iterator[dict[str, Any]]:
        for number in range(count):
            self.now += 1.0
            yield {"number": number, **values}


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_every_row_is_written_before_the_next_begins(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gpu.json"
    results = gpu.Results(path, {"device": "d"}, math.inf)
    seen: list[int] = []

    def part() -> Iterator[dict[str, Any]]:
        for number in range(3):
            seen.append(len(content(path)["parts"].get("linear", {"rows": ()})["rows"]))
            yield {"number": number}

    assert results.run("linear", part)
    assert seen == [0, 1, 2]
    assert content(path)["parts"]["linear"]["status"] == "done"


def test_the_time_ends_between_rows(tmp_path: Path) -> None:
    clock = Clock()
    results = gpu.Results(tmp_path / "gpu.json", {}, 4.5, clock)
    assert results.run("linear", lambda: clock.rows(3))
    assert results.run("block", lambda: clock.rows(3))
    assert not results.run("linear", lambda: clock.rows(3)), "a part for which no time is left leaves its rows alone"
    parts = content(tmp_path / "gpu.json")["parts"]
    assert [(parts[name]["status"], len(parts[name]["rows"])) for name in ("linear", "block")] == [
        ("done", 3),
        ("stopped: no time left", 2),
    ]


def test_a_failure_is_kept_and_costs_its_part_alone(tmp_path: Path) -> None:
    clock = Clock()
    results = gpu.Results(tmp_path / "gpu.json", {}, math.inf, clock)

    def broken() -> Iterator[dict[str, Any]]:
        yield from clock.rows(1)
        raise RuntimeError("illegal memory access")

    assert not results.run("linear", broken)
    assert not results.run("block", lambda: clock.rows(1, error=math.nan))
    assert not results.run("checks", lambda: clock.rows(2, passed=False))
    assert results.run("decode", lambda: clock.rows(2, passed=True))
    parts = content(tmp_path / "gpu.json")["parts"]
    assert "illegal memory access" in parts["linear"]["traceback"]
    assert [len(parts[name]["rows"]) for name in ("linear", "block", "checks", "decode")] == [1, 0, 2, 2]
    assert [parts[name]["status"] for name in ("linear", "block", "checks")] == ["failed", "failed", "done"]


def test_parts_of_an_earlier_run_stay(tmp_path: Path) -> None:
    clock = Clock()
    gpu.Results(tmp_path / "gpu.json", {"started": 1}, math.inf, clock).run("linear", lambda: clock.rows(1))
    gpu.Results(tmp_path / "gpu.json", {"started": 2}, math.inf, clock).run("block", lambda: clock.rows(2))
    parts = content(tmp_path / "gpu.json")["parts"]
    assert {name: part["run"]["started"] for name, part in parts.items()} == {"linear": 1, "block": 2}


def test_without_a_gpu_only_a_rehearsal_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 1
    assert not (tmp_path / "gpu.json").exists()
    with pytest.raises(SystemExit):
        gpu.main(["--json", str(tmp_path / "gpu.json"), "--parts", "linear,speed"])


@pytest.mark.slow
def test_the_whole_script_runs_in_a_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
    path = tmp_path / "gpu.json"
    command = ["--rehearse", "--tune", "--json", str(path), "--work", str(tmp_path), "--samples", "2", "--length", "16"]
    assert gpu.main([*command, "--commit", "abc"]) == 0, capsys.readouterr().out
    written = content(path)
    assert written["commit"] == "abc"
    assert written["rehearsal"]
    parts = written["parts"]
    assert list(parts) == list(gpu.PARTS)
    assert {part["status"] for part in parts.values()} == {"done"}
    checked = parts["checks"]["rows"]
    assert all(row["passed"] for row in checked)
    assert {row.get("form") for row in checked} == {None, "fragments", "portable", "blocks"}
    compared = [row for name in ("linear", "block") for row in parts[name]["rows"] if "comparisons" in row]
    assert len(compared) == 2 + 2 * (2 + 1)
    assert all(row["correct"] for product in compared for row in product["comparisons"])
    steps = {(row["model"], row.get("step")): row for row in parts["decode"]["rows"]}
    assert steps["2:4", "decode, batch 2"]["ratio"] > 0
    assert steps["dense", "decode, batch 2"]["weight_bytes"] > steps["2:4", "decode, batch 2"]["weight_bytes"]
    assert len(parts["prune"]["rows"]) == 2
    shown = capsys.readouterr().out
    assert "linear: name small  form unpacked  ratios {1: " in shown
    assert [row["passed"] for row in parts["structures"]["rows"] if "passed" in row] == [True, True]
    assert "7 of 7 parts" in shown


def test_the_plan_is_the_table_of_shapes() -> None:
    plan = Plan()
    assert plan.tokens == (1, 2, 4, 8, 16, 32, 64, 256, 512, 2048, 8192)
    assert plan.shapes is SHAPES
    assert set(plan.block_shapes) <= set(SHAPES)
    # What is repeated under another model's name is measured once.
    assert len(set(SHAPES.values())) == len(SHAPES)
    assert all(rows % 128 == 0 and columns % 128 == 0 for rows, columns in map(SHAPES.get, plan.block_shapes))


def test_random_weights_are_what_their_layouts_say() -> None:
    layout, stored = gpu_products.random_24((32, 64), CPU)
    dense = layout.unpack(stored)
    assert {int(count) for count in (dense.view(-1, 4) != 0).sum(1)} == {2}
    pairs = {tuple(group.nonzero().view(-1).tolist()) for group in dense.view(-1, 4)}
    assert len(pairs) == 6
    for balanced in (True, False):
        blocks, stored = gpu_products.random_blocks((128, 256), 16, 0.75, balanced, CPU)
        assert blocks.blocks == 32
        counts = (blocks.unpack(stored).view(8, 16, 16, 16) != 0).any(1).any(-1).sum(1)
        assert (set(counts.tolist()) == {4}) == balanced


@pytest.mark.parametrize("damage", ["wrong", "unstable"])
def test_the_checks_find_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    layout, stored = gpu_products.random_24((32, 64), CPU)
    form = forms.Portable()
    right, calls = form.multiply, iter(range(100))
    factor = {"wrong": lambda: 1.05, "unstable": lambda: 1 + next(calls) % 2 * 1e-2}[damage]
    monkeypatch.setattr(forms.Portable, "multiply", lambda self, *given: right(*given) * factor())
    row = gpu_checks._check(form, layout, stored, rehearsal())
    assert row["passed"] is False
    assert ("relative error" if damage == "wrong" else "different bits") in row["wrong"][0]
    assert gpu_checks.failed([row, {"passed": True}]) == [json.dumps(row)]


def test_a_step_of_decode_is_the_forward_of_the_whole_text() -> None:
    plan = rehearsal()
    model = gpu_model.random_model(plan).float()
    torch.manual_seed(1)
    step = gpu_model.decode_step(model, 2, plan)
    torch.manual_seed(1)
    ids = torch.randint(plan.model["vocab_size"], (2, 1))
    with torch.inference_mode():
        expected = model(input_ids=ids.repeat(1, plan.context // 2 + 1)).logits[:, -1:]
        # Without taking its length back, the cache would be full after half of these.
        for _ in range(plan.context):
            found = step()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_2_of_4_layers_take_the_place_of_all_in_the_decoder() -> None:
    plan = rehearsal()
    model = gpu_model.random_model(plan)
    before = gpu_model.weight_bytes(model)
    gpu_model.prune_24(model, plan)
    layers = [module for module in model.modules() if isinstance(module, gpu_products.SparseLinear)]
    assert len(layers) == 2 * 7
    dense = sum(rows * columns * 2 for rows, columns in (layer.layout.shape for layer in layers))
    assert before - gpu_model.weight_bytes(model) == dense - dense * 9 // 16
    assert all(isinstance(layer.layout, NMLayout) for layer in layers)


def test_block_sparsities_are_compared_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "64x128", "--blocks", "16", "--sparsities", "0.5,0.75", "--tokens", "1,3", "--seconds", "0"]
    blocks.main([*options, "--json", str(tmp_path / "blocks.json")])
    rows = content(tmp_path / "blocks.json")["rows"]
    assert [(row["sparsity"], row["tokens"]) for row in rows] == [(0.5, 1), (0.5, 3), (0.75, 1), (0.75, 3)]
    assert all(row["correct"] and row["ratio"] > 0 for row in rows)
    assert "75% of 16x16, 3 tokens: dense" in capsys.readouterr().out


def test_peers_are_checked_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = rehearsal()
    weight, x = torch.randn(16, 32), torch.randn(4, 32)
    monkeypatch.setattr(peers, "time_calls", lambda *_, **__: pytest.fail("timed"))
    refused = peers._checked_time(x @ weight.T * 1.01, weight, x, [], plan.effort)
    assert refused["refused"].startswith("wrong: relative error 0.01")
    assert "cuSPARSELt is not in this build" in peers.cusparselt(weight, x, plan.effort)["refused"]


def test_what_cannot_be_captured_is_launched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.timing import Timing

    def fake_time(calls: object, device: object, seconds: float, captured: bool = True) -> Timing:
        if captured:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return Timing(1e-6, 1e-6, 1e-6, 3)

    monkeypatch.setattr(peers, "time_calls", fake_time)
    weight, x = torch.randn(16, 32), torch.randn(4, 32)
    row = peers._checked_time(x @ weight.T, weight, x, [], replace(rehearsal().effort))
    assert row["captured"] is False
    assert row["not_captured"] == "RuntimeError: operation not permitted when stream is capturing"
    assert row["median_us"] == 1.0


def test_cusparselt_gets_padded_tokens_and_the_found_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, ...]] = []

    def product(compressed: torch.Tensor, x: torch.Tensor, **settings: int) -> torch.Tensor:
        given.append((*x.shape, settings["alg_id"]))
        return compressed @ x

    monkeypatch.setattr(peers, "cusparselt_version", lambda: 801)
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda compressed, x: 7, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product, raising=False)
    row = peers.cusparselt(torch.randn(16, 32), torch.randn(3, 32), rehearsal().effort)
    assert (row["version"], row["algorithm"], row["padded_tokens"]) == (801, {"alg_id": 7}, 8)
    assert set(given) == {(32, 8, 7)}
    assert row["median_us"] > 0
