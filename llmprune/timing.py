"""Seconds by stage, with nested stages booked once."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stages:
    """A stopwatch that books time to the innermost open stage.

    Attributes:
        seconds: stage -> seconds, in the order in which the stages first ran.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
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

    def _book(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
