"""On-disk layouts of one pruned matrix: frozen values that pack a weight into tensors and unpack it bit for bit.

| layout | stores | fits |
|---|---|---|
| `nm` | N of every M weights and their indices | N:M |
| `block` | the non-zero blocks | blocks of 16, 32, 64 or 128 |
| `bitmask` | the non-zero weights and one bit per weight | any zeros |
| `int8-nm`, `int8-bitmask` | the same as 8-bit numbers that share a peak in groups of columns | quantised weights |
| `dense` | everything | anything |
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from llmprune.errors import FormatError, PatternError
from llmprune.patterns import Pattern
from llmprune.storage.formats.bitmask import BitmaskLayout
from llmprune.storage.formats.block import BlockLayout
from llmprune.storage.formats.dense import DenseLayout
from llmprune.storage.formats.int8 import GROUP, Int8BitmaskLayout, Int8Layout, Int8NMLayout, quantise, quantised_group
from llmprune.storage.formats.layout import Layout, Spec
from llmprune.storage.formats.nm import NMLayout

__all__ = [
    "GROUP", "LAYOUTS", "BitmaskLayout", "BlockLayout", "DenseLayout", "Int8BitmaskLayout", "Int8NMLayout", "Layout",
    "NMLayout", "Spec", "fit_layout", "layout_from_dict", "quantise", "quantised_group",
]  # fmt: skip

LAYOUTS: dict[str, type[Layout]] = {
    layout.name: layout
    for layout in (NMLayout, BlockLayout, BitmaskLayout, Int8NMLayout, Int8BitmaskLayout, DenseLayout)
}


def fit_layout(name: str, weight: Shaped[Tensor, "out in"], pattern: Pattern, group: int = GROUP) -> Layout:
    """Fit a layout's parameters to a weight.

    Args:
        name: a key of `LAYOUTS`.
        weight: [out, in]; only its shape and its zeros are read.
        pattern: what the weight was pruned to; it gives the size of the groups or blocks.
        group: columns that share a peak in the layouts of 8-bit weights.

    Raises:
        PatternError: there is no such layout, it does not store this pattern, or the pattern does not divide the
            matrix. Whether the weight obeys an N:M pattern is checked by `pack`.

    Example:
        >>> fit_layout("nm", torch.zeros(2, 8), NM(2, 4))
        NMLayout(shape=(2, 8), keep=2, of=4)
    """
    if name not in LAYOUTS:
        raise PatternError(f"layout {name!r}", expected=", ".join(LAYOUTS))
    kind = LAYOUTS[name]
    return kind.fit(weight, pattern, group) if issubclass(kind, Int8Layout) else kind.fit(weight, pattern)


def layout_from_dict(row: Mapping[str, Any]) -> Layout:
    """Read what `Layout.to_dict` wrote.

    Raises:
        FormatError: there is no such layout, or a field is missing, unknown, of the wrong type or out of range.
    """
    name = row.get("layout")
    if not isinstance(name, str) or name not in LAYOUTS:
        raise FormatError(
            f"layout {name!r}",
            expected=", ".join(LAYOUTS),
            fix="upgrade llmprune if the checkpoint was packed by a newer version",
        )
    types: dict[str, Any] = {field.name: field.type for field in fields(LAYOUTS[name])}  # type: ignore[arg-type]
    if set(row) != {"layout", *types}:
        raise FormatError(f"layout {name} with the fields {sorted(row)}", expected=f"layout, {', '.join(types)}")
    shape = row["shape"]
    # Not isinstance, which accepts a bool as an int.
    sized = isinstance(shape, list | tuple) and [type(size) for size in shape] == [int, int] and min(shape) >= 0
    if not sized or any(type(row[key]) is not types[key] for key in types if key != "shape"):
        raise FormatError(f"layout {dict(row)}", expected="integers, and a shape of two that are not negative")
    try:
        return LAYOUTS[name](**{**{key: row[key] for key in types}, "shape": tuple(shape)})
    except PatternError as error:
        raise FormatError(f"layout {dict(row)}: {error.what}", expected=error.expected) from error
