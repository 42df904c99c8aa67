"""Progress events of a long run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of a run.

    Attributes:
        stage: what is being done to one layer after another: "dense perplexity", "pruning", "pruned perplexity"; or a
            step without layers such as "calibration text".
        layer: layers finished in this stage.
        layers: layers in total; 0 for a step without layers.
        step: what is being done to the current layer.
        mean_error: running mean of the relative output error of the matrices pruned so far; None before the first.
        unit: what is counted if not layers: "matrix", "file".
        shares: with one of a run's first steps: stage -> how long it will take, in a unit of its own, in the order of
            the stages; None: nothing new is known about that.
    """

    stage: str
    layer: int = 0
    layers: int = 0
    step: str = ""
    mean_error: float | None = None
    unit: str = "layer"
    shares: Mapping[str, float] | None = None

    @property
    def fraction(self) -> float:
        """How much of the stage is done, in [0, 1]; 0 for a step without layers."""
        return self.layer / self.layers if self.layers else 0.0


Watcher = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Discard progress events."""


def counted(watch: Watcher, stage: str, items: Sequence[T], unit: str) -> Iterator[T]:
    """Tell before each item how many are done."""
    for number, item in enumerate(items):
        watch(Progress(stage, number, len(items), unit=unit))
        yield item
