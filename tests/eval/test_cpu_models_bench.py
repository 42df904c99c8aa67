"""The bench of whole models on a CPU: what it compares, and that it times nothing wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_matrices import needs_kernels
from tiny_models import build, save

from llmprune.eval.bench import cpu_models as bench
from llmprune.kernels import cpu
from llmprune.storage.files import read_json
from llmprune.storage.packed_config import packed_layouts

pytestmark = needs_kernels


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save(build("llama", torch.bfloat16), folder / "model")
    return folder


@pytest.fixture
def arguments(work: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("LLMPRUNE_CACHE", str(work / "cache"))
    return [str(work / "model"), "--work", str(work), "--lengths", "4", "--seconds", "0"]


def test_every_model_is_compared_with_both_dense_ones(work: Path, arguments: list[str]) -> None:
    bench.main([*arguments, "--json", str(work / "found.json")])
    result: dict[str, Any] = json.loads((work / "found.json").read_text("utf-8"))
    assert (result["model"], result["kernels"]) == ("model", cpu.LEVELS[cpu.library().level])
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == ["transformers", "dense", "0.5", "2:4"]
    for row in rows.values():
        for other in ("dense", "transformers"):
            ratio = row["tokens_per_second"] / rows[other]["tokens_per_second"]
            assert row[f"over_{other}"] == pytest.approx(ratio, rel=0.01)
    layouts = packed_layouts(read_json(work / "model" / "2of4-packed" / "config.json"))
    assert {layout.name for layout in layouts.values()} == {"nm"}


def test_a_wrong_model_is_not_timed(work: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench._load

    def wrong(folder: Path) -> Any:
        model = real(folder)
        model.get_output_embeddings().weight.data *= 1.2
        return model

    monkeypatch.setattr(bench, "_load", wrong)
    with pytest.raises(SystemExit, match=r"off by 0\.2"):
        bench.main(arguments)
