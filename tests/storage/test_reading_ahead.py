"""Layers are read into the system's cache before they are needed."""

import ctypes
import mmap
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_models import build, save

from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.storage.files import Stored
from llmprune.storage.reading_ahead import _merged, read_ahead

needs_advice = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice about files")


def stored(file: Path, *spans: tuple[int, int]) -> list[Stored]:
    return [Stored(f"t{start}", file, (end - start,), torch.uint8, (start, end)) for start, end in spans]


def cached_pages(file: Path) -> list[bool]:
    """Which pages of a file are in the system's cache."""
    size = file.stat().st_size
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), size, flags=mmap.MAP_PRIVATE) as mapped:
        found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), found) == 0
        return [bool(page & 1) for page in found]


def test_spans_that_are_close_are_read_as_one() -> None:
    file, other = Path("one"), Path("other")
    tensors = [*stored(file, (10, 20), (20, 30), (5 << 20, 6 << 20)), *stored(other, (0, 4))]
    assert _merged(reversed(tensors)) == {file: [(10, 30), (5 << 20, 6 << 20)], other: [(0, 4)]}


@needs_advice
def test_what_is_asked_for_is_in_the_cache_soon() -> None:
    # Not in tmp_path, which may lie in memory; the sources lie on a disk.
    file = Path(__file__).with_name(f"read-ahead-{os.getpid()}.bin")
    try:
        file.write_bytes(os.urandom(8 << 20))
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if any(cached_pages(file)):
            pytest.skip("this file system keeps files in memory")
        read_ahead(stored(file, (4 << 20, 6 << 20)))
        first, end = (4 << 20) // mmap.PAGESIZE, (6 << 20) // mmap.PAGESIZE
        deadline = time.monotonic() + 20
        while not all(cached_pages(file)[first:end]) and time.monotonic() < deadline:
            time.sleep(0.01)
        pages = cached_pages(file)
        assert all(pages[first:end])
        assert not any(pages[: first // 2])
    finally:
        file.unlink()


@needs_advice
def test_files_that_are_gone_are_left_to_who_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    read_ahead(stored(tmp_path / "none", (0, 10)))
    read_ahead([])
    for thread in threading.enumerate():
        if thread.name == "llmprune-read-ahead":
            thread.join(20)
    assert not failed


@needs_advice
def test_loading_a_layer_asks_for_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = CheckpointSource(save(build("llama", num_hidden_layers=3), tmp_path / "model"))
    asked: list[set[str]] = []
    monkeypatch.setattr(
        "llmprune.models.checkpoint_source.read_ahead", lambda tensors: asked.append({one.key for one in tensors})
    )
    for index in range(3):
        source.load_layer(index, torch.device("cpu"))
        source.free_layer(index)
    assert asked == [set(source.layer_keys(1)), set(source.layer_keys(2))]
