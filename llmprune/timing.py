"""Timing: of a run by stage, and of single calls, measured the same way for everything that is compared.

In a model each weight is read once per token, so it comes from memory. A benchmark that multiplies by the same matrix
again and again measures the cache instead. Here the calls differ only in the copy of the weights that they read, and
they rotate through the copies, which together exceed the last-level cache. On a GPU one CUDA graph holds all calls, so
that launches cost what they do in a captured model.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]
_LEAST_ROTATED, _MOST_ROTATED = 150 << 20, 1 << 30
_MOST_COPIES = 256
_GRAPH_CALLS = 10
_REPEATS = (5, 200)
_WARM_UP_SECONDS = 0.1
_CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


class Stages:
    """A stopwatch that books time to the innermost open stage.

    Attributes:
        seconds: stage -> seconds, in the order in which the stages first ran.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._begun = time.perf_counter()
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Book the time until the block ends to `stage`; the enclosing stage pauses."""
        self._book()
        self._open.append(stage)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def spent(self) -> dict[str, float]:
        """Seconds until now: in "total", and in each stage, open ones included."""
        self._book()
        return {"total": time.perf_counter() - self._begun, **self.seconds}

    def go_on(self, before: Mapping[str, float]) -> None:
        """Count on from what an interrupted run had spent, as its `spent` said."""
        for stage, seconds in before.items():
            if stage == "total":
                self._begun -= seconds
            else:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def _book(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


@dataclass(frozen=True, slots=True)
class Effort:
    """How much time and memory to spend on one measurement.

    Attributes:
        seconds: minimum duration of all repetitions; at least three are made.
        rotated_bytes: total size of a weight's copies; None: enough to exceed the last-level cache.
    """

    seconds: float = 0.25
    rotated_bytes: int | None = None

    def copies(self, nbytes: int, device: torch.device) -> int:
        """How many copies of a weight of this size to rotate through."""
        wanted = rotated_bytes(device) if self.rotated_bytes is None else self.rotated_bytes
        return max(1, min(_MOST_COPIES, -(-wanted // max(nbytes, 1))))


@dataclass(frozen=True, slots=True)
class Timing:
    """The distribution of the time that one call takes.

    Attributes:
        median: seconds.
        low: seconds, 10th percentile.
        high: seconds, 90th percentile.
        repeats: number of measurements.
    """

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Summarise measurements."""
        ranked = sorted(seconds)
        low, median, high = (ranked[round(share * (len(ranked) - 1))] for share in (0.1, 0.5, 0.9))
        return cls(median, low, high, len(ranked))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, in microseconds."""
        named = {"median_us": self.median, "low_us": self.low, "high_us": self.high}
        return {**{name: round(1e6 * value, 3) for name, value in named.items()}, "repeats": self.repeats}


def rotated_bytes(device: torch.device) -> int:
    """How many bytes of weights exceed the last-level cache, with a margin; at most 1 GiB."""
    if device.type == "cuda":
        # Evict-first loads leave older lines in the cache, which would still serve part of a few times its size.
        return _MOST_ROTATED
    return min(max(_LEAST_ROTATED, _last_cache() * 5 // 4), _MOST_ROTATED)


@torch.inference_mode()
def time_calls(calls: Sequence[Call], device: torch.device, seconds: float, *, captured: bool = True) -> Timing:
    """Time one of several calls that do the same work.

    Args:
        calls: made in rotation.
        device: where they compute.
        seconds: minimum duration of all repetitions.
        captured: on a GPU, put them into a CUDA graph; False if something in them cannot be captured: they are then
            launched one after another, and a call shorter than its launch appears as long as the launch.
    """
    if device.type == "cuda":
        return _time_on_gpu(calls, device, seconds, captured)
    calls[0]()
    return _time_on_cpu(calls, seconds)


def _time_on_cpu(calls: Sequence[Call], seconds: float) -> Timing:
    measured: list[float] = []
    started = time.perf_counter()
    while len(measured) < 3 or time.perf_counter() - started < seconds:
        call = calls[len(measured) % len(calls)]
        before = time.perf_counter()
        call()
        measured.append(time.perf_counter() - before)
    return Timing.of(measured)


def _time_on_gpu(calls: Sequence[Call], device: torch.device, seconds: float, captured: bool) -> Timing:
    rounds = -(-_GRAPH_CALLS // len(calls))
    with torch.cuda.device(device):
        for call in calls:
            call()
        torch.cuda.synchronize()
        replay = capture(calls, rounds) if captured else lambda: _make(calls, rounds)
        # The first replay uploads the graph; then the clocks rise, which takes longer than a short matmul.
        replay()
        estimate, warm = _elapsed(replay, 1)[0], time.perf_counter() + _WARM_UP_SECONDS
        while time.perf_counter() < warm:
            estimate = _elapsed(replay, 1)[0]
        repeats = max(_REPEATS[0], min(_REPEATS[1], int(seconds / max(estimate, 1e-6))))
        return Timing.of([elapsed / (rounds * len(calls)) for elapsed in _elapsed(replay, repeats)])


def capture(calls: Sequence[Call], rounds: int = 1) -> Call:
    """Capture calls, which must have run before, in a CUDA graph; returns its replay function."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _make(calls, rounds)
    return graph.replay


def _make(calls: Sequence[Call], rounds: int) -> None:
    for _ in range(rounds):
        for call in calls:
            call()


def _elapsed(replay: Call, repeats: int) -> list[float]:
    """Seconds of each replay, by the device's own clock."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in marks:
        before.record()
        replay()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in marks]


def _last_cache() -> int:
    """Bytes of the last-level cache; 0 if the system does not report it."""
    try:
        text = _CACHE_SIZE.read_text(encoding="ascii").strip()
    except OSError:
        return 0
    return int(text.removesuffix("K")) * 1024 if text.endswith("K") else 0
