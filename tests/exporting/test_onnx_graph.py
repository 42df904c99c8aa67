"""ONNX graphs: the logits of the checkpoint, in ONNX Runtime."""

import importlib.util
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from folders import contents
from packed_models import save_packed
from tiny_models import build, random_ids, save
from transformers import AutoModelForCausalLM
from uneven_models import save_uneven

from llmprune import export
from llmprune.errors import MissingPackageError, ModelError, NumericsError
from llmprune.exporting import onnx_graph

IDS = random_ids(4, 9)


def by_runtime(folder: Path) -> torch.Tensor:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"input_ids": IDS.numpy()})[0])


@torch.no_grad()
def by_torch(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed(tmp_path_factory.mktemp("made"), "bitmask", "0.6", num_hidden_layers=1)


@pytest.mark.slow
def test_logits_of_a_packed_checkpoint_are_those_of_torch(made: Path) -> None:
    before = contents(made)
    report = export(made / "packed", "onnx")
    folder = report.output
    assert {name: data for name, data in contents(made).items() if not name.startswith("packed-onnx/")} == before
    torch.testing.assert_close(by_runtime(folder), by_torch(made / "dense"), rtol=1e-4, atol=1e-4)
    assert {file.file for file in report.files} == {"model.onnx", "model.onnx.data"}
    assert "tokenizer.json" in contents(folder)
    assert not (folder / "dense").exists()
    assert "differ from torch's by at most" in report.facts["logits"]
    # In float32, whatever the checkpoint has, and with every zero.
    assert report.bytes > 2 * report.dense_bytes


@pytest.mark.slow
@pytest.mark.parametrize("family", ["uneven", "mixtral"])
def test_layers_that_differ_and_experts(tmp_path: Path, family: str) -> None:
    if family == "uneven":
        save_uneven(tmp_path / family)
    else:
        save(build(family, num_hidden_layers=1), tmp_path / family)
    torch.testing.assert_close(
        by_runtime(export(tmp_path / family, "onnx").output), by_torch(tmp_path / family), rtol=1e-4, atol=1e-4
    )


class Saved:
    """Stands in for a translated model: a graph that returns other logits."""

    def save(self, path: Path, *, external_data: bool) -> None:
        path.write_bytes(b"graph")


class Session:
    """Stands in for ONNX Runtime."""

    def __init__(self, path: Path, **options: Any) -> None:
        assert path.read_bytes() == b"graph"

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        return [torch.full((*feeds["input_ids"].shape, 128), float("nan")).numpy()]


def test_other_logits_are_refused_and_nothing_is_left(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: Saved())
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(NumericsError, match="the logits of ONNX Runtime differ from torch's by nan"):
        export(made / "packed", "onnx", tmp_path / "out")
    assert contents(tmp_path) == {}


def test_models_that_torch_cannot_translate(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise torch.onnx.OnnxExporterError("many lines\nof advice") from ValueError("data-dependent\ncontrol flow")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ModelError, match=r"cannot translate this model: data-dependent control flow\n"):
        export(made / "dense", "onnx", tmp_path / "out")
    assert contents(tmp_path) == {}


def test_without_its_packages_the_extra_is_named(made: Path, monkeypatch: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        onnx_graph.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(MissingPackageError, match=r"an ONNX graph \(the extra onnx\) needs the package onnxscript"):
        export(made / "dense", "onnx", made / "none")
