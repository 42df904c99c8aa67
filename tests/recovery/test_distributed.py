"""Two processes under torchrun train as one does with twice the batch, and one of them writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import build, save

from llmprune import TextSpec, prune, recover
from llmprune.storage.files import read_index
from llmprune.storage.report import load_report


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_batch(tmp_path: Path) -> None:
    dense = save(build("llama"), tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number * number % 120 + 4}" for number in range(300)))
    settings = {"source": str(text), "samples": 2, "length": 16}
    recipe = {"pattern": "2:4", "method": "magnitude", "calibration": settings, "evaluation": None}
    prune(dense, recipe, tmp_path / "pruned")
    options = {"batch_size": 4, "learning_rate": 1e-2, "epochs": 2, "held_back": 4}
    recover(tmp_path / "pruned", tmp_path / "one", TextSpec(str(text), samples=20, length=16), dense, options)

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [
        Path(sys.executable).with_name("llmprune"), "recover", tmp_path / "pruned", "--teacher", dense,
        "--dataset", text, "--num-samples", 20, "--max-seq-length", 16,
        "--held-back", 4, "--lr", "1e-2", "--epochs", 2, "--batch-size", 2,
        "--output", tmp_path / "two", "--json", "--quiet",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*torchrun, *map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    one, two = ({key: stored[...] for key, stored in read_index(tmp_path / name).items()} for name in ("one", "two"))
    before = {key: stored[...] for key, stored in read_index(tmp_path / "pruned").items()}
    for key, tensor in one.items():
        moved = (tensor - before[key]).norm()
        assert (two[key] - tensor).norm() < 0.05 * moved, key
        assert tensor.ndim == 1 or two[key].eq(0).equal(before[key].eq(0)), key
    assert torch.stack([(tensor - before[key]).norm() for key, tensor in one.items()]).min() > 0.01
    recovery = load_report(tmp_path / "two").header["recovery"]
    assert recovery["processes"] == 2
    assert done.stdout.count('"recovery"') == 1
    assert recovery["steps"] == load_report(tmp_path / "one").header["recovery"]["steps"] == 8
