"""The bench of archives, on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import build, save

from llmprune.eval.bench import archive


def test_its_figures_are_of_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(build("llama", torch.bfloat16, hidden_size=64, intermediate_size=96), tmp_path / "tiny")
    archive.main([str(tmp_path / "tiny"), "--patterns", "dense", "0.5", "--json", str(tmp_path / "figures.json")])
    dense, half = json.loads((tmp_path / "figures.json").read_text())
    assert [row["pattern"] for row in (dense, half)] == ["dense", "0.5"]
    assert dense["dense_bytes"] == half["dense_bytes"]
    assert 0.3 < half["archived_matrices"] < 0.5 < dense["archived_matrices"] < 0.9
    assert half["packed_matrices"] == pytest.approx(0.5625, abs=0.01)
    assert half["archived_packed_bytes"] < half["packed_bytes"] < half["dense_bytes"]
    assert "tiny" in capsys.readouterr().out
