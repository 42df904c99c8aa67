"""Block OBS: whole blocks are removed one after another, and every other weight compensates for each exactly.

The optimal brain surgeon for a block of columns B and the rows w that share it: with H the damped Gram matrix of the
inputs and M = H^-1, restricted to what is left, removing the block jointly raises tr((W - V) H (W - V)^T) by

    the sum over these rows of w_B (M_BB)^-1 w_B^T,

after which the weights that are left, and their inverse, become

    w - w_B (M_BB)^-1 M_B:        M - M_:B (M_BB)^-1 M_B:

(Optimal Brain Compression, Frantar et al. 2022, arXiv 2208.11580, equations 5 and 6). Rows of blocks do not see one
another, since each has an inverse of its own, so many are searched at once, each in its own greedy order. Taking the
cheapest next block of all these orders until enough are gone is the greedy order of the whole matrix. Last, the weights
are solved for on the mask in float64, so that no rounding of the search is left in them.

The inverses shrink as blocks are removed. Half of the blocks cost about 0.6 in^3 operations for each row of blocks: for
a square matrix and blocks of 16 rows, in / 60 times what SparseGPT takes.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmprune.errors import RecipeError
from llmprune.methods.method import Pruned, check_pattern, matrix_workspace
from llmprune.methods.sparsegpt import removal_scores
from llmprune.patterns import Block, Pattern, Scope, kept_first, lowest, ranks
from llmprune.precision import float32_products
from llmprune.statistics import ColumnNorm, Gram, check_finite, damped

# Bytes for the inverses of the rows of blocks that are searched at once, of which a copy is made now and then.
_CHUNK_BYTES = 2**28
# Removed blocks are cut out of the inverses once they are this share of what these still hold.
_CUT = 1 / 8
# Steps between two looks at whether a search may end; each look ranks all costs that are known.
_LOOK = 4


@dataclass(frozen=True)
class BlockOBS:
    """Remove blocks one by one, by the exact joint cost of each, and solve for the weights that are left.

    Attributes:
        damping: added to the Gram's diagonal, as a fraction of its mean, >= 0; increased to 0.01, 0.1, 1 if the
            factorisation fails, as the report shows.
    """

    damping: float = 0.01
    needs: ClassVar[type[Gram]] = Gram
    scope: ClassVar[Scope] = "matrix"

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise RecipeError(f"obs.damping is {self.damping}", expected="a fraction of the mean diagonal, >= 0")

    def refuses(self, pattern: Pattern) -> str:
        """It removes blocks, which a matrix has few of; single weights would each take an inverse for their row."""
        return "" if isinstance(pattern, Block) else "obs removes whole blocks, such as those of 0.5@16x16"

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """SparseGPT's: the error of removing one weight."""
        assert isinstance(statistics, Gram), "block OBS needs the inputs' Gram matrix"
        return removal_scores(weight, statistics, self.damping)

    def __call__(
        self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None, pattern: Pattern
    ) -> Pruned:
        """Search, then solve on the mask."""
        assert isinstance(statistics, Gram), "block OBS needs the inputs' Gram matrix"
        rows, width = weight.shape
        pattern.check((rows, width))
        check_pattern(self, pattern)
        assert isinstance(pattern, Block)
        check_finite(weight, "the weight")
        factor = statistics.factor(self.damping)
        gram = damped(statistics, factor.damping).double()
        height, breadth = pattern.size
        # Dead inputs carry nothing: their weights cost nothing, and are removed first.
        blocks = weight.masked_fill(statistics.squares == 0, 0).view(-1, height, width)
        kept = _choose(blocks, _inverse(gram).to(weight.dtype), pattern).repeat_interleave(breadth, 1)
        values = _solve(weight.double().view(-1, height, width), gram, kept)
        mask = kept.repeat_interleave(height, 0)
        return Pruned(values.view(rows, width).to(weight.dtype), mask, factor.damping, factor.tried)

    def work(self, shape: tuple[int, int], pattern: Pattern) -> float:
        """For each row of blocks 2 in^2 a removed column, of a matrix that shrinks, and a factorisation of the rest."""
        rows, width = shape
        height = pattern.size[0] if isinstance(pattern, Block) else 1
        left = 1 - pattern.sparsity
        return rows / height * width**3 * (2 / 3 * (1 - left**3) + left**3 / 3) + 2.0 * rows * width**2

    def shared_work(self, width: int) -> float:
        """Two factorisations and an inverse."""
        return 4 / 3 * width**3

    def workspace(self, shape: tuple[int, int]) -> int:
        """The matrices, the damped Gram and its inverse in float64, and the inverses of a chunk with a copy."""
        rows, width = shape
        return matrix_workspace(shape) + 16 * rows * width + 24 * width**2 + max(3 * _CHUNK_BYTES, 12 * width**2)


