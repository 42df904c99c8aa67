"""Choose a run's device, measure its speed and a code block's peak memory, and return freed memory to the system."""

import ctypes
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import psutil
import torch

from llmprune.errors import DeviceError
from llmprune.kernels.configurations import processor_name
from llmprune.units import quantity

# How long a rate is measured.
_RATE_SECONDS = 0.08

# glibc's numbers of its options: what at the end of the heap goes back to the system, from which size on a block gets
# pages of its own, and how many of these there may be.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4

# With a smaller size, the system would clear pages for every small activation. The others are glibc's defaults.
_MAPPED_BYTES, _TRIMMED_BYTES, _MAPPED_BLOCKS = 256 << 10, 128 << 10, 65536

# What a CPU's description ends in.
_THREADS = re.compile(r", \d+ threads?$")

# How most of PyTorch reports a lack of memory, as plain RuntimeErrors: its CPU allocator, and the CUDA libraries.
_PHRASES = ("can't allocate memory", "out of memory", "_ALLOC_FAILED")


def resolve_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:1" into a device that exists.

    Raises:
        DeviceError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device {name!r}", expected="auto, cpu, cuda, or one GPU such as cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        built = "" if torch.version.cuda else " (the installed PyTorch is a CPU build)"
        raise DeviceError(
            f"device {name!r}: {torch.cuda.device_count()} CUDA devices are visible{built}",
            expected="a device that this machine has",
            fix="set device: auto or cpu, or install a CUDA build of PyTorch",
        )
    return device


def describe_device(device: torch.device) -> str:
    """Name the device, with whatever affects the last bit of a result: a CPU's vector instructions and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU ({instructions}), {cpu_threads()}"


def same_but_threads(one: str, other: str) -> bool:
    """Whether two devices, as `describe_device` names them, differ by nothing but the number of threads."""
    return _THREADS.sub("", one) == _THREADS.sub("", other)


def describe_host(device: torch.device) -> dict[str, Any]:
    """The machine of a run, without its name: processor, memory in bytes, system, versions; the GPU if it is used."""
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)} if device.type == "cuda" else {}
    return {
        **gpu,
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def cpu_threads() -> str:
    """How many threads torch uses, in words."""
    return quantity(torch.get_num_threads(), "thread")


def free_bytes(device: torch.device) -> int:
    """Free memory in bytes, of the GPU or of this machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def runs_per_second(work: Callable[[], object], device: torch.device) -> float:
    """Measure how many times a second a device completes some work, after one warm-up run."""
    work()
    _wait(device)
    runs, start = 0, time.perf_counter()
    while runs == 0 or time.perf_counter() - start < _RATE_SECONDS:
        work()
        _wait(device)
        runs += 1
    return runs / (time.perf_counter() - start)


def map_large_blocks() -> None:
    """Have the C library give every large block pages of its own; does nothing where it is not glibc.

    Freed, such a block goes back to the system at once. Left to itself, glibc raises the size from which it does that
    to 32 MB, and the peak of a run over small layers is several times what is in use.
    """
    _set_heap({_M_MMAP_THRESHOLD: _MAPPED_BYTES})


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have the C library keep what is freed for the blocks that are allocated next; does nothing where it is not glibc.

    Every step of training allocates what the one before has freed. Pages that went back to the system in between have
    to be cleared each time: a sixth of the time of a training on a CPU, a third after `map_large_blocks`, as whose
    heap it is left afterwards.
    """
    _set_heap({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})
    try:
        yield
    finally:
        _set_heap({_M_MMAP_MAX: _MAPPED_BLOCKS, _M_TRIM_THRESHOLD: _TRIMMED_BYTES, _M_MMAP_THRESHOLD: _MAPPED_BYTES})
        return_freed_memory()


def _set_heap(options: Mapping[int, int]) -> None:
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            for option, value in options.items():
                mallopt(option, value)


def return_freed_memory() -> None:
    """Hand freed heap memory back to the system; does nothing where the C library is not glibc.

    glibc keeps freed blocks below 32 MB for reuse. Activations and workspaces of that size vary in length, so that
    several hundred megabytes would stay unused in its free lists.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakWatch:
    """Measures a code block's peak memory: allocated on the CUDA device, or resident in this process and its own.

    Pages of files, such as the code of libraries and mapped checkpoints, are not the process's own: the system takes
    them back as it needs them. They are part of the resident set size.

    Attributes:
        baseline: bytes when the block began.
        peak: highest bytes seen so far.
        resident: highest resident set size of the process so far, of which all of this is a part on a CPU.
    """

    _INTERVAL_SECONDS = 0.02

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._stop = threading.Event()
        self.baseline = self.peak = self.resident = 0

    def __enter__(self) -> "PeakWatch":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self.baseline = self.peak = self._now()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.read()

    def read(self) -> int:
        """The peak so far, in bytes."""
        self.peak = max(self.peak, self._now())
        return self.peak

    def _sample(self) -> None:
        while not self._stop.wait(self._INTERVAL_SECONDS):
            self.read()

    def _now(self) -> int:
        memory = self._process.memory_info()
        self.resident = max(self.resident, int(memory.rss))
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        # Only Linux says how much of it belongs to files.
        return int(memory.rss) - int(getattr(memory, "shared", 0))


def warm_up(dtype: torch.dtype) -> None:
    """Make small products on the CPU, so that the libraries have what they allocate at their first ones."""
    with torch.no_grad():
        for kind in {dtype, torch.float32}:
            torch.nn.functional.linear(torch.ones(64, 64, dtype=kind), torch.ones(64, 64, dtype=kind))
        factor = torch.linalg.cholesky(torch.eye(64))
        torch.cholesky_inverse(factor)
    return_freed_memory()


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)
