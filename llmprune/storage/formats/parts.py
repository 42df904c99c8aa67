"""Parts of packed matrices: the rows or columns of one rank of tensor parallelism, and matrices stacked by rows.

A packed matrix is cut without its dense form, so that no rank ever holds one. Cuts of rows, put together, are the whole
matrix, tensor for tensor, and cuts of columns store the same weights. Their tensors may be views.

| layout | rows | columns |
|---|---|---|
| `nm`, `int8-nm` | any | multiples of M |
| `block` | multiples of the block | multiples of the block |
| `bitmask`, `int8-bitmask`, `dense` | any | any |

8-bit weights whose groups a cut of columns divides get smaller groups, with the same weights.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import cast

import torch
from jaxtyping import UInt8
from torch import Tensor

from llmprune.errors import FormatError, PatternError
from llmprune.storage.formats.bitmask import BitmaskLayout
from llmprune.storage.formats.block import BlockLayout
from llmprune.storage.formats.dense import DenseLayout
from llmprune.storage.formats.int8 import Int8BitmaskLayout, Int8NMLayout
from llmprune.storage.formats.layout import Layout, corrupt, from_bytes, packed_bits, slabs, to_bytes
from llmprune.storage.formats.nm import NMLayout

_WAY_OUT = "use fewer ranks, or unpack the checkpoint (llmprune unpack) and serve it dense"


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix in a layout.

    Attributes:
        layout: how it is stored.
        tensors: what `layout.tensors()` describes, by suffix.
    """

    layout: Layout
    tensors: Mapping[str, Tensor]

    def require(self) -> "Packed":
        """Check names, shapes and dtypes of the tensors, and the ranges of 8-bit weights.

        Raises:
            FormatError: one does not match the layout.
        """
        if isinstance(self.layout, Int8BitmaskLayout | Int8NMLayout):
            self.layout.require(self.tensors)
        else:
            packed_bits(self.layout, self.tensors)
        return self


def cut_rows(packed: Packed, first: int, last: int) -> Packed:
    """The rows `first` to `last` - 1 of a matrix, which is a share of its outputs.

    Raises:
        PatternError: the layout cannot be cut there.
        FormatError: the tensors contradict the layout.
    """
    layout, tensors = packed.layout, packed.tensors
    _require_range("rows", first, last, layout.shape[0])
    shape = last - first, layout.shape[1]
    if isinstance(layout, BlockLayout):
        return _block_rows(packed, layout, first, last)
    if isinstance(layout, BitmaskLayout | Int8BitmaskLayout):
        _require_count(layout, tensors["mask"])
        start, count = _set_bits(tensors["mask"][:first]), _set_bits(tensors["mask"][first:last])
        parts = {name: tensor[first:last] for name, tensor in tensors.items() if name != "values"}
        return Packed(
            replace(layout, shape=shape, nonzeros=count), {**parts, "values": tensors["values"][start : start + count]}
        )
    assert isinstance(layout, NMLayout | Int8NMLayout | DenseLayout)
    return Packed(replace(layout, shape=shape), {name: tensor[first:last] for name, tensor in tensors.items()})


def cut_columns(packed: Packed, first: int, last: int) -> Packed:
    """The columns `first` to `last` - 1 of a matrix, which is a share of its inputs.

    Raises:
        PatternError: the layout cannot be cut there.
        FormatError: the tensors contradict the layout.
    """
    layout, tensors = packed.layout, packed.tensors
    _require_range("columns", first, last, layout.shape[1])
    if (first, last) == (0, layout.shape[1]):
        return packed
    if isinstance(layout, BlockLayout):
        return _block_columns(packed, layout, first, last)
    if isinstance(layout, Int8BitmaskLayout | Int8NMLayout):
        return _int8_columns(packed, layout, first, last)
    if isinstance(layout, BitmaskLayout):
        return _bitmask_columns(packed, layout, first, last)
    if isinstance(layout, NMLayout):
        return _nm_columns(packed, layout, first, last)
    assert isinstance(layout, DenseLayout)
    return Packed(replace(layout, shape=(layout.shape[0], last - first)), {"weight": tensors["weight"][:, first:last]})


def share(whole: int, part: int, rank: int, ranks: int) -> tuple[int, int]:
    """What a rank holds of a dimension: (first, last).

    Args:
        whole: size of the dimension.
        part: size of what each rank holds: `whole` if it is not divided. Where it is divided into fewer parts than
            there are ranks, as KV heads are, neighbouring ranks hold the same.
        rank: 0 to `ranks` - 1.
        ranks: number of ranks.

    Raises:
        PatternError: the parts do not divide the dimension, or the ranks are not a multiple of the parts.

    Example:
        >>> [share(4, 2, rank, 4) for rank in range(4)]
        [(0, 2), (0, 2), (2, 4), (2, 4)]
    """
    parts = whole // part if part else 0
    if not parts or parts * part != whole or ranks % parts:
        raise PatternError(
            f"parts of {part} of a dimension of {whole} on {ranks} ranks",
            expected="the dimension divided evenly over the ranks",
            fix="use a number of ranks that divides it",
        )
    first = rank * parts // ranks * part
    return first, first + part


