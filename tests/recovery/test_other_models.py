"""Recovery of models other than a Llama with layers of one size: uneven, fused, transposed and tied weights."""

from pathlib import Path

import pytest
import torch
from tiny_models import build, save
from transformers import AutoModelForCausalLM
from uneven_models import save_uneven
from word_texts import words

from llmprune import prune, recover
from llmprune.storage.files import read_index

OPTIONS = {"learning_rate": 1e-2, "epochs": 1, "batch_size": 4, "accumulation": 2, "evaluations": 4, "patience": 0}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {stored.key: stored[...] for stored in read_index(folder).values()}


def test_layers_of_different_sizes_are_trained_as_they_are(tmp_path: Path) -> None:
    dense = save(build("llama"), tmp_path / "dense")
    save_uneven(tmp_path / "small")
    recover(tmp_path / "small", tmp_path / "out", words(tmp_path / "text.txt", 200), dense, OPTIONS)
    before, after = _tensors(tmp_path / "small"), _tensors(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}
    assert all(not tensor.equal(before[name]) for name, tensor in after.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[0].mlp.up_proj.weight.equal(after["model.layers.0.mlp.up_proj.weight"])


def test_a_dense_model_is_warned_of(tmp_path: Path) -> None:
    """No structures were removed either."""
    dense = save(build("llama"), tmp_path / "dense")
    with pytest.warns(UserWarning, match="no weights are zero, .*: is this the pruned model"):
        recover(dense, tmp_path / "out", words(tmp_path / "text.txt", 60), dense, OPTIONS)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "llama-tied"])
def test_fused_transposed_and_tied_weights_are_trained(tmp_path: Path, family: str) -> None:
    folder = save(build(family), tmp_path / "dense")
    text = words(tmp_path / "text.txt", 200)
    settings = {"source": text.source, "samples": 2, "length": 16}
    prune(folder, {"pattern": 0.5, "method": "magnitude", "calibration": settings, "evaluation": None}, tmp_path / "p")
    recover(tmp_path / "p", tmp_path / "out", text, folder, {**OPTIONS, "held_back": 0})
    before, after = _tensors(tmp_path / "p"), _tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert sum(not after[name].equal(tensor) for name, tensor in before.items()) > 0.7 * len(before)
    masked = [name for name, tensor in before.items() if tensor.ndim > 1 and tensor.eq(0).any()]
    assert masked
    assert all(after[name].eq(0).equal(before[name].eq(0)) for name in masked)
