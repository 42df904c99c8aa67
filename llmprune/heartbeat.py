"""On several machines, notice that a process is gone which closes no connection: its machine is, or its torchrun.

On one machine, torchrun ends the others. Between machines, whoever waits in a collective sees that a connection was
closed, but not that a machine has lost its power, and whoever solves sees nothing. So each process counts aloud in
torchrun's store, and listens to the next one.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# How often a process counts, how long it may be silent, and how long one waits to learn that the run has just ended.
INTERVAL_SECONDS, SILENT_SECONDS, ENDING_SECONDS = 1.0, 20.0, 3.0

_LOST, _OVER = "lost", b"over"


class Heartbeat:
    """Counts for this process, and ends it once another one has failed or gone silent.

    Args:
        store: with `set`, `get` and `check`, as `torch.distributed` has them; used by one thread.
        rank: of this process.
        size: how many there are.
        end: called with what has happened.
    """

    def __init__(self, store: Any, rank: int, size: int, end: Callable[[str], None] | None = None) -> None:
        self._store, self._rank, self._next = store, rank, (rank + 1) % size
        self._end = end or _end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.finished = False

    def start(self) -> None:
        """Count from now on, until the process exits."""
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Count no more; unless the run is finished, the others end as well."""
        self._over.set()
        self._thread.join()
        try:
            if self.finished:
                self._store.set(_name(self._rank), _OVER)
            elif not self._store.check([_LOST]):
                self._store.set(_LOST, str(self._rank))
        except RuntimeError:
            pass  # whoever holds the store is gone as well

    def _run(self) -> None:
        count, heard, since = 0, b"", time.monotonic()
        while not self._over.wait(INTERVAL_SECONDS):
            count += 1
            try:
                if what := self._failed():
                    break
                self._store.set(_name(self._rank), str(count))
                now = self._store.get(_name(self._next)) if self._store.check([_name(self._next)]) else b""
                if now != heard:
                    heard, since = now, time.monotonic()
                elif heard != _OVER and time.monotonic() - since > SILENT_SECONDS:
                    self._store.set(_LOST, str(self._next))
            except RuntimeError:
                what = "the first machine cannot be reached any more"
                break
        else:
            return
        self._finish(what)

    def _failed(self) -> str:
        if not self._store.check([_LOST]):
            return ""
        return f"process {self._store.get(_LOST).decode()} of this run has ended or cannot be reached any more"

    def _finish(self, what: str) -> None:
        """Another process may have come to the end of the run a moment before this one."""
        waited = time.monotonic()
        while time.monotonic() - waited < ENDING_SECONDS:
            if self.finished or self._over.wait(INTERVAL_SECONDS / 10):
                return
        self._end(what)


def meet(store: Any, rank: int, size: int, seconds: float) -> list[int]:
    """Wait until all processes are there.

    Args:
        store: as for `Heartbeat`.
        rank: of this process.
        size: how many there are.
        seconds: how long to wait.

    Returns:
        Those that have not come.
    """
    store.set(f"here/{rank}", b"")
    began = time.monotonic()
    missing = list(range(size))
    while missing and time.monotonic() - began < seconds:
        missing = [other for other in missing if not store.check([f"here/{other}"])]
        time.sleep(INTERVAL_SECONDS / 10 if missing else 0)
    return missing


def _name(rank: int) -> str:
    return f"beat/{rank}"


def _end(what: str) -> None:
    """End this process; torchrun ends the others of its machine."""
    sys.stderr.write(f"Error: {what}; see the messages on the other machines, then continue with --resume\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGTERM)
