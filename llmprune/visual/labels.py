"""Names beside the points of a chart, where there is room for them."""

from collections.abc import Sequence
from dataclasses import dataclass

# A chart on a phone, in pixels: what has room there has it everywhere.
_WIDTH, _HEIGHT = 250, 370
# A marker with what is free around it, half of it; a letter; a line of text.
_MARKER, _LETTER, _LINE = 8, 7, 16
# How far a name may leave the chart: the margin.
_MARGIN = 16

# Plotly's names for where a text stands, the best first, and where its middle is: in halves of its width and height.
_POSITIONS = {
    "top center": (0, 1), "bottom center": (0, -1), "middle right": (1, 0), "middle left": (-1, 0),
    "top right": (1, 1), "top left": (-1, 1), "bottom right": (1, -1), "bottom left": (-1, -1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Box:
    x: float
    y: float
    half_width: float
    half_height: float

    def overlaps(self, other: "_Box") -> bool:
        near = abs(self.x - other.x) < self.half_width + other.half_width
        return near and abs(self.y - other.y) < self.half_height + other.half_height

    @property
    def inside(self) -> bool:
        return (
            self.half_width - _MARGIN <= self.x <= _WIDTH + _MARGIN - self.half_width
            and self.half_height - _MARGIN <= self.y <= _HEIGHT + _MARGIN - self.half_height
        )


def place_names(points: Sequence[tuple[float, float]], names: Sequence[str]) -> list[str | None]:
    """Find a place for each name that no other name and no point covers.

    Args:
        points: in the unit square, from the lower left.
        names: one each.

    Returns:
        Plotly's textposition for each; None where there is no room.
    """
    markers = [_Box(x * _WIDTH, y * _HEIGHT, _MARKER, _MARKER) for x, y in points]
    taken = list(markers)
    found: list[str | None] = []
    for marker, name in zip(markers, names, strict=True):
        boxes = {position: _beside(marker, name, position) for position in _POSITIONS}
        free = (p for p, box in boxes.items() if box.inside and not any(box.overlaps(other) for other in taken))
        found.append(next(free, None))
        if found[-1] is not None:
            taken.append(boxes[found[-1]])
    return found


def _beside(marker: _Box, name: str, position: str) -> _Box:
    right, up = _POSITIONS[position]
    half_width, half_height = _LETTER * len(name) / 2, _LINE / 2
    # Boxes that touch do not overlap.
    x = marker.x + right * (half_width + (0 if up else _MARKER))
    return _Box(x, marker.y + up * (_MARKER + half_height), half_width, half_height)
