"""The bench of structured pruning, on tiny models: what it runs, what it skips, what it refuses to time."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import write_jsonl
from tiny_models import build, save
from transformers import AutoModelForCausalLM

from llmprune.eval.bench import structured, structured_speed
from llmprune.eval.bench.structured import Bench, Protocol, figures_table, perplexity_rows, perplexity_table
from llmprune.eval.bench.structured_plan import SCORES, Row, budget_rows, depth_rows, matched_rows, quality_rows
from llmprune.eval.bench.structured_speed import Turns, documented_flops, solver_rows, speed_rows
from llmprune.pruning.pipeline import prune
from llmprune.recipe.recipe import load_recipe

PROTOCOL = Protocol(samples=4, held_back=1, chunks=3, length=16, batch_size=2)
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, factor in (("calibration", 7), ("heldout", 11)):
        text = " ".join(f"w{number * factor % 120 + 4}" for number in range(200))
        write_jsonl(folder / f"{name}.jsonl", [text])
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, without biases."""
    return save(build("llama-tied", torch.bfloat16), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bench(llama: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(str(llama), texts, tmp_path_factory.mktemp("work"), PROTOCOL)


class Counted:
    """Stands in for a bench: gives each row the next number, and fails at one of them."""

    def __init__(self, fails_at: int = 0) -> None:
        self.measured: list[str] = []
        self._fails_at = fails_at

    def measure(self, row: Row) -> dict[str, Any]:
        self.measured.append(row.name)
        if len(self.measured) == self._fails_at:
            raise KeyboardInterrupt
        return figures(row.removed, row.label, float(len(self.measured))) | {
            "structures": row.structures, "reconstruct": row.reconstruct,
        }  # fmt: skip


def figures(removed: str, label: str, perplexity: float | None) -> dict[str, Any]:
    return {
        "removed": removed, "label": label, "perplexity": perplexity, "dense_perplexity": 21.879, "kl_divergence": 0.25,
    }  # fmt: skip


def rows(*labels: str, remove: float = 0.5) -> list[Row]:
    return [Row("half", label, {"ffn": {"remove": remove, "method": label}}) for label in labels]


def measure(bench: Counted, wanted: Sequence[Row], path: Path, only: Sequence[str] = ("*",)) -> list[dict[str, Any]]:
    return perplexity_rows(bench, wanted, path, "abc", only)  # type: ignore[arg-type]


# Perplexities.


def test_a_row_is_what_the_pipeline_says(bench: Bench, llama: Path, texts: Path, tmp_path: Path) -> None:
    row = Row("half", "wanda", {"ffn": {"remove": 0.5, "method": "wanda", "multiple": 1}})
    found = bench.measure(row)
    text = {"samples": 4, "length": 16, "order": "text", "layout": "pack-bare"}
    recipe = {
        "structures": row.structures,
        "calibration": {"source": str(texts / "calibration.jsonl"), **text},
        "evaluation": {"source": str(texts / "heldout.jsonl"), **text, "samples": 3},
        "held_back": 1,
    }
    wide = AutoModelForCausalLM.from_pretrained(llama, dtype="float32")
    report = prune(wide, recipe, tmp_path / "out")
    assert found["perplexity"] == pytest.approx(report.pruned_perplexity, rel=1e-5)
    assert found["dense_perplexity"] == pytest.approx(report.dense_perplexity, rel=1e-5)
    assert found["kl_divergence"] == pytest.approx(report.header["evaluation"]["kl_divergence"], rel=1e-3)
    assert found["perplexity"] != pytest.approx(found["dense_perplexity"], rel=1e-3)
    whole, ffn = 128 * 32 + 3 * (3 * 32 * 48 + 2 * 32**2 + 2 * 16 * 32 + 64) + 32, 3 * 32 * 48
    assert found["parameters"] == pytest.approx(1 - 1.5 * ffn / whole)
    json.dumps(found, allow_nan=False)


def test_finished_rows_are_skipped_and_changed_ones_are_not(tmp_path: Path) -> None:
    path, first = tmp_path / "rows.json", Counted(fails_at=3)
    with pytest.raises(KeyboardInterrupt):
        measure(first, rows("obs", "wanda", "flap"), path)
    assert [row["label"] for row in json.loads(path.read_text())] == ["obs", "wanda"]
    again = Counted()
    found = measure(again, [*rows("obs", "flap"), *rows("wanda", remove=0.25)], path)
    assert again.measured == ["half: flap", "half: wanda"]
    assert [(row["label"], row["perplexity"]) for row in found] == [("obs", 1.0), ("flap", 1.0), ("wanda", 2.0)]
    assert {row["commit"] for row in found} == {"abc"}
    assert found == json.loads(path.read_text())


def test_rows_are_chosen_by_their_names(tmp_path: Path) -> None:
    bench = Counted()
    measure(bench, rows("obs", "wanda", "flap"), tmp_path / "rows.json", ["*wan*", "half: obs"])
    assert bench.measured == ["half: obs", "half: wanda"]


def test_the_table_has_a_row_for_each_choice_and_a_column_for_what_goes() -> None:
    found = [figures("12.5%", "obs", 22.004), figures("12.5%", "wanda", 23.5), figures("50.0%", "obs", None)]
    assert perplexity_table(found).splitlines() == [
        "| perplexity (divergence), dense 21.88 | 12.5% | 50.0% |",
        "| --- | --- | --- |",
        "| obs | 22.00 (0.250) | infinite (0.250) |",
        "| wanda | 23.50 (0.250) |  |",
    ]


def test_every_score_has_its_rows(bench: Bench) -> None:
    found = quality_rows(bench.source)
    assert len({row.name for row in found}) == len(found)
    for row in found:
        load_recipe({"structures": row.structures})
    quarter = {row.label for row in found if row.removed == "25.0% FFN"}
    assert quarter == {name for name in SCORES if name != "obs"} | {f"{name} + refit" for name in SCORES}
    refits = [row.structures["ffn"]["refit"] for row in found if row.removed == "25.0% FFN"]
    assert sum(refits) == len(SCORES)
    assert {row.removed for row in found if "heads" in row.structures} == {"25.0% FFN + 1 of 2 heads", "1 of 2 heads"}


@pytest.mark.slow
def test_uniform_rows_are_as_large_as_the_budget(bench: Bench, tmp_path: Path) -> None:
    found = budget_rows(bench.source)
    uniform = [row for row in found if "budget" not in row.structures]
    assert [row.label for row in uniform] == [
        "uniform: 0 of 2 heads, 28 channels",
        "uniform: 1 of 2 heads, 12 channels",
    ]
    measured = [bench.measure(row) for row in [*uniform, found[-2]]]
    # Steps of 16 channels, three times too coarse for the budget: it keeps it and takes more.
    assert measured[0]["parameters"] == measured[1]["parameters"] >= measured[2]["parameters"]
    assert measured[0]["predicted_divergence"] is None
    assert measured[2]["predicted_divergence"] > 0
    assert measured[0]["kept"] is None
    assert all(channels % 16 == 0 for channels in measured[2]["kept"]["ffn"])


def test_depth_rows_run(bench: Bench) -> None:
    found = {row.name: row for row in depth_rows(bench.source)}
    for row in found.values():
        load_recipe({"structures": row.structures})
    assert {row.removed for row in found.values()} == {
        "1 of 3 layers", "1 attention blocks", "1 MLP blocks", "25% of the hidden channels",
    }  # fmt: skip
    assert bench.measure(found["1 of 3 layers: kl"])["parameters"] < 0.8


def test_matched_rows_are_fitted(bench: Bench) -> None:
    found = {row.name: row for row in matched_rows(bench.source)}
    for row in found.values():
        load_recipe({"structures": row.structures, "reconstruct": row.reconstruct})
    assert {row.removed for row in found.values()} == {
        "25.0% FFN", "50.0% FFN", "25.0% FFN + 1 of 2 heads", "1 of 3 layers",
    }  # fmt: skip
    plain, fitted = (found[f"1 of 3 layers: block-influence{added}"] for added in ("", " + block matching"))
    assert plain.structures == fitted.structures
    assert bench.measure(plain)["matches"] == []
    quick = replace(fitted, reconstruct={"epochs": 3, "lr": 3e-3, "sequences": 1}, samples=6)
    figures = bench.measure(quick)
    assert [match[:2] for match in figures["matches"]] == [[f"model.layers.{n}", "corrected"] for n in range(2)]
    assert any(after < before for _, _, before, after in figures["matches"])
    assert (figures["reconstruct"], figures["samples"]) == (quick.reconstruct, 6)


def test_rows_that_are_fitted_otherwise_are_measured_again(tmp_path: Path) -> None:
    (row,), path = rows("obs"), tmp_path / "rows.json"
    for wanted, measured in ((row, 1), (row, 0), (replace(row, reconstruct={"epochs": 1}), 1)):
        bench = Counted()
        measure(bench, [wanted], path)
        assert len(bench.measured) == measured


def test_the_command_writes_the_file_and_the_table(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(structured, "Bench", lambda *_: bench)
    monkeypatch.setitem(structured.PLANS, "depth", lambda source: depth_rows(source)[:2])
    json_file, table = tmp_path / "rows.json", tmp_path / "table.md"
    options = ["--text", str(tmp_path), "--json", str(json_file), "--table", str(table), "--rows", "*influence"]
    structured.main(["depth", *options])
    (row,) = json.loads(json_file.read_text())
    assert f"{row['perplexity']:.2f}" in table.read_text()
    assert table.read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        structured.main(["depth", "--json", str(json_file)])


# Speed and solver.


def test_half_a_model_is_checked_then_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured_speed, "computed_in", lambda dtype, device: dtype)
    found = list(speed_rows(SHAPE, Turns(prompt=8, new_tokens=2, rounds=2)))
    assert [(row["dtype"], row["what"]) for row in found] == [
        (dtype, what)
        for dtype in ("float32", "bfloat16")
        for what in ("prefill of 8 tokens", "decode of a token after 8")
    ]
    assert all(row["dense"]["repeats"] == 2 for row in found)
    assert found[0]["dense_ms"] > 0
    layers, head = 2 * (3 * 64 * 96 + 2 * 64 * 64 + 2 * 64 * 32), 64 * 4096
    assert found[1]["flop_ratio"] == pytest.approx((layers + head) / (layers / 2 + head))
    assert found[0]["flop_ratio"] == pytest.approx((8 * layers + head) / (4 * layers + head))
    assert "| bfloat16 | prefill of 8 tokens |" in figures_table(found, structured_speed.SPEED_COLUMNS)


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    models = structured_speed._models

    def wrong(*arguments: Any) -> Any:
        dense, pruned, report = models(*arguments)
        with torch.no_grad():
            pruned.model.layers[1].mlp.down_proj.weight.mul_(2)
        return dense, pruned, report

    monkeypatch.setattr(structured_speed, "_models", wrong)
    monkeypatch.setattr(structured_speed, "_in_turns", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="the pruned model is off"):
        next(speed_rows(SHAPE))


def test_the_solver_is_timed_with_and_without_exchanges() -> None:
    threads = torch.get_num_threads()
    found = list(solver_rows((48, 16, 12), threads=(1,), swaps=(0, 4)))
    assert [(row["threads"], row["most_swaps"]) for row in found] == [(1, 0), (1, 4)]
    assert found[0]["swaps"] == 0
    assert found[1]["error"] <= found[0]["error"]
    assert 0 < found[0]["error"] < 1
    assert torch.get_num_threads() == threads
    assert "| 1 | 0 of 0 |" in figures_table(found, structured_speed.SOLVER_COLUMNS)


def test_a_wrong_solution_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = structured_speed.remove_groups

    def wrong(*arguments: Any) -> Any:
        removal = solve(*arguments)
        removal.weight.mul_(1.01)
        return removal

    monkeypatch.setattr(structured_speed, "remove_groups", wrong)
    with pytest.raises(AssertionError, match="the refit is off"):
        next(solver_rows((48, 16, 12), threads=(1,)))


def test_operations_are_those_of_the_documentation() -> None:
    assert math.isclose(documented_flops(14336, 4096, 3584, exchanged=False), 9e12, rel_tol=0.02)
    assert documented_flops(8, 4, 2, exchanged=True) == 2 * (6 * 64 * 2 + 512 + 2 * 64 * 4)
