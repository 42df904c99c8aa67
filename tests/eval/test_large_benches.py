"""The benches of models larger than memory, on a model that is not."""

import json
import sys
from pathlib import Path

import pytest

from llmprune.eval.bench import large, reading
from llmprune.eval.bench.prune import SHAPES

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)


@pytest.mark.slow
def test_all_is_planned_and_some_layers_are_pruned(tmp_path: Path) -> None:
    sizes = ["--layers", "2", "--samples", "3", "--length", "16", "--work", str(tmp_path)]
    for method in ("magnitude", "wanda"):
        large.main(["tiny", "--method", method, *sizes, "--json", str(tmp_path / "large.json")])
    rows = json.loads((tmp_path / "large.json").read_text())
    assert [row["method"] for row in rows] == ["magnitude", "wanda"]
    for row in rows:
        assert (row["layers"], row["of_layers"], row["tokens"]) == (2, 3, 48)
        assert row["whole_seconds"] == pytest.approx(1.5 * row["seconds"]["total"])
        assert row["memory"]["predicted_bytes"] == row["memory"]["planned_bytes"] > 0
        assert row["plan"]["seconds"]["choosing"] > 0
    whole = sum(file.stat().st_size for file in (tmp_path / "plan" / "tiny-3").glob("*.safetensors"))
    assert rows[0]["plan"]["disk_bytes"] == pytest.approx(whole, rel=0.05)  # headers


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not drop files from their cache")
def test_runs_with_and_without_reading_ahead_take_turns(tmp_path: Path) -> None:
    sizes = ["--layers", "2", "--samples", "3", "--length", "16", "--repeat", "2", "--work", str(tmp_path)]
    reading.main(["tiny", *sizes, "--json", str(tmp_path / "reading.json")])
    result = json.loads((tmp_path / "reading.json").read_text())
    assert {kind: len(runs) for kind, runs in result["seconds"].items()} == {"ahead": 2, "not ahead": 2}
    assert all(found["total"] > found["load"] > 0 for found in result["median_seconds"].values())
