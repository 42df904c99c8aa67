"""Names of devices."""

import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmprune.devices import PeakWatch, describe_device, resolve_device
from llmprune.errors import DeviceError


@pytest.mark.parametrize(("count", "said"), [(1, "1 thread"), (2, "2 threads")])
def test_a_cpu_says_its_threads(monkeypatch: pytest.MonkeyPatch, count: int, said: str) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    assert describe_device(torch.device("cpu")).endswith(f", {said}")


def test_auto_is_what_there_is() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["nonsense", "cuda:x", "", f"cuda:{torch.cuda.device_count()}"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match=f"device {name!r}"):
        resolve_device(name)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which resident pages belong to files")
def test_the_peak_leaves_out_pages_of_files_and_the_resident_size_does_not(tmp_path: Path) -> None:
    file, size = tmp_path / "weights", 64 << 20
    file.write_bytes(bytes(size))
    with PeakWatch(torch.device("cpu")) as watch:
        before = watch.resident
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            # Every page is touched.
            assert sum(mapped[::4096]) == 0
            watch.read()
    assert watch.resident - before > size // 2
    assert watch.peak - watch.baseline < size // 4
    with PeakWatch(torch.device("cpu")) as watch:
        kept = torch.ones(size, dtype=torch.uint8)
        watch.read()
    assert kept.nbytes == size
    assert watch.peak - watch.baseline > size // 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_what_a_step_frees_is_kept_for_the_next_one_and_no_longer() -> None:
    """In own memory, as not every system counts page faults."""
    program = """
import torch, psutil
from llmprune.devices import freed_memory_kept, map_large_blocks
map_large_blocks()
own = lambda: (lambda m: m.rss - m.shared)(psutil.Process().memory_info())
def step(large):
    return [torch.ones(size, dtype=torch.uint8) for size in (large << 20, 64 << 10)][1]
small = step(80)
base = own()
with freed_memory_kept():
    small = step(80)
    print(own() - base)
print(own() - base)
# Too large for what the heap has left, below a small block that stays: in the heap it would be held.
small = step(240)
print(own() - base)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    within, afterwards, later = (int(line) >> 20 for line in finished.stdout.splitlines())
    assert within > 60
    assert afterwards < 30
    assert later < 30


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_large_blocks_get_pages_of_their_own(tmp_path: Path) -> None:
    """Blocks of 8 MB, freed between others that stay: without the option they would stay in the heap."""
    program = """
import torch, psutil
from llmprune.devices import map_large_blocks
map_large_blocks()
kept, size = [], 8 << 20
own = lambda: (lambda m: m.rss - m.shared)(psutil.Process().memory_info())
freed = torch.ones(3 * size, dtype=torch.uint8)
del freed  # from now on, glibc would take blocks of this size from its heap
before = own()
blocks = []
for number in range(8):
    blocks.append(torch.ones(size, dtype=torch.uint8))
    kept.append(torch.ones(256 << 10, dtype=torch.uint8))
del blocks
print(own() - before)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(finished.stdout) < 16 << 20
