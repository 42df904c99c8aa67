"""The bench of ONNX Runtime, on a tiny model whose graphs are torch's own."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from tiny_models import build, save
from transformers import AutoModelForCausalLM

from llmprune.eval.bench import onnx

HIDDEN = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}


class Session:
    """A graph that names the folder of the model that it stands for."""

    def __init__(self, graph: Path, *arguments: Any, **options: Any) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(graph.read_text(), dtype=torch.float32)

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        with torch.no_grad():
            return [self._model(torch.from_numpy(feeds["input_ids"])).logits.numpy()]


def stand_in(folder: Path, to: str) -> None:
    graph = folder.with_name(f"{folder.name}-{to}") / "model.onnx"
    graph.parent.mkdir()
    graph.write_text(str(folder))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(onnx, "export", stand_in)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return save(build("llama", torch.bfloat16, **HIDDEN), tmp_path / "tiny")


def test_every_kind_is_measured_in_every_way(tiny: Path, tmp_path: Path) -> None:
    common = [str(tiny), "--work", str(tmp_path / "work"), "--tokens", "3", "7", "--seconds", "0"]
    onnx.main([*common, "--prepare"])
    onnx.main([*common, "--json", str(tmp_path / "figures.json")])
    rows = json.loads((tmp_path / "figures.json").read_text())
    kinds = ("dense", "unstructured", "structured")
    assert [(row["weights"], row["tokens"]) for row in rows] == [(kind, count) for kind in kinds for count in (3, 7)]
    for row in rows:
        ways = {"torch", "onnxruntime"} | ({"packed"} if row["weights"] == "unstructured" else set())
        assert {key[:-3] for key in row if key.endswith("_ms")} == ways == row["timings"].keys()
        assert all(timing["repeats"] == 10 for timing in row["timings"].values())
    zeros = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "tiny" / "unstructured").model.layers[0].mlp
    assert float((zeros.up_proj.weight == 0).float().mean()) == 0.5
    assert (
        json.loads((tmp_path / "work" / "tiny" / "structured" / "config.json").read_text())["intermediate_size"] == 48
    )


def test_a_random_model_needs_no_checkpoint(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128}
    monkeypatch.setattr(onnx, "RANDOM", {**HIDDEN, **small})
    folders = onnx.prepare("random", tmp_path / "work")
    assert [row["weights"] for row in onnx.measure(folders, [3], 0)] == ["dense", "unstructured", "structured"]


def test_other_logits_are_not_timed(tiny: Path, tmp_path: Path) -> None:
    folders = onnx.prepare(tiny, tmp_path / "work")
    shutil.rmtree(folders["dense"])
    shutil.copytree(folders["unstructured"], folders["dense"])
    (tmp_path / "work" / "dense-onnx" / "model.onnx").write_text(str(tiny))
    with pytest.raises(SystemExit, match="the logits of onnxruntime differ from torch's"):
        list(onnx.measure(folders, [3], 0))
