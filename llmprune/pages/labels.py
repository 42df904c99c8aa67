"""Short texts on pages: a recipe in a few words, figures, and labels for the points of a chart."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.storage.report import MatrixRow, Report
from llmprune.text.tokens import TextSpec
from llmprune.units import quantity

# The size of a chart on a phone, in pixels: labels that fit there fit everywhere.
_WIDTH, _HEIGHT = 250, 370
# Half of a marker with the space around it; the width of a letter; the height of a line.
_MARKER, _LETTER, _LINE = 8, 7, 16
# How far a label may reach beyond the chart, into the margin.
_MARGIN = 16

# What says how a text is read, and has no option in the commands that train.
_SPECIAL = ("config", "split", "column", "layout", "order", "seed", "temperature", "top_p", "continues")

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
    if schedule := recipe.get("schedule"):
        aim = recipe.get("pattern") or f"{100 * schedule['end']:g}%"
        stages = quantity(schedule["stages"], "stage")
        return f"{methods_of(recipe.get('rule') or recipe.get('method'))} to {aim} in {stages}"
    structures = {name: section for name, section in (recipe.get("structures") or {}).items() if section}
    parts = [f"{name} -{_amount(section['remove'])}" for name, section in structures.items() if section.get("remove")]
    if method := recipe.get("method"):
        parts.append(f"{methods_of(method)} {recipe.get('pattern')}")
    if rules := recipe.get("rules"):
        parts.append(quantity(len(rules), "rule"))
    if recipe.get("format", "dense") != "dense":
        parts.append(f"packed as {recipe['format']}")
    return ", ".join(parts) or "nothing removed"


def short_run(header: Mapping[str, Any]) -> str:
    """What was done in a run, in a few words, and before it where it went on with a pruned model.

    Args:
        header: of its report.
    """
    if recovery := header.get("recovery"):
        adapter = recovery["options"].get("adapter", "none")
        before = [short_recipe(recovery["pruned_by"])] if recovery.get("pruned_by") else []
        return ", ".join([*before, "recovered" if adapter == "none" else f"recovered ({adapter})"])
    return short_recipe((header.get("training") or {}).get("recipe") or header.get("recipe") or {})


def zeros_line(report: Report) -> str:
    """How many weights of the pruned matrices are zero."""
    overall = "" if report.overall_sparsity is None else f" ({report.overall_sparsity:.1%} of all weights)"
    matrices = quantity(len(report.rows), "matrix", "matrices")
    return f"{report.sparsity:.1%} of the weights in {matrices} are zero{overall}"


def perplexity(value: float | None) -> str:
    """A perplexity, or why there is none, as text."""
    return "not measured" if value is None else "infinite" if math.isinf(value) else f"{value:.2f}"


def with_error(value: float | None, stderr: float | None) -> str:
    """A perplexity with its standard error, if that is known."""
    known = stderr is not None and math.isfinite(stderr)
    return f"{perplexity(value)} ± {stderr:.2g}" if known else perplexity(value)


def repeating_command(header: Mapping[str, Any]) -> str:
    """The command that repeats a run in its output folder, which has its recipe; the header is its report's.

    Empty if no command can: the text of a training was read in a way that only Python offers.
    """
    model, recipe = str(header["model"]), ["--recipe", "recipe.yaml"]
    recovery = header.get("recovery") or {}
    done = recovery or header.get("training") or {}
    if not done:
        processes = (header.get("host") or {}).get("processes")
        shared = ["--processes", str(processes)] if processes else []
        return shlex.join(["llmprune", "prune", model, *recipe, "--output", "pruned", *shared])
    if (texts := _text_options(header)) is None:
        return ""
    command, output = ("recover", "recovered") if recovery else ("train", "trained")
    teacher = ["--teacher", str(done["teacher"])] if done.get("teacher") else []
    several = done.get("processes", 1) > 1
    start = ["torchrun", "--nproc-per-node", str(done["processes"]), "-m", "llmprune"] if several else ["llmprune"]
    return shlex.join([*start, command, model, *recipe, *teacher, *texts, "--output", output])


def _text_options(header: Mapping[str, Any]) -> list[str] | None:
    """The options that name the texts of a training; None if options cannot say how they were read."""
    text = (header.get("texts") or {}).get("training")
    measured = (measured_text(header) or {}).get("text") or {}
    defaults = {key: getattr(TextSpec(), key) for key in _SPECIAL}
    if not text or any(one.get(key, value) != value for one in (text, measured) for key, value in defaults.items()):
        return None
    sizes = (("--num-samples", text.get("samples")), ("--max-seq-length", text.get("length")))
    words = ["--text", str(text["source"])]
    words += [word for name, value in sizes if value is not None for word in (name, str(value))]
    evaluation = measured.get("source") or (header.get("training") or {}).get("evaluated_on")
    return words + (["--eval-dataset", str(evaluation)] if evaluation else [])


def measured_text(header: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The figures of one model, with the text that all were measured on; None if perplexity was not measured."""
    evaluation = header.get("evaluation")
    found: Mapping[str, Any] | None = (
        evaluation["dense"] if evaluation else (header.get("recovery") or {}).get("measured")
    )
    return found


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


def methods_of(method: Any) -> str:
    """The name of a rule or of a method; of a chain, which is a list of steps with settings, the names of all."""
    steps = method if isinstance(method, list) else [method]
    return " + ".join(step if isinstance(step, str) else next(iter(step)) for step in steps)


def _amount(remove: float) -> str:
    return str(remove) if isinstance(remove, int) else f"{remove:.0%}"
