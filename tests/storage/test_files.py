"""Safetensors read lazily, and files that are either complete or absent."""

import errno
import hashlib
import json
import os
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from command_line import run
from folders import contents, same
from report_rows import row
from safetensors.torch import load_file, save_file
from tiny_models import build, save

from llmprune import pages
from llmprune.errors import CheckpointError
from llmprune.measuring.bench import bench
from llmprune.pages import report_page
from llmprune.storage import files
from llmprune.storage.files import (
    DTYPES,
    INDEX_NAME,
    file_digest,
    header_bytes,
    read_header,
    read_index,
    weight_files,
    write_json,
    write_shard,
    write_text,
)
from llmprune.storage.report import Report


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let every write beyond this size fail, as on a full disk but with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def sharded(folder: Path) -> Path:
    """Two shards, an index, and a tensor that the index does not name."""
    save_file({"a": torch.arange(6.0).view(2, 3), "unnamed": torch.ones(1)}, folder / "one.safetensors")
    save_file({"b": torch.ones(4, dtype=torch.bfloat16)}, folder / "two.safetensors")
    weight_map = {"b": "two.safetensors", "a": "one.safetensors"}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5).mul(9).to(dtype)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    stored = read_index(tmp_path)["x"]
    assert (stored.shape, stored.dtype, stored.nbytes) == ((3, 5), dtype, tensor.nbytes)
    assert DTYPES[stored.get_dtype()] == dtype
    assert same(stored[...], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(7, 5), (35,), (0, 3), ()])
def test_a_tensor_is_read_as_another_dtype_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(files, "_READ_ELEMENTS", 8)
    tensor = torch.randn(shape).to(dtype)
    save_file({"before": torch.ones(3), "x": tensor}, tmp_path / "model.safetensors")
    assert same(read_index(tmp_path)["x"].read(torch.float32), tensor.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_that_was_cut_since_is_refused_whatever_it_is_read_as(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(1000, dtype=torch.bfloat16)}, file)
    stored = read_index(tmp_path)["x"]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="ends before the values of 'x'"):
        stored.read(dtype)


def test_a_read_tensor_is_independent_of_the_file(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "model.safetensors")
    before = contents(tmp_path)
    stored = read_index(tmp_path)["x"]
    stored[...].fill_(1)
    assert not stored[...].any()
    assert contents(tmp_path) == before


def test_a_read_tensor_is_aligned_wherever_it_lies(tmp_path: Path) -> None:
    """Vector instructions give other last bits on misaligned memory, so a resumed run would differ."""
    save_file(
        {f"{size:03}": torch.ones(size, dtype=torch.uint8) for size in range(1, 40)}, tmp_path / "model.safetensors"
    )
    assert all(stored[...].data_ptr() % 16 == 0 for stored in read_index(tmp_path).values())


def test_a_file_that_changed_since_its_header_was_read_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    stored = read_index(tmp_path)
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 4)
    assert torch.equal(stored["a"][...], torch.ones(3))
    with pytest.raises(CheckpointError, match=r"truncated or corrupted: it ends before the values of 'b'"):
        stored["b"][...]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        stored["a"][...]