def _inverse(gram: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    return torch.cholesky_inverse(torch.linalg.cholesky(gram))


def _choose(
    blocks: Float[Tensor, "groups height in"], inverse: Float[Tensor, "in in"], pattern: Block
) -> Bool[Tensor, "groups across"]:
    """The mask of the blocks of a matrix, whose rows come in groups that share their blocks."""
    grid = replace(pattern, size=(1, 1))
    shape = (len(blocks), blocks.shape[2] // pattern.size[1])
    count = grid.zeros(shape)
    alone = pattern.over == "row"
    orders = _Orders(shape, count // shape[0] if alone else min(count, shape[1]), None if alone else count, blocks)
    size = max(_CHUNK_BYTES // inverse.nbytes, 1)
    for start in range(0, shape[0], size):
        part = slice(start, min(start + size, shape[0]))
        if not _search(blocks[part], inverse, pattern.size[1], orders, part):
            orders.forget(part)
            _search(blocks[part].double(), inverse.double(), pattern.size[1], orders, part)
    return grid.mask(orders.places())


class _Orders:
    """In which order each row of blocks loses its blocks, and at which costs.

    Args:
        shape: rows of blocks, blocks in each.
        steps: blocks that a row can lose at most.
        count: blocks that the matrix loses in all; None: every row takes all its steps.
        like: a tensor on the device of the result.
    """

    def __init__(self, shape: tuple[int, int], steps: int, count: int | None, like: Tensor) -> None:
        self.steps, self._shape, self._count = steps, shape, count
        # A block is only reached after those before it: it costs no less than the dearest of them.
        self._reached = torch.full((shape[0], steps), math.inf, dtype=torch.float64, device=like.device)
        self._order = torch.zeros(shape[0], steps, dtype=torch.long, device=like.device)

    def add(self, part: slice, step: int, blocks: Tensor, costs: Tensor) -> bool:
        """Note what some rows lose in a step; returns whether none of them can lose more.

        Args:
            part: the rows.
            step: from 0.
            blocks: one for each row.
            costs: likewise, float64.
        """
        if step:
            costs = torch.maximum(costs, self._reached[part, step - 1])
        self._reached[part, step], self._order[part, step] = costs, blocks
        if self._count is None or (step + 1) % _LOOK:
            return False
        known = self._reached[torch.isfinite(self._reached)]
        if len(known) < self._count:
            return False
        # Whatever else becomes known, the blocks that go are among those that cost no more than this.
        bound = known[lowest(known[None], self._count)[0]].max()
        return bool((costs > bound).all())

    def forget(self, part: slice) -> None:
        """Forget what some rows lose."""
        self._reached[part] = math.inf

    def places(self) -> Float[Tensor, "groups across"]:
        """The place of each block in the greedy order of the whole matrix; infinite where the search did not go."""
        by_step = self._reached.T
        ranked = ranks(by_step.flatten()).view(by_step.shape).T.double()
        places = torch.full(self._shape, math.inf, dtype=torch.float64, device=ranked.device)
        found = ranked.where(torch.isfinite(self._reached), math.inf)
        return places.scatter_reduce_(1, self._order, found, "amin")


def _search(
    blocks: Float[Tensor, "groups height in"], inverse: Float[Tensor, "in in"], size: int, orders: _Orders, part: slice
) -> bool:
    """Remove blocks of this many columns from some rows of blocks, one from each row at a time.

    Returns:
        Whether all inverses stayed positive definite, as rounding in float32 may prevent.
    """
    values, left = blocks.clone(), inverse.expand(len(blocks), -1, -1).clone()
    own, inside = torch.arange(len(blocks), device=blocks.device), torch.arange(size, device=blocks.device)
    names = torch.arange(blocks.shape[2] // size, device=blocks.device).expand(len(blocks), -1)
    gone = torch.zeros_like(names, dtype=torch.bool)
    missing, failed = 0, torch.zeros((), dtype=torch.bool, device=blocks.device)
    for step in range(orders.steps):
        costs, factors, broken = _costs(values, left, gone, size)
        failed |= broken
        cost, place = costs.min(1)
        if orders.add(part, step, names[own, place], cost):
            break
        gone[own, place] = True
        columns = place[:, None] * size + inside
        rows = left.gather(1, columns[..., None].expand(-1, -1, left.shape[2]))
        solved = torch.cholesky_solve(rows.double(), factors[own, place]).to(left.dtype)
        removed = values.gather(2, columns[:, None].expand(-1, values.shape[1], -1))
        with float32_products("ieee"):
            values.baddbmm_(removed, solved, alpha=-1)
            left.baddbmm_(rows.mT, solved, alpha=-1)
        missing += 1
        if missing >= _CUT * names.shape[1]:
            stay = (~gone).nonzero()[:, 1].view(len(blocks), -1)
            names, gone = names.gather(1, stay), torch.zeros_like(stay, dtype=torch.bool)
            columns = (stay[..., None] * size + inside).flatten(1)
            values = values.gather(2, columns[:, None].expand(-1, values.shape[1], -1))
            left = left[own[:, None, None], columns[:, :, None], columns[:, None]]
            missing = 0
    return not bool(failed)


def _costs(values: Tensor, left: Tensor, gone: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The costs of removing each block, and what they are computed with.

    Returns:
        Costs [groups, blocks], infinite for those that are gone; the lower factors of all M_BB; whether one has none.
    """
    groups, height, _ = values.shape
    blocks = gone.shape[1]
    pivots = left.view(groups, blocks, size, blocks, size).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).double()
    pivots[gone] = torch.eye(size, dtype=pivots.dtype, device=pivots.device)
    factors, info = torch.linalg.cholesky_ex(pivots)
    tiles = values.view(groups, height, blocks, size).permute(0, 2, 3, 1).double()
    halves = torch.linalg.solve_triangular(factors, tiles, upper=False)
    return halves.square().sum((2, 3)).masked_fill_(gone, math.inf), factors, (info != 0).any()


def _solve(
    blocks: Float[Tensor, "groups height in"], gram: Float[Tensor, "in in"], kept: Bool[Tensor, "groups in"]
) -> Float[Tensor, "groups height in"]:
    """The least-squares weights on a mask, in float64; zero outside it."""
    values = torch.zeros_like(blocks)
    most = int(kept.sum(1).max())
    size = max(_CHUNK_BYTES // max(8 * most**2, 1), 1)
    for start in range(0, len(blocks), size):
        part = slice(start, start + size)
        # The kept columns in their order; rows of blocks with fewer of them are filled up.
        columns = kept_first(kept[part])[:, :most]
        inside = kept[part].gather(1, columns)
        system = gram[columns[:, :, None], columns[:, None]]
        system.masked_fill_(~(inside[:, :, None] & inside[:, None]), 0)
        system.diagonal(dim1=1, dim2=2).masked_fill_(~inside, 1)
        places = columns[:, None].expand(-1, blocks.shape[1], -1)
        target = (blocks[part] @ gram).gather(2, places).masked_fill_(~inside[:, None], 0)
        solved = torch.cholesky_solve(target.mT, torch.linalg.cholesky(system)).mT
        values[part] = values[part].scatter(2, places, solved)
    return values
