"""Processes on several machines that notice each other's end."""

import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from llmprune import heartbeat, torchrun
from llmprune.heartbeat import Heartbeat, meet


class Store:
    """What `torch.distributed` offers, in one process."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.gone = False

    def set(self, key: str, value: str | bytes) -> None:
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        self.content[key] = value if isinstance(value, bytes) else value.encode()

    def get(self, key: str) -> bytes:
        return self.content[key]

    def check(self, keys: list[str]) -> bool:
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        return all(key in self.content for key in keys)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("INTERVAL_SECONDS", 0.01), ("SILENT_SECONDS", 0.5), ("ENDING_SECONDS", 0.1)):
        monkeypatch.setattr(heartbeat, name, seconds)
    monkeypatch.setattr(heartbeat.atexit, "register", lambda function: function)


def started(store: Store, rank: int, size: int = 2) -> tuple[Heartbeat, list[str]]:
    told: list[str] = []
    beat = Heartbeat(store, rank, size, told.append)
    beat.start()
    return beat, told


def test_whoever_counts_is_left_alone() -> None:
    store = Store()
    beats = [started(store, rank, 3) for rank in range(3)]
    time.sleep(1.2)
    assert [told for _, told in beats] == [[], [], []]
    for beat, _ in beats:
        beat.finished = True
        beat.stop()
    assert [store.content[f"beat/{rank}"] for rank in range(3)] == [b"over"] * 3
    assert "lost" not in store.content


def test_silence_is_told_to_all_and_ends_them() -> None:
    store = Store()
    first, told = started(store, 0, 3)
    other, heard = started(store, 1, 3)  # and nobody at place 2
    first._thread.join(5)
    other._thread.join(5)
    assert told == heard == ["process 2 of this run has ended or cannot be reached any more"]


def test_a_process_that_fails_ends_the_others() -> None:
    store = Store()
    first, _ = started(store, 0)
    other, heard = started(store, 1)
    first.stop()
    other._thread.join(5)
    assert heard == ["process 0 of this run has ended or cannot be reached any more"]


def test_the_end_of_the_run_is_no_failure() -> None:
    store = Store()
    first, told = started(store, 0)
    other, heard = started(store, 1)
    first.finished = True
    first.stop()
    time.sleep(0.8)
    assert other._thread.is_alive()
    store.gone = True
    other.finished = True
    other._thread.join(5)
    other.stop()
    assert (told, heard) == ([], [])


def test_without_the_first_machine_the_others_end() -> None:
    store = Store()
    _, heard = started(store, 1)
    other = Heartbeat(store, 0, 2, heard.append)
    store.gone = True
    other.start()
    other._thread.join(5)
    assert "the first machine cannot be reached any more" in heard


def test_who_does_not_come_is_named() -> None:
    store = Store()
    store.set("here/2", b"")
    assert meet(store, 0, 4, seconds=0.1) == [1, 3]
    for rank in (1, 3):
        store.set(f"here/{rank}", b"")
    assert meet(store, 0, 4, seconds=60) == []


@pytest.mark.parametrize(("here", "several"), [("4", False), ("2", True)])
def test_machines(monkeypatch: pytest.MonkeyPatch, here: str, several: bool) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert torchrun.on_several_machines() == several


WORKER = """
import os, pathlib, sys, time
from llmprune import heartbeat, ranks
heartbeat.INTERVAL_SECONDS, heartbeat.SILENT_SECONDS, heartbeat.ENDING_SECONDS = 0.1, 3.0, 0.5
found = ranks.join("cpu")
place = pathlib.Path(sys.argv[1], str(found.rank))
place.with_suffix(".new").write_text(str(os.getpid()))
place.with_suffix(".new").rename(place)
time.sleep(100)
"""


@pytest.mark.slow
def test_a_machine_that_stands_still_ends_the_run(tmp_path: Path) -> None:
    """Two launchers stand for two machines; one of them is stopped, and closes no connection."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    with ExitStack() as machines:
        for rank in range(2):
            log = machines.enter_context((tmp_path / f"{rank}.log").open("w"))
            words = [*launch, *meeting, "--node-rank", str(rank), str(script), str(tmp_path)]
            machine = machines.enter_context(subprocess.Popen(words, stderr=log))
            machines.callback(machine.kill)
        workers = [psutil.Process(_appears(tmp_path / str(rank))) for rank in range(2)]
        machines.callback(workers[1].kill)
        workers[1].suspend()
        workers[0].wait(timeout=30)  # which its launcher reaps
    assert "process 1 of this run has ended or cannot be reached any more" in (tmp_path / "0.log").read_text()


def _appears(file: Path) -> int:
    """The process whose number is written into a file."""
    began = time.monotonic()
    while not file.exists():
        assert time.monotonic() - began < 120, "the processes do not meet"
        time.sleep(0.1)
    return int(file.read_text())
