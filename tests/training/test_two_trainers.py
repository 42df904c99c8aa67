"""Two processes under torchrun choose the same masks, and train as one does with twice the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import build, save

from llmprune import TextSpec, train
from llmprune.storage.files import read_index
from llmprune.storage.report import load_report

RECIPE = """rule: {rigl: {interval: 1}}
schedule: {kind: one-shot, stages: 2, end: 0.5, every: 4}
training: {learning_rate: 1e-2, held_back: 4, batch_size: %d}
"""


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_batch(tmp_path: Path) -> None:
    """RigL reads dense gradients in every step: if each process used its own, their masks would differ."""
    model = save(build("llama"), tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number * number % 120 + 4}" for number in range(300)))
    train(model, tmp_path / "one", TextSpec(str(text), samples=20, length=16), RECIPE % 4)

    (tmp_path / "recipe.yaml").write_text(RECIPE % 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [
        Path(sys.executable).with_name("llmprune"), "train", model, "--recipe", tmp_path / "recipe.yaml",
        "--text", text, "--num-samples", 20, "--max-seq-length", 16, "--output", tmp_path / "two", "--json", "--quiet",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*torchrun, *map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, two = ({key: stored[...] for key, stored in read_index(tmp_path / name).items()} for name in ("one", "two"))
    before = {key: stored[...] for key, stored in read_index(model).items()}
    for key, tensor in one.items():
        if "_proj.weight" in key:
            assert int(two[key].eq(0).sum()) == int(tensor.eq(0).sum()) == tensor.numel() // 2, key
            assert (two[key].eq(0) == tensor.eq(0)).float().mean() > 0.98, key  # sums of gradients round differently
        assert (two[key] - tensor).norm() < 0.2 * (tensor - before[key]).norm(), key
    training = load_report(tmp_path / "two").header["training"]
    assert training["processes"] == 2
    assert training["steps"] == 8
    assert done.stdout.count('"training"') >= 1
