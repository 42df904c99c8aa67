"""Short texts on pages: a recipe in a few words, figures, and labels for the points of a chart."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.storage.report import MatrixRow
from llmprune.units import quantity

# The size of a chart on a phone, in pixels: labels that fit there fit everywhere.
_WIDTH, _HEIGHT = 250, 370
# Half of a marker with the space around it; the width of a letter; the height of a line.
_MARKER, _LETTER, _LINE = 8, 7, 16
# How far a label may reach beyond the chart, into the margin.
_MARGIN = 16

# Plotly's text positions, best first, and where each puts the middle of a text, in halves of its width and height.
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
    """Find a position for each label where it overlaps neither another label nor a point.

    Args:
        points: in the unit square, with the origin at the lower left.
        names: one label per point.

    Returns:
        Plotly's textposition for each label; None if there is no room.
    """
    markers = [_Box(x * _WIDTH, y * _HEIGHT, _MARKER, _MARKER) for x, y in points]
    taken = list(markers)
    found: list[str | None] = []
    for marker, name in zip(markers, names, strict=True):
        boxes = {position: _box(marker, name, position) for position in _POSITIONS}
        free = (p for p, box in boxes.items() if box.inside and not any(box.overlaps(other) for other in taken))
        found.append(next(free, None))
        if found[-1] is not None:
            taken.append(boxes[found[-1]])
    return found


def _box(marker: _Box, name: str, position: str) -> _Box:
    right, up = _POSITIONS[position]
    half_width, half_height = _LETTER * len(name) / 2, _LINE / 2
    # Boxes that only touch do not overlap.
    x = marker.x + right * (half_width + (0 if up else _MARKER))
    return _Box(x, marker.y + up * (_MARKER + half_height), half_width, half_height)


def short_recipe(recipe: Mapping[str, Any]) -> str:
    """What a recipe does, without its settings.

    Args:
        recipe: as stored in a report.

    Example:
        >>> short_recipe({"structures": {"ffn": {"remove": 0.25}}, "pattern": "2:4", "method": {"sparsegpt": {}}})
        'ffn -25%, sparsegpt 2:4'
    """
    structures = {name: section for name, section in (recipe.get("structures") or {}).items() if section}
    parts = [f"{name} -{_amount(section['remove'])}" for name, section in structures.items() if section.get("remove")]
    if method := recipe.get("method"):
        # A chain is a list of steps, each with its settings like a single method.
        steps = method if isinstance(method, list) else [method]
        parts.append(f"{' + '.join(next(iter(step)) for step in steps)} {recipe.get('pattern')}")
    if rules := recipe.get("rules"):
        parts.append(quantity(len(rules), "rule"))
    if recipe.get("format", "dense") != "dense":
        parts.append(f"packed as {recipe['format']}")
    return ", ".join(parts) or "nothing removed"


def perplexity(value: float | None) -> str:
    """A perplexity, or why there is none, as text."""
    return "not measured" if value is None else "infinite" if math.isinf(value) else f"{value:.2f}"


def with_error(value: float | None, stderr: float | None) -> str:
    """A perplexity with its standard error, if that is known."""
    known = stderr is not None and math.isfinite(stderr)
    return f"{perplexity(value)} ± {stderr:.2g}" if known else perplexity(value)


def repeating_command(header: Mapping[str, Any]) -> str:
    """The command that repeats a run in its output folder, which has its recipe; the header is its report's."""
    processes = (header.get("host") or {}).get("processes")
    shared = ["--processes", str(processes)] if processes else []
    model = str(header["model"])
    return shlex.join(["llmprune", "prune", model, "--recipe", "recipe.yaml", "--output", "pruned", *shared])


def divergence(value: float | None) -> str:
    """A KL divergence in nats; null in a report means that it is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def massive_line(row: MatrixRow) -> str:
    """How much a few tokens weigh in the statistics of a matrix."""
    return f"1% of the tokens have {row.top_tokens or 0:.1%} of the squared inputs of {row.name}"


def opened(text: Mapping[str, Any]) -> str:
    """How the sequences of a text begin, for the protocol line of a measurement; empty where it was not recorded."""
    if "opening" not in text:
        return ""
    opening = text["opening"]
    return f", each after {' '.join(map(str, opening))} (not scored)" if opening else ", with nothing in front"


def text_name(text: Mapping[str, Any]) -> str:
    """A text in a few words, by its description in a report; a mix by the names of all its texts."""
    if "mix" in text:
        return f"a mix of {', '.join(text_name(part) for part in text['mix'])}"
    if text["source"] != "self":
        return str(text["source"])
    return f"self-generated text that continues {text['continues']}" if text.get("continues") else "self-generated text"


def text_line(evaluated: Mapping[str, Any]) -> str:
    """What text a report's perplexity was measured on."""
    text = text_name(evaluated["text"])
    protocol = f"in sequences of {evaluated['length']:,}{opened(evaluated['text'])}"
    return f"{evaluated['predicted_tokens']:,} tokens of {text}, {protocol}"


def _amount(remove: float) -> str:
    return str(remove) if isinstance(remove, int) else f"{remove:.0%}"
