"""Long lists of matrices: those that say the same in several layers become one row."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from llmprune.measuring.bench.record import layer_span, split_layer


class Named(Protocol):
    """Anything about one tensor."""

    @property
    def name(self) -> str:
        """Its full name in the checkpoint."""


Row = TypeVar("Row", bound=Named)


def by_layer(rows: Sequence[Row], key: Callable[[Row], object]) -> list[tuple[str, list[tuple[str, Row, int]]]]:
    """Merge rows that say the same: (layers, [(name inside, first row, how many)]).

    Args:
        rows: in the order of the layers.
        key: what has to be the same, apart from the name inside the layer.
    """
    merged: dict[object, tuple[Row, list[int]]] = {}
    for row in rows:
        before, number, after = split_layer(row.name)
        merged.setdefault((before, after, str(key(row))), (row, []))[1].append(-1 if number is None else number)
    layers: dict[str, list[tuple[str, Row, int]]] = {}
    for row, numbers in merged.values():
        before, _, after = split_layer(row.name)
        layer = layer_span(before, [number for number in numbers if number >= 0])
        layers.setdefault(layer, []).append((after, row, len(numbers)))
    return list(layers.items())
