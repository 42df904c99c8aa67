"""How long a call takes: medians of calls in turn, on a GPU by replays of one graph."""

import pytest
import torch

from llmprune import timing
from llmprune.timing import Effort, Stages, Timing, time_calls

CPU = torch.device("cpu")


def test_a_timing_is_the_median_and_its_spread() -> None:
    found = Timing.of([float(value) for value in [5, 1, 3, 2, 4, 6, 7, 8, 9, 10, 100]])
    assert (found.median, found.low, found.high, found.repeats) == (6, 2, 10, 11)
    assert found.to_dict()["median_us"] == 6e6


def test_calls_take_turns_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    found = time_calls([lambda n=number: made.append(n) for number in range(3)], CPU, 15.0)
    assert made[1:] == [index % 3 for index in range(len(made) - 1)]
    assert (found.median, found.repeats) == (1.0, len(made) - 1)
    assert 4 <= found.repeats <= 6


def test_what_is_slow_runs_three_times() -> None:
    assert time_calls([lambda: None], CPU, 0.0).repeats == 3


def test_copies_are_larger_than_the_cache_together() -> None:
    assert Effort(rotated_bytes=1000).copies(300, CPU) == 4
    assert Effort(rotated_bytes=1000).copies(1, CPU) == 256
    assert Effort(rotated_bytes=1000).copies(5000, CPU) == 1
    assert timing.rotated_bytes(CPU) >= 150 << 20


class FakeGPU:
    """Stands in for torch.cuda: a graph runs its calls again, and each call takes two milliseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.captured, self.recording = 0.0, 0, False
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, other: "Event") -> float:
                return other.at - self.at

        class Graph:
            def replay(self) -> None:
                gpu.now += 2.0 * gpu.captured

        class Capture:
            def __init__(self, graph: Graph) -> None:
                pass

            def __enter__(self) -> None:
                gpu.recording, gpu.captured = True, 0

            def __exit__(self, *_: object) -> None:
                gpu.recording = False

        class Device:
            def __init__(self, device: torch.device) -> None:
                pass

            def __enter__(self) -> None: ...

            def __exit__(self, *_: object) -> None: ...

        for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": Capture, "device": Device}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def call(self) -> None:
        if self.recording:
            self.captured += 1
        else:
            # Launched by itself, it takes longer.
            self.now += 5.0


def test_a_gpu_is_timed_by_replays_of_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    found = time_calls([gpu.call] * 3, torch.device("cuda"), 1.0)
    assert gpu.captured == 12
    assert found.median == pytest.approx(2e-3)
    assert found.repeats == int(1.0 / 24e-3)
    assert time_calls([gpu.call] * 3, torch.device("cuda"), 1.0, captured=False).median == pytest.approx(5e-3)


def test_a_stopwatch_goes_on_from_what_was_spent_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    stages = Stages()
    with stages("train"):
        now[0] += 3
        assert stages.spent() == {"total": 3, "train": 3}  # while the stage is open
    again = Stages()
    with again("train"):
        again.go_on({"total": 5, "text": 1, "train": 3})
        now[0] += 2
    assert again.spent() == {"total": 7, "train": 5, "text": 1}
