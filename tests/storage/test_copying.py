"""Tensors copied from file to file."""

from pathlib import Path

import pytest
import torch
from folders import same
from safetensors.torch import load_file, save_file

from llmprune.errors import CheckpointError
from llmprune.storage import copying
from llmprune.storage.copying import copy_tensors, in_shards
from llmprune.storage.files import file_digest, read_header


def test_copies_are_bit_for_bit_and_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_CHUNK_BYTES", 7)  # no multiple of any element
    tensors = {
        "odd": torch.tensor([1, 0, 1], dtype=torch.bool), "a": torch.randn(3, 5).bfloat16(), "z": torch.randn(4, 2),
        "eight": torch.randn(9).to(torch.float8_e4m3fn), "zero": torch.tensor([-0.0, float("nan")]),
        "scalar": torch.tensor(7), "empty": torch.empty(0, 4), "wide": torch.randn(2).double(),
    }  # fmt: skip
    save_file(tensors, tmp_path / "source.safetensors")
    chosen = [stored for stored in read_header(tmp_path / "source.safetensors") if stored.key != "z"]
    digest = copy_tensors(tmp_path / "copy.safetensors", chosen)
    assert digest == file_digest(tmp_path / "copy.safetensors")
    copied = load_file(tmp_path / "copy.safetensors")
    assert copied.keys() == tensors.keys() - {"z"}
    assert all(same(copied[key], tensors[key]) for key in copied)
    assert all(stored.span[0] % stored.dtype.itemsize == 0 for stored in read_header(tmp_path / "copy.safetensors"))


def test_a_source_that_ends_too_early_leaves_nothing(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "source.safetensors")
    stored = read_header(tmp_path / "source.safetensors")
    with (tmp_path / "source.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(CheckpointError, match=r"truncated or corrupted: it ends before the values of 'a'"):
        copy_tensors(tmp_path / "copy.safetensors", stored)
    assert [file.name for file in tmp_path.iterdir()] == ["source.safetensors"]


def test_shards_hold_no_more_than_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_SHARD_BYTES", 100)
    save_file({str(number): torch.ones(size) for number, size in enumerate([10, 10, 30, 20, 5])}, tmp_path / "m")
    shards = in_shards(read_header(tmp_path / "m"))
    assert [[stored.key for stored in shard] for shard in shards] == [["0", "1"], ["2"], ["3", "4"]]
    assert in_shards([]) == []
