"""What a run removes from each structure: how many groups and, once that is known, which."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from llmprune.errors import ResumeError
from llmprune.methods import Method
from llmprune.patterns import Pattern, parse
from llmprune.recipe.fields import read_method, write_method
from llmprune.storage.records import checked
from llmprune.structures.find.discovery import Structure
from llmprune.structures.remove.cuts import Cut

# Preferred multiples for a width, best first; used if within this fraction of the width from what was requested.
_MULTIPLES, _CLOSE = (128, 64, 32, 16, 8), 0.05


@dataclass(frozen=True, slots=True)
class MatrixChoice:
    """What was decided for one matrix, instead of what the recipe says.

    Attributes:
        sparsity: fraction set to zero, in [0, 1], in the recipe's pattern; None: as in the recipe.
        pattern: another pattern; None: as in the recipe.
        method: another method; None: as in the recipe.
    """

    sparsity: float | None = None
    pattern: Pattern | None = None
    method: Method | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON; what is left to the recipe is omitted."""
        values = {
            "sparsity": self.sparsity,
            "pattern": self.pattern and str(self.pattern),
            "method": self.method and write_method(self.method),
        }
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "MatrixChoice":
        """Read one back from JSON."""
        pattern, method = data.get("pattern"), data.get("method")
        return cls(data.get("sparsity"), pattern and parse(pattern), method and read_method(method))


_Layer = Annotated[str, Field(pattern=r"^[0-9]+$")]


class _Stored(TypedDict):
    """`Decisions` as JSON has them."""

    layers: list[int]
    groups: dict[_Layer, dict[str, int]]
    removed: dict[_Layer, dict[str, list[list[int]]]]
    blocks: dict[_Layer, dict[str, int]]
    channels: list[int] | None
    factors: dict[str, float]
    evidence: dict[str, Any]
    matrices: NotRequired[dict[str, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Decisions:
    """What is decided before the first layer is pruned: what is removed, and how individual matrices are pruned.

    Attributes:
        layers: decoder layers that are kept, ascending.
        groups: decoder layer -> structure, named by `label` -> number of groups removed there.
        removed: likewise, but which groups (one list, or one per expert), if gradients have already decided.
        blocks: decoder layer -> the modules removed from a layer that is kept, and how many values each returns.
        channels: hidden channels that are kept, ascending; None: all of them.
        factors: norm -> the factor applied to its gain when hidden channels are removed.
        evidence: the basis of the decisions (scores, curves, KL divergences), for the report.
        matrices: full name of a matrix in the smaller model -> what was decided for it.
    """

    layers: tuple[int, ...]
    groups: Mapping[int, Mapping[str, int]]
    removed: Mapping[int, Mapping[str, tuple[tuple[int, ...], ...]]] = field(default_factory=dict)
    blocks: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    channels: tuple[int, ...] | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    matrices: Mapping[str, MatrixChoice] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON; without `matrices` if the recipe decides for all of them."""
        plain = asdict(replace(self, matrices={}))
        del plain["matrices"]
        chosen = {name: choice.to_dict() for name, choice in self.matrices.items()}
        return {**plain, "matrices": chosen} if chosen else plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Decisions":
        """Read them back from JSON, which has neither tuples nor integer keys.

        Raises:
            ResumeError: they are something else.
        """
        checked(
            data,
            _Stored,
            "the decisions in the manifest",
            expected="the decisions of an interrupted run",
            fix="start again with --overwrite",
            raised=ResumeError,
        )
        removed = {
            int(layer): {name: tuple(map(tuple, lists)) for name, lists in own.items()}
            for layer, own in data["removed"].items()
        }
        by_layer = {key: {int(layer): dict(own) for layer, own in data[key].items()} for key in ("groups", "blocks")}
        channels = None if data["channels"] is None else tuple(data["channels"])
        known = {**data, **by_layer, "layers": tuple(data["layers"]), "removed": removed, "channels": channels}
        known["matrices"] = {name: MatrixChoice.from_dict(one) for name, one in data.get("matrices", {}).items()}
        return cls(**known)


def aligned(among: int, kept: int, multiple: int | str) -> int:
    """Number of channels to keep: a hardware-friendly multiple close to what was requested.

    Args:
        among: channels in total.
        kept: how many would be kept without alignment.
        multiple: the multiple; "auto": the largest of 128, 64, 32, 16, 8 with a multiple within 5 % of `among`.

    Example:
        >>> aligned(14336, 10752, "auto"), aligned(704, 528, "auto"), aligned(48, 36, "auto"), aligned(704, 528, 1)
        (10752, 512, 32, 528)
    """
    for step in _MULTIPLES if multiple == "auto" else (int(multiple),):
        nearest = min(max(round(kept / step), 1) * step, among // step * step)
        if nearest and (multiple != "auto" or abs(nearest - kept) <= _CLOSE * among):
            return nearest
    return kept


def best_multiple(groups: int, multiple: int | str) -> int:
    """The multiple for widths chosen by a budget; "auto": the largest of 128, ..., 8 that leaves 32 steps in the width.

    Example:
        >>> best_multiple(14336, "auto"), best_multiple(704, "auto"), best_multiple(48, "auto"), best_multiple(704, 64)
        (128, 16, 4, 64)
    """
    if multiple != "auto":
        return int(multiple)
    return next((step for step in _MULTIPLES if groups >= 32 * step), 4 if groups >= 16 else 1)


def label(structure: Structure) -> str:
    """Name a structure inside its layer; the kind is needed because experts and their channels share a consumer."""
    return f"{structure.kind} of {structure.consumer}"


def some_cut(structure: Structure, remove: int) -> Cut:
    """A cut of some `remove` groups, for whatever depends on their number alone."""
    length = structure.groups // structure.partitions
    each = remove // structure.partitions
    return Cut(structure, tuple(start + place for start in range(0, structure.groups, length) for place in range(each)))
