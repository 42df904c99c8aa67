"""Where no compiler and no compiled kernels are, everything works: pruning by torch, packed matrices served dense."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import build, random_ids, recipe, save

from llmprune import load, pack, prune
from llmprune.kernels import configurations, cpu
from llmprune.kernels.cpu import finding
from llmprune.measuring.explain import explain
from llmprune.serving.quantizer import sparse_layers


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(finding, "INSTALLED", tmp_path / "none.so")
    finding._found.cache_clear()
    configurations.forget()
    yield
    finding._found.cache_clear()
    configurations.forget()


@pytest.mark.usefixtures("no_compiler")
def test_models_are_pruned_packed_loaded_and_generate(tmp_path: Path) -> None:
    model = save(build("llama", torch.bfloat16, num_hidden_layers=1), tmp_path / "model")
    prune(model, recipe(pattern="2:4", method="sparsegpt"), tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    dense, packed = (load(tmp_path / name, device="cpu") for name in ("dense", "packed"))
    assert {layer.form.name for _, layer in sparse_layers(packed)} == {"dense"}
    tokens = [one.generate(random_ids(1, 8), max_new_tokens=6, do_sample=False) for one in (dense, packed)]
    assert torch.equal(*tokens)
    assert "no-such-compiler" in str(cpu.unavailable())
    reasons = [row.reason for row in explain(tmp_path / "packed", torch.device("cpu")).packed]
    assert reasons
    assert all("no C++ compiler" in reason for reason in reasons)
