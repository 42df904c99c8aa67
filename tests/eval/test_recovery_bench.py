"""The bench of recovery: what it writes, and that rows of other methods stay."""

import json
from pathlib import Path

import pytest

from llmprune.eval.bench import recovery as bench
from llmprune.storage.files import read_index


@pytest.mark.slow
def test_the_bench_prunes_recovers_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LENGTH", 32)
    monkeypatch.setattr(bench, "CALIBRATED", 2)
    text = tmp_path / "text.jsonl"
    words = [f"The {name} of version {number} is described here." for number in range(9) for name in ("form", "use")]
    text.write_text("".join(json.dumps({"text": f"{word} {word} {word}"}) + "\n" for word in words))
    file = tmp_path / "out.json"
    file.write_text(json.dumps([{"method": "wanda", "kept": True}]))
    bench.main(
        ["--calibration", str(text), "--heldout", str(text), "--folder", str(tmp_path / "out"), "--samples", "2",
         "--methods", "magnitude", "--epochs", "4", "--json", str(file)]
    )  # fmt: skip
    other, row = json.loads(file.read_text())
    assert other == {"method": "wanda", "kept": True}
    assert row["perplexity"]["recovered"] < row["perplexity"]["pruned"]
    assert row["gap_closed"] is None or row["gap_closed"] > 0
    stored = read_index(tmp_path / "out" / "magnitude-recovered")
    zeros = sum(int((tensor[...] == 0).sum()) for tensor in stored.values() if len(tensor.shape) > 1)
    assert row["zeros"] == {"before": zeros, "after": zeros}
    assert zeros >= 5_898_240 // 2