def can_stack(one: Layout, other: Layout) -> bool:
    """Whether two matrices of the same number of columns can be stored as one: kind, groups and blocks are the same."""
    return type(one) is type(other) and _kind(one) == _kind(other)


def stack(matrices: Sequence[Packed]) -> Packed:
    """One matrix of the rows of several that `can_stack`, in their order; a single one is returned as it is."""
    if len(matrices) == 1:
        return matrices[0]
    layout = stacked([matrix.layout for matrix in matrices])
    tensors = {name: torch.cat([matrix.tensors[name] for matrix in matrices]) for name in layout.tensors()}
    if isinstance(layout, BlockLayout):
        counts = torch.cat([matrix.tensors["crow"].diff() for matrix in matrices])
        return _with_counts(layout.block, layout.shape, counts, tensors["values"], tensors["col"])
    return Packed(layout, tensors)


def stacked(layouts: Sequence[Layout]) -> Layout:
    """The layout of several matrices as one."""
    first, shape = layouts[0], (sum(layout.shape[0] for layout in layouts), layouts[0].shape[1])
    assert all(can_stack(first, layout) for layout in layouts[1:])
    if isinstance(first, BitmaskLayout | Int8BitmaskLayout):
        masked = cast("Sequence[BitmaskLayout | Int8BitmaskLayout]", layouts)
        return replace(first, shape=shape, nonzeros=sum(layout.nonzeros for layout in masked))
    if isinstance(first, BlockLayout):
        blocks = cast("Sequence[BlockLayout]", layouts)
        balanced = first.balanced and len({layout.per_row for layout in blocks}) == 1
        return replace(first, shape=shape, blocks=sum(layout.blocks for layout in blocks), balanced=balanced)
    assert isinstance(first, NMLayout | Int8NMLayout | DenseLayout)
    return replace(first, shape=shape)


def _kind(layout: Layout) -> tuple[object, ...]:
    """What has to be equal for matrices to be stacked."""
    names = ("keep", "of", "group", "block")
    return layout.shape[1], *(getattr(layout, name, None) for name in names)


