"""The identity of a checkpoint: what it notices, and that it stays what it is."""

from pathlib import Path

import pytest
import torch
from fake_hub import write_checkpoint
from safetensors.torch import save_file

from llmprune.errors import CheckpointError
from llmprune.storage.hub import checkpoint_digest


def write_digest_case(folder: Path, middle: float = 0.0) -> Path:
    """Bytes that depend on nothing but this function: 4 MiB so that the samples do not cover all."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    data = torch.arange(1 << 20, dtype=torch.float32)
    data[3 << 16] += middle
    save_file({"a": data[: 3 << 17], "b": data[3 << 17 :]}, folder / "model.safetensors")
    return folder


def test_digest_is_golden(tmp_path: Path) -> None:
    golden = "607a32bc299de87772aa58563a8c0cc1bd49cec72381b6d9c15866664b428277"
    assert checkpoint_digest(write_digest_case(tmp_path / "m")) == golden


def test_digest_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    digests = {checkpoint_digest(write_checkpoint(tmp_path / name, shards=2)) for name in "ab"}
    assert len(digests) == 1


@pytest.mark.parametrize("position", ["start", "middle", "end"])
def test_digest_sees_the_data(tmp_path: Path, position: str) -> None:
    before = checkpoint_digest(write_digest_case(tmp_path / "m"))
    path = tmp_path / "m" / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[{"start": header, "middle": (header + len(content)) // 2, "end": len(content) - 1}[position]] ^= 1
    path.write_bytes(content)
    assert checkpoint_digest(tmp_path / "m") != before


def test_digest_sees_the_first_byte_whatever_the_keys(tmp_path: Path) -> None:
    """Wide dtypes come first in a file, so that the first key's tensor may be the last."""
    digests = set()
    for value in (0, 1):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        wide = torch.zeros(1 << 20)
        wide[0] = value
        save_file({"a": torch.ones(4, dtype=torch.bfloat16), "b": wide}, folder / "model.safetensors")
        digests.add(checkpoint_digest(folder))
    assert len(digests) == 2


def test_digest_samples_every_tensor(tmp_path: Path) -> None:
    """A change in the middle of one tensor, far from the start, the middle and the end of the file."""
    first, second = write_digest_case(tmp_path / "m"), write_digest_case(tmp_path / "n", middle=1.0)
    assert checkpoint_digest(first) != checkpoint_digest(second)


def test_digest_sees_config_and_names(tmp_path: Path) -> None:
    digests = {checkpoint_digest(write_checkpoint(tmp_path / "m"))}
    (tmp_path / "m" / "config.json").write_text('{"model_type": "qwen3"}')
    digests.add(checkpoint_digest(tmp_path / "m"))
    save_file({"b": torch.arange(6.0)}, tmp_path / "m" / "model.safetensors")
    digests.add(checkpoint_digest(tmp_path / "m"))
    assert len(digests) == 3


@pytest.mark.parametrize("damage", ["empty", "cut header", "cut data", "longer", "no json"])
def test_digest_of_a_damaged_file(tmp_path: Path, damage: str) -> None:
    path = write_checkpoint(tmp_path / "m") / "model.safetensors"
    good = path.read_bytes()
    changes = {"empty": b"", "cut header": good[:20], "cut data": good[:-4], "longer": good + b"x"}
    path.write_bytes(changes.get(damage, good[:8] + b"[" + good[9:]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        checkpoint_digest(tmp_path / "m")
    assert "again" in caught.value.fix
