"""Two processes under torchrun train like one with twice the batch, and one of them writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_models import build, save
from torch import Tensor

from llmprune import TextSpec, prune, recover, train
from llmprune.storage.files import read_index
from llmprune.storage.report import load_report

pytestmark = pytest.mark.slow

# RigL reads dense gradients in every step: if each process used its own, their masks would differ.
RIGL = """rule: {rigl: {interval: 1}}
schedule: {kind: one-shot, stages: 2, end: 0.5, every: 4}
training: {learning_rate: 1e-2, held_back: 4, batch_size: %d}
"""
# Starting processes takes longer than training: both commands run in the same ones.
PROGRAM = """
import json, sys
from pathlib import Path
from llmprune.cli import app
for words in json.loads(Path(sys.argv[1]).read_text()):
    app(words, standalone_mode=False)
"""


class Trained(NamedTuple):
    """The folders of a test, and what two processes printed."""

    folder: Path
    printed: str

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {key: stored[...] for key, stored in read_index(self.folder / name).items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model recovered from pruning, and another one pruned by RigL: each by one process and by two."""
    folder = tmp_path_factory.mktemp("trained")
    dense, text = save(build("llama"), folder / "dense"), folder / "text.txt"
    text.write_text(" ".join(f"w{number * number % 120 + 4}" for number in range(300)))
    settings = {"source": str(text), "samples": 2, "length": 16}
    prune(dense, {"pattern": "2:4", "method": "magnitude", "calibration": settings, "evaluation": None}, folder / "cut")
    spec = TextSpec(str(text), samples=20, length=16)
    options = {"batch_size": 4, "learning_rate": 1e-2, "epochs": 2, "held_back": 4}
    recover(folder / "cut", folder / "recovered", spec, dense, options)
    train(dense, folder / "grown", spec, RIGL % 4)

    (folder / "rigl.yaml").write_text(RIGL % 2)
    texts = ["--dataset", text, "--num-samples", 20, "--max-seq-length", 16, "--json", "--quiet"]
    commands = [
        [
            "recover", folder / "cut", "--teacher", dense, "--held-back", 4, "--lr", "1e-2", "--epochs", 2,
            "--batch-size", 2, "--output", folder / "recovered-by-two", *texts,
        ],
        ["train", dense, "--recipe", folder / "rigl.yaml", "--output", folder / "grown-by-two", *texts],
    ]  # fmt: skip
    (folder / "commands.json").write_text(json.dumps([[str(word) for word in words] for words in commands]))
    (folder / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(folder / "program.py"), str(folder / "commands.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Trained(folder, done.stdout)


def test_recovery(trained: Trained) -> None:
    before, one, two = (trained.tensors(name) for name in ("cut", "recovered", "recovered-by-two"))
    for key, tensor in one.items():
        moved = (tensor - before[key]).norm()
        assert (two[key] - tensor).norm() < 0.05 * moved, key
        assert tensor.ndim == 1 or two[key].eq(0).equal(before[key].eq(0)), key
    assert torch.stack([(tensor - before[key]).norm() for key, tensor in one.items()]).min() > 0.01
    recovery = load_report(trained.folder / "recovered-by-two").header["recovery"]
    assert recovery["processes"] == 2
    assert trained.printed.count('"recovery"') == 1
    assert recovery["steps"] == load_report(trained.folder / "recovered").header["recovery"]["steps"] == 8


def test_training_chooses_the_same_masks(trained: Trained) -> None:
    before, one, two = (trained.tensors(name) for name in ("dense", "grown", "grown-by-two"))
    for key, tensor in one.items():
        if "_proj.weight" in key:
            assert int(two[key].eq(0).sum()) == int(tensor.eq(0).sum()) == tensor.numel() // 2, key
            assert (two[key].eq(0) == tensor.eq(0)).float().mean() > 0.98, key  # sums of gradients round differently
        assert (two[key] - tensor).norm() < 0.2 * (tensor - before[key]).norm(), key
    training = load_report(trained.folder / "grown-by-two").header["training"]
    assert training["processes"] == 2
    assert training["steps"] == 8
    assert trained.printed.count('"training"') >= 1