def _nm_columns(packed: Packed, layout: NMLayout, first: int, last: int) -> Packed:
    _require_multiple(layout, layout.of, "groups", first, last)
    start, stop = (column // layout.of * layout.keep for column in (first, last))
    cut = replace(layout, shape=(layout.shape[0], last - first))
    meta = _cut_bits(packed, "meta", layout.row_values * layout.index_bits, (start, stop), layout.index_bits)
    return Packed(cut, {"values": packed.tensors["values"][:, start:stop], "meta": meta})


def _bitmask_columns(packed: Packed, layout: BitmaskLayout, first: int, last: int) -> Packed:
    mask, values, taken, start = packed.tensors["mask"], packed.tensors["values"], [], 0
    _require_count(layout, mask)
    for rows in slabs(*layout.shape):
        stored = _bits(packed, "mask", mask[rows], layout.shape[1])
        inside = torch.zeros_like(stored)
        inside[:, first:last] = True
        chosen = inside[stored]  # of the stored weights, in their order
        taken.append(values[start : start + len(chosen)][chosen])
        start += len(chosen)
    found = torch.cat(taken) if taken else values[:0]
    cut = BitmaskLayout((layout.shape[0], last - first), len(found))
    return Packed(cut, {"values": found, "mask": _cut_bits(packed, "mask", layout.shape[1], (first, last), 1)})


def _int8_columns(packed: Packed, layout: Int8BitmaskLayout | Int8NMLayout, first: int, last: int) -> Packed:
    """The 8-bit numbers as their own layout cuts them, and the peaks of the columns."""
    inner = cut_columns(
        Packed(layout.inner, {name: tensor for name, tensor in packed.tensors.items() if name != "peaks"}), first, last
    )
    group = layout.group if last == layout.shape[1] else gcd(layout.group, last)
    group = gcd(group, first) if first else group
    peaks = packed.tensors["peaks"].repeat_interleave(layout.group // group, 1)
    peaks = peaks[:, first // group : -(-last // group)]
    group = min(group, max(1, last - first))
    cut: Layout
    if isinstance(inner.layout, BitmaskLayout):
        cut = Int8BitmaskLayout(inner.layout.shape, inner.layout.nonzeros, group)
    else:
        assert isinstance(inner.layout, NMLayout)
        cut = Int8NMLayout(inner.layout.shape, inner.layout.keep, inner.layout.of, group)
    return Packed(cut, {**inner.tensors, "peaks": peaks})


def _block_rows(packed: Packed, layout: BlockLayout, first: int, last: int) -> Packed:
    _require_multiple(layout, layout.block, "blocks", first, last)
    crow = _ascending(packed, layout)
    start, stop = int(crow[first // layout.block]), int(crow[last // layout.block])
    own = crow[first // layout.block : last // layout.block + 1] - start
    blocks = {name: packed.tensors[name][start:stop] for name in ("values", "col")}
    return Packed(replace(layout, shape=(last - first, layout.shape[1]), blocks=stop - start), {**blocks, "crow": own})


def _block_columns(packed: Packed, layout: BlockLayout, first: int, last: int) -> Packed:
    _require_multiple(layout, layout.block, "blocks", first, last)
    crow, col = _ascending(packed, layout), packed.tensors["col"]
    left, right = first // layout.block, last // layout.block
    inside = (col >= left) & (col < right)
    running = torch.cat([inside.new_zeros(1, dtype=torch.int64), inside.cumsum(0)])
    counts = running[crow.long()].diff()
    return _with_counts(
        layout.block,
        (layout.shape[0], last - first),
        counts,
        packed.tensors["values"][inside],
        (col[inside] - left).to(col.dtype),
    )


def _with_counts(block: int, shape: tuple[int, int], counts: Tensor, values: Tensor, col: Tensor) -> Packed:
    """A block matrix from the number of blocks in each block row; balanced if they are the same."""
    crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    balanced = len(counts) == 0 or bool((counts == counts[0]).all())
    return Packed(BlockLayout(shape, block, len(col), balanced), {"values": values, "crow": crow, "col": col})


def _ascending(packed: Packed, layout: BlockLayout) -> Tensor:
    crow = packed.tensors["crow"]
    if int(crow[0]) != 0 or int(crow[-1]) != layout.blocks or bool((crow.diff() < 0).any()):
        raise corrupt(layout, "'crow' is not a running count of blocks", f"ascending from 0 to {layout.blocks}")
    return crow


def _cut_bits(
    packed: Packed, name: str, length: int, numbers: tuple[int, int], width: int
) -> UInt8[Tensor, "rows bytes"]:
    """The numbers of `width` bits from one to another, of rows of `length` bits."""
    bytes_, start, stop = packed.tensors[name], numbers[0] * width, numbers[1] * width
    if start % 8 == 0 and stop % 8 == 0:
        return bytes_[:, start // 8 : stop // 8]
    cut = torch.empty(len(bytes_), -(-(stop - start) // 8), dtype=torch.uint8, device=bytes_.device)
    for rows in slabs(len(bytes_), length):
        cut[rows] = to_bytes(_bits(packed, name, bytes_[rows], length)[:, start:stop])
    return cut


def _bits(packed: Packed, name: str, bytes_: UInt8[Tensor, "rows bytes"], length: int) -> Tensor:
    bits = from_bytes(bytes_, length)
    if bits is None:
        raise corrupt(packed.layout, f"{name!r} has bits set after the last", "zeros there")
    return bits


def _set_bits(bytes_: UInt8[Tensor, "rows bytes"]) -> int:
    """How many bits are set."""
    counts = torch.tensor([value.bit_count() for value in range(256)], device=bytes_.device)
    return int((torch.bincount(bytes_.flatten().int(), minlength=256) * counts).sum()) if bytes_.numel() else 0


def _require_count(layout: BitmaskLayout | Int8BitmaskLayout, mask: UInt8[Tensor, "rows bytes"]) -> None:
    if (found := _set_bits(mask)) != layout.nonzeros:
        raise corrupt(layout, f"'mask' has {found} set bits", f"{layout.nonzeros}, one for each of 'values'")


def _require_range(what: str, first: int, last: int, size: int) -> None:
    if not 0 <= first <= last <= size:
        raise FormatError(f"{what} {first} to {last} of {size}", expected="a part of the matrix")


def _require_multiple(layout: Layout, of: int, kind: str, first: int, last: int) -> None:
    if first % of or last % of:
        rows, columns = layout.shape
        raise PatternError(
            f"a {layout.name} matrix of {rows} x {columns} (out x in) cut at {first} and {last}, inside its {kind} of "
            f"{of}",
            expected=f"multiples of {of}",
            fix=_WAY_OUT,
        )
