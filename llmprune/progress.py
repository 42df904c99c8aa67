"""What a long run tells whoever watches it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of a run.

    Attributes:
        stage: what is being done to all layers in turn: "dense perplexity", "pruning", "pruned perplexity"; or a step
            without layers such as "calibration text".
        layer: layers finished in this stage.
        layers: layers in total; 0 for a step without layers.
        step: what is being done to the layer at hand.
        mean_error: running mean of the relative output error of the matrices pruned so far; None before the first.
        unit: what is counted, where it is not layers: "matrix", "file".
    """

    stage: str
    layer: int = 0
    layers: int = 0
    step: str = ""
    mean_error: float | None = None
    unit: str = "layer"


Watcher = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Watch nothing."""
