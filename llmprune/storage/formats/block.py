"""`block`: the square blocks that are not all zero, in the form of torch's BSR tensors.

Byte specification, for a weight [out, in] with `blocks` stored blocks of B x B (field `block`: 16, 32, 64 or 128; B
divides both dimensions).

    values   [blocks, B, B]           the weights' dtype
    crow     int32 [out / B + 1]      number of stored blocks before each block row; the last entry is `blocks`
    col      int32 [blocks]           block column of each stored block, 0 to in / B - 1

* Blocks are stored block row by block row, from left to right; each as B rows of B weights. A weight W[r, c] of a
  stored block k in block row i (crow[i] <= k < crow[i + 1]) is values[k, r - i * B, c - col[k] * B].
* -0.0 becomes 0.0.
* `balanced` says that every block row stores the same number of blocks, blocks / (out / B). Rows with fewer blocks are
  padded with zero blocks at their lowest unused block columns; crow[i] is then i times that number. A matrix is stored
  this way if it adds at most 2 % to the number of blocks.

Refused when read: a wrong shape or dtype; crow that does not start at 0, descends, does not end at `blocks` or is
uneven in a balanced matrix; a column out of range; columns of a block row that are not strictly ascending. Zero blocks
may be stored, and the sign of a zero is preserved.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int64, Integer, Shaped
from torch import Tensor

from llmprune.errors import PatternError
from llmprune.patterns import Block, Pattern
from llmprune.storage.formats.layout import (
    Spec,
    clear_negative_zeros,
    corrupt,
    disobedient,
    nonzero,
    packed_bits,
    padded,
    slabs,
    to_row,
    total_bytes,
    weight_bits,
)

SIZES = (16, 32, 64, 128)

_PADDING = 0.02


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Whole blocks are zero and not stored.

    Attributes:
        shape: (out, in) of the dense matrix; `block` divides both.
        block: rows and columns of a block: 16, 32, 64 or 128.
        blocks: number of stored blocks.
        balanced: every block row stores the same number.
    """

    name: ClassVar[str] = "block"

    shape: tuple[int, int]
    block: int
    blocks: int
    balanced: bool

    def __post_init__(self) -> None:
        if self.block not in SIZES:
            raise PatternError(f"blocks of {self.block} in the layout block", expected=f"one of {SIZES}")
        Block(0.0, (self.block, self.block)).check(self.shape)
        rows, columns = self.grid
        if not 0 <= self.blocks <= rows * columns or (self.balanced and self.blocks % max(1, rows)):
            raise PatternError(
                f"{self.blocks} stored blocks of {rows} x {columns}",
                expected="at most all of them" + (", the same number in every row" if self.balanced else ""),
            )

    @classmethod
    def fit(cls, weight: Shaped[Tensor, "out in"], pattern: Pattern) -> "BlockLayout":
        if not isinstance(pattern, Block) or pattern.size[0] != pattern.size[1]:
            raise PatternError(f"pattern {pattern} in the layout block", expected="square blocks such as 0.5@64x64")
        rows, columns = weight.shape
        unfilled = cls((rows, columns), pattern.size[0], 0, balanced=False)
        counts = unfilled._occupied(weight_bits(unfilled, weight)).sum(1)
        stored, filled = int(counts.sum()), int(counts.amax()) * len(counts) if len(counts) else 0
        balanced = filled - stored <= _PADDING * stored
        return cls((rows, columns), pattern.size[0], filled if balanced else stored, balanced)

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns of the matrix."""
        return self.shape[0] // self.block, self.shape[1] // self.block

    @property
    def per_row(self) -> int | None:
        """Blocks stored in each block row; None if the rows differ."""
        return self.blocks // max(1, self.grid[0]) if self.balanced else None

    def tensors(self) -> dict[str, Spec]:
        return {
            "values": Spec((self.blocks, self.block, self.block)),
            "crow": Spec((self.grid[0] + 1,), torch.int32),
            "col": Spec((self.blocks,), torch.int32),
        }

    def pack(self, weight: Shaped[Tensor, "out in"]) -> dict[str, Tensor]:
        bits = weight_bits(self, weight)
        stored = self._occupied(bits)
        if self.per_row is not None:
            if bool((stored.sum(1) > self.per_row).any()):
                raise disobedient(self, "too many blocks in a block row", f"at most {self.per_row} non-zero blocks")
            stored = padded(stored, self.per_row)
        if int(stored.sum()) != self.blocks:
            raise disobedient(self, f"{int(stored.sum())} non-zero blocks", f"{self.blocks}")
        crow = torch.zeros(self.grid[0] + 1, dtype=torch.int32, device=bits.device)
        crow[1:] = stored.sum(1).cumsum(0)
        row, col = stored.nonzero(as_tuple=True)
        values = clear_negative_zeros(self._tiles(bits)[row, :, col])
        return {"values": values.view(weight.dtype), "crow": crow, "col": col.to(torch.int32)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Shaped[Tensor, "out in"]:
        values, dtype = packed_bits(self, tensors)
        row, col = self._places(tensors["crow"].long(), tensors["col"].long())
        dense = values.new_zeros(self.shape)
        self._tiles(dense)[row, :, col] = values
        return dense.view(dtype)

    def to_dict(self) -> dict[str, Any]:
        return to_row(self)

    def nbytes(self, itemsize: int) -> int:
        return total_bytes(self, itemsize)

    def require_places(self, tensors: Mapping[str, Tensor]) -> None:
        """Check where the blocks are: kernels read there without a look.

        Raises:
            FormatError: they are not in ascending order inside the matrix.
        """
        self._places(tensors["crow"].long(), tensors["col"].long())

    def _tiles(self, bits: Integer[Tensor, "out in"]) -> Integer[Tensor, "rows size columns size"]:
        rows, columns = self.grid
        return bits.view(rows, self.block, columns, self.block)

    def _occupied(self, bits: Integer[Tensor, "out in"]) -> Bool[Tensor, "rows columns"]:
        """The blocks that are not all zero."""
        tiles = self._tiles(bits)
        occupied = torch.empty(self.grid, dtype=torch.bool, device=bits.device)
        for rows in slabs(self.grid[0], self.block * self.shape[1]):
            occupied[rows] = nonzero(tiles[rows]).any(1).any(-1)
        return occupied

    def _places(
        self, crow: Int64[Tensor, " ends"], col: Int64[Tensor, " blocks"]
    ) -> tuple[Int64[Tensor, " blocks"], Int64[Tensor, " blocks"]]:
        """Block row and block column of each stored block, after checking that they are valid."""
        rows, columns = self.grid
        counts = crow.diff()
        if int(crow[0]) != 0 or int(crow[-1]) != self.blocks or bool((counts < 0).any()):
            raise corrupt(self, "'crow' is not a running count of blocks", f"ascending from 0 to {self.blocks}")
        if self.per_row is not None and bool((counts != self.per_row).any()):
            raise corrupt(self, "'crow' has block rows of unequal length", f"{self.per_row} blocks in each")
        if bool(((col < 0) | (col >= columns)).any()):
            raise corrupt(self, "'col' has a block column out of range", f"0 to {columns - 1}")
        row = torch.arange(rows, device=crow.device).repeat_interleave(counts)
        # One comparison checks every row: the flat position ascends by itself from one block row to the next.
        if bool(((row * columns + col).diff() <= 0).any()):
            raise corrupt(self, "'col' does not ascend in a block row", "each block column once, in ascending order")
        return row, col