def test_no_file_is_mapped_to_read_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped pages would stand in memory beside their copy: twice the size of a large embedding."""
    save_file({"x": torch.arange(3.0)}, tmp_path / "model.safetensors")
    stored = read_index(tmp_path)["x"]
    monkeypatch.setattr(files, "safe_open", None)
    assert stored[...].tolist() == [0, 1, 2]


def test_a_file_larger_than_the_memory_is_listed(tmp_path: Path) -> None:
    size = 2 * (psutil.virtual_memory().total + psutil.swap_memory().total)
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(tmp_path / "model.safetensors", 8 + len(header) + size)  # it takes no space
    (found,) = read_header(tmp_path / "model.safetensors")
    assert (found.key, found.shape) == ("w", (size,))


def test_the_index_says_which_tensors_there_are(tmp_path: Path) -> None:
    stored = read_index(sharded(tmp_path))
    assert list(stored) == ["b", "a"]
    assert stored["a"].file == tmp_path / "one.safetensors"


def test_a_single_file_comes_before_the_index(tmp_path: Path) -> None:
    save_file({"single": torch.ones(1)}, sharded(tmp_path) / "model.safetensors")
    assert list(read_index(tmp_path)) == ["single"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "two.safetensors").unlink(), r"names files that do not exist \(1 of 2\): two.safe"),
        (lambda folder: os.truncate(folder / "two.safetensors", 40), "two.safetensors is truncated"),
        (lambda folder: (folder / "two.safetensors").write_bytes(b"x" * 99), "two.safetensors is truncated"),
        (lambda folder: save_file({"c": torch.ones(1)}, folder / "two.safetensors"), "two.safetensors lacks 'b'"),
        (lambda folder: (folder / INDEX_NAME).write_text("{"), f"{INDEX_NAME} cannot be read"),
        (
            lambda folder: (folder / INDEX_NAME).write_text("[]"),
            f"{INDEX_NAME} cannot be read: input should be an object",
        ),
        (
            lambda folder: (folder / INDEX_NAME).write_text('{"weight_map": {"a": 1}}'),
            f"{INDEX_NAME} cannot be read: weight_map.a: input should be a valid string, not 1",
        ),
        (
            lambda folder: (folder / INDEX_NAME).write_text("{}"),
            f"{INDEX_NAME} cannot be read: weight_map: field required",
        ),
        (lambda folder: (folder / INDEX_NAME).unlink(), "neither model.safetensors nor .*, only one.safetensors, two"),
        (
            lambda folder: (folder / "one.safetensors").rename(folder / "a.bin"),
            r"names files that do not exist \(1 of 2\)",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    damage(sharded(tmp_path))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_index(tmp_path)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "two.bin"])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    for read in (read_index, weight_files):
        with pytest.raises(CheckpointError, match="names of safetensors files in the same folder"):
            read(folder)


def test_a_header_says_where_the_values_are(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(5, dtype=torch.bfloat16), "empty": torch.ones(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    content, stored = (tmp_path / "x.safetensors").read_bytes(), read_header(tmp_path / "x.safetensors")
    assert [tensor.key for tensor in stored] == ["a", "b", "empty"]
    for tensor in stored:
        start, end = tensor.span
        assert content[start:end] == tensors[tensor.key].contiguous().view(torch.uint8).numpy().tobytes()
    header = header_bytes(tmp_path / "x.safetensors")
    assert content.startswith(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=r"gone\.safetensors does not exist"):
        read_header(tmp_path / "gone.safetensors")


def test_a_dtype_that_torch_cannot_hold_exactly_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "U16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    with pytest.raises(CheckpointError, match="'x' has dtype U16"):
        read_header(tmp_path / "model.safetensors")


def test_a_shard_is_public_hashed_and_stock(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensor = torch.randn(6, 4)
    digest = write_shard(file, {"transposed": tensor.T, "part": tensor[:, 1]})
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest() == file_digest(file)
    assert file.stat().st_mode & 0o777 == 0o644
    read = load_file(file)
    assert torch.equal(read["transposed"], tensor.T)
    assert torch.equal(read["part"], tensor[:, 1])
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_files_are_flushed_before_they_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    replace = Path.replace

    def note_flush(handle: int) -> None:
        calls.append(next(file for file in tmp_path.iterdir() if file.stat().st_ino == os.fstat(handle).st_ino))

    def note_replace(file: Path, target: Path) -> Path:
        calls.append((file, target))
        return replace(file, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_shard(tmp_path / "x.safetensors", {"x": torch.ones(1)})
    write_text(tmp_path / "x.txt", "x")
    temporary = [tmp_path / ".x.safetensors.partial", tmp_path / ".x.txt.partial"]
    final = [tmp_path / "x.safetensors", tmp_path / "x.txt"]
    assert calls == [temporary[0], (temporary[0], final[0]), temporary[1], (temporary[1], final[1])]


def test_a_shard_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    with largest_file(10_000), pytest.raises(CheckpointError, match="cannot write") as caught:
        write_shard(tmp_path / "x.safetensors", {"x": torch.ones(100, 100)})
    assert "--resume" in caught.value.fix
    assert contents(tmp_path) == {}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "x.safetensors", {"x": torch.ones(3)})
    write_text(tmp_path / "x.json", "old\n")
    before = contents(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_shard(tmp_path / "x.safetensors", {"x": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_text(tmp_path / "x.json", "new\n")
    assert contents(tmp_path) == before


def test_a_folder_that_went_away_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        write_shard(tmp_path / "gone" / "x.safetensors", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="cannot write"):
        write_text(tmp_path / "gone" / "x.txt", "x")


def test_json_is_indented_ends_in_a_newline_and_holds_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1]})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(contents(tmp_path)) == ["x.json"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.require_writable(tmp_path / "new" / "x.json")
    (tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "file" / "x.json"):
        with pytest.raises(CheckpointError, match="cannot write"):
            files.require_writable(place)
    # Tests may run as root, whom no mode stops.
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="is not a writable folder"):
        files.require_writable(tmp_path / "x.json")
    assert {file.name for file in tmp_path.iterdir()} == {"file"}


@pytest.mark.parametrize("command", ["bench", "report", "compare"])
def test_results_that_could_not_be_kept_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    folder = save(build("llama"), tmp_path / "model")
    Report((row(),), {}).save(folder)
    monkeypatch.setattr(files.os, "access", lambda path, mode: not mode & os.W_OK)
    for module, work in ((bench, "bench"), (report_page, "report_page"), (pages, "compare")):
        monkeypatch.setattr(module, work, None)
    options = {"bench": [], "report": ["--no-open"], "compare": ["--html", tmp_path / "page.html"]}[command]
    result = run(command, folder, *options)
    assert result.exit_code == 1
    assert "is not a writable folder" in " ".join(result.stderr.split())


def test_a_sample_of_a_tensor_is_evenly_spaced(tmp_path: Path) -> None:
    save_file({"few": torch.arange(24.0).view(4, 6), "many": torch.arange(1000.0).view(10, 100)}, tmp_path / "x")
    few, many = read_header(tmp_path / "x")
    assert few.sample(3, 4).tolist() == list(range(24))
    assert many.sample(3, 4).tolist() == [0, 1, 2, 3, 498, 499, 500, 501, 996, 997, 998, 999]
