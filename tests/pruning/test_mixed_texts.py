"""A run on mixes: figures by source, and the self-generated part kept."""

import json
import math
from pathlib import Path

import pytest
from tiny_models import build, recipe, save

from llmprune import prune
from llmprune.cli.tables.pruning import _evaluation_facts
from llmprune.pruning.forecast.forecast import dry_run


def test_a_run_on_mixes(tmp_path: Path) -> None:
    lines = [json.dumps({"text": " ".join(f"w{(7 * row + word) % 90}" for word in range(40))}) for row in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    read = {"source": str(tmp_path / "a.jsonl")}
    calibration = {"samples": 6, "length": 16, "mix": [read | {"share": 2}, {"source": "self", "share": 1}]}
    own = {"source": "self", "seed": 3, "continues": read["source"]}
    settings = recipe(calibration=calibration, evaluation=[read | {"samples": 3}, own | {"samples": 2}], held_back=3)
    model = save(build("llama"), tmp_path / "model")
    plan = dry_run(model, settings)
    assert plan.tokens == 9 * 16
    assert any("calibration text is a mix of 9 sequences of 16 tokens: 6 from" in note for note in plan.notes)
    report = prune(model, settings, tmp_path / "out")
    texts = report.header["texts"]["calibration"]
    assert [(part["source"], part["samples"]) for part in texts["mix"]] == [(read["source"], 6), ("self", 3)]
    assert len((tmp_path / "out" / "calibration.jsonl").read_text().splitlines()) == 3
    evaluation = report.header["evaluation"]
    parts = evaluation["sources"]
    assert [part["dense"]["samples"] for part in parts] == [3, 2]
    counts = [part["dense"]["predicted_tokens"] for part in parts]
    for which in ("dense", "pruned"):
        nats = sum(part[which]["nats"] * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
        assert nats == pytest.approx(evaluation[which]["nats"])
        assert parts[0][which]["perplexity"] == pytest.approx(math.exp(parts[0][which]["nats"]))
    for figure in ("kl_divergence", "agreement"):
        mean = sum(part[figure] * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
        assert mean == pytest.approx(evaluation[figure])
    shown = [value for name, value in _evaluation_facts(report) if name == "perplexity by source"]
    assert len(shown) == 2
    assert shown[0].endswith(f"on {read['source']}")
    assert shown[1].endswith(f"self-generated text that continues {read['source']}")
    assert "Perplexity by source" in (tmp_path / "out" / "report.html").read_text()
