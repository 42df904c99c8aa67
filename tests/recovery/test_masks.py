"""Masks in files: one bit for each weight, read back for the same model only."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmprune import keep_zeros
from llmprune.errors import CheckpointError, RecoveryError


class Model(nn.Module):
    def __init__(self, columns: int = 11) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, columns))
        self.experts = nn.Parameter(torch.ones(2, 3, 5))
        self.dense = nn.Parameter(torch.ones(2, 2))
        with torch.no_grad():
            self.matrix[0, 1:9:3] = 0
            self.matrix[1, -1] = 0
            self.experts[1, 2] = 0


def test_a_file_has_one_bit_for_each_weight(tmp_path: Path) -> None:
    keep_zeros(Model()).save(tmp_path / "masks.safetensors")
    stored = load_file(tmp_path / "masks.safetensors")
    assert list(stored) == ["experts", "matrix"]
    # Row 0 lacks the columns 1, 4, 7; row 1 the last of eleven.
    assert stored["matrix"].tolist() == [[0b01101101, 0b111], [0xFF, 0b011]]
    assert stored["experts"].tolist() == [[0b11111]] * 5 + [[0]]


def test_masks_outlive_training_in_which_a_kept_weight_became_zero(tmp_path: Path) -> None:
    model = Model()
    before = keep_zeros(model)
    before.save(tmp_path / "masks.safetensors")
    with torch.no_grad():
        model.matrix[0, 0] = 0
    after = keep_zeros(model, tmp_path / "masks.safetensors")
    assert after.masks.keys() == before.masks.keys()
    assert all(after.masks[name].equal(mask) for name, mask in before.masks.items())
    assert not keep_zeros(model).masks["matrix"].equal(before.masks["matrix"])


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "masks.safetensors"
    keep_zeros(Model()).save(file)
    with pytest.raises(CheckpointError, match="matrix is no mask of 2 x 21 weights"):
        keep_zeros(Model(21), file)
    with pytest.raises(CheckpointError, match="matrix is no mask of 2 x 9 weights"):
        keep_zeros(Model(9), file)  # as many bytes, but bits after the last column
    with pytest.raises(CheckpointError, match="it has experts, matrix, which the model lacks"):
        keep_zeros(nn.Linear(3, 3), file)
    save_file({"matrix": torch.ones(2, 2)}, file)
    with pytest.raises(CheckpointError, match="matrix is no mask"):
        keep_zeros(Model(), file)
    file.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="truncated or corrupted"):
        keep_zeros(Model(), file)


def test_masks_of_trained_weights_are_refused(tmp_path: Path) -> None:
    keep_zeros(Model()).save(tmp_path / "masks.safetensors")
    model = Model()
    with torch.no_grad():
        model.matrix[0, 1] = 0.5
    with pytest.raises(RecoveryError, match="1 pruned weights are not zero, in matrix"):
        keep_zeros(model, tmp_path / "masks.safetensors")
