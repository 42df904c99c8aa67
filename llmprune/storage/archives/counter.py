"""Progress of reading or writing, counted in megabytes."""

from dataclasses import dataclass, field

from llmprune.progress import Progress, Watcher

_UNIT_BYTES = 1_000_000


@dataclass
class Counter:
    """Tells a watcher how many of all bytes are done.

    Attributes:
        stage: what is being done.
        total: all bytes.
        watch: told after each step.
        done: bytes so far.
    """

    stage: str
    total: int
    watch: Watcher
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._tell("")

    def add(self, count: int, step: str) -> None:
        """Count bytes of a file."""
        self.done += count
        self._tell(step)

    def _tell(self, step: str) -> None:
        units = max(1, self.total // _UNIT_BYTES)
        finished = units if self.done >= self.total else min(self.done // _UNIT_BYTES, units - 1)
        self.watch(Progress(self.stage, finished, units, step, unit="MB"))
