"""Remove groups of input columns with the least error in the matrix's output, and refit the kept columns.

The objective is tr((W - V) H (W - V)^T), with H the damped Hessian (the inputs' Gram matrix X X^T) and V zero in the
removed groups (structured optimal brain surgeon: ZipLM, arXiv 2302.04089; OSSCAR, arXiv 2403.12983; SlimGPT, arXiv
2412.18110). With M = H^-1 and K = V^T V, restricted to the remaining columns, removing group g and refitting everything
else costs

    tr(M_gg^-1 K_gg),

and afterwards, with A = M_gg^-1 M_g:,

    M' = M - M_:g A,        K' = K - A^T K_g: - K_:g A + A^T K_gg A.

So the search works on two [in, in] matrices and never touches the [out, in] weight. Like a pivoted Cholesky
factorisation it is lazy: each step updates only the diagonal blocks and the rows of the removed group; the rest is
updated in panels, by matmuls. Every removal is therefore exactly greedy, at the speed of batched removal: 6 in^2 FLOPs
per removed column, in^3 for the inverse, 2 in^2 out for K, and about as much again for swaps. Memory: about five
[in, in] matrices. At 14336 x 4096 and 25 % that is 9e12 FLOPs and, in float32, 4 GB.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmprune.errors import PatternError
from llmprune.structures.remove.block_matrices import (
    Breakdown,
    columns_by_group,
    diagonal_blocks,
    factor,
    times,
    traces,
)
from llmprune.structures.remove.exchange import exchange
from llmprune.structures.remove.problem import GroupRemoval, Problem, RemovalSettings

# Number of removed columns whose updates are applied to the whole matrices at once.
_PANEL = 128


def remove_groups(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    group_size: int,
    remove: int,
    settings: RemovalSettings | None = None,
) -> GroupRemoval:
    """Remove the groups of input columns for which the other columns compensate best.

    Large matrices are computed in the dtype of the Hessian, the diagonal blocks in float64.

    Args:
        weight: [out, in], float32 or float64; not changed.
        gram: [in, in], the Hessian X X^T of the inputs, symmetric, float32 or float64; not changed.
        group_size: number of consecutive columns in a group: 1 for FFN channels, more for heads and KV groups.
        remove: number of groups to remove, in [0, in / group_size].
        settings: damping, swaps, partitions, refit.

    Raises:
        PatternError: the groups do not divide the width, or `remove` does not fit them.
        NumericsError: a value is not finite, or no damping up to 1 makes the Hessian positive definite.

    Example:
        >>> x = torch.randn(64, 4, dtype=torch.float64)
        >>> x[:, 2] = x[:, 0] + x[:, 1]
        >>> removal = remove_groups(torch.ones(3, 4, dtype=torch.float64), x.T @ x, 1, 1, RemovalSettings(damping=1e-6))
        >>> int(removal.removed) in (0, 1, 2), removal.error < 1e-9
        (True, True)
    """
    settings = settings or RemovalSettings()
    problem = Problem(weight, gram, group_size, settings)
    _check_count(remove, problem.groups, settings.partitions)

    def search(fraction: float) -> tuple[Tensor, list[float], int]:
        removed, costs = _eliminate(problem, fraction, remove)
        swaps = exchange(problem, fraction, removed) if settings.swaps and 0 < remove < problem.groups else 0
        return removed, costs, swaps

    return problem.solve(search)


def refit_groups(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    group_size: int,
    removed: Int[Tensor, " removed"],
    settings: RemovalSettings | None = None,
) -> GroupRemoval:
    """Remove given groups, chosen by any score, and refit the others as `remove_groups` does.

    Args:
        weight: as for `remove_groups`.
        gram: as for `remove_groups`.
        group_size: as for `remove_groups`.
        removed: indices of distinct groups, in any order.
        settings: damping and refit; the other settings only affect the search.

    Raises:
        PatternError: the groups do not divide the width, or an index is out of range or repeated.
        NumericsError: as for `remove_groups`.
    """
    problem = Problem(weight, gram, group_size, settings or RemovalSettings())
    inside = [0 <= index < problem.groups for index in removed.tolist()]
    if not all(inside) or len(removed.unique()) < len(removed):
        raise PatternError(
            f"groups {removed.tolist()} of a matrix with {problem.groups} groups",
            expected=f"distinct indices below {problem.groups}",
        )
    gone = torch.zeros(problem.groups, dtype=torch.bool, device=weight.device)
    gone[removed] = True
    return problem.solve(lambda fraction: (gone, [], 0))


def _eliminate(problem: "Problem", fraction: float, remove: int) -> tuple[Tensor, list[float]]:
    """Repeatedly remove the cheapest group; returns the mask of removed groups and the cost of each removal."""
    removed = torch.zeros(problem.groups, dtype=torch.bool, device=problem.gram.device)
    costs: list[float] = []
    if remove == 0:
        return removed, costs
    state = _Elimination(problem, fraction)
    counts = removed.new_zeros(problem.settings.partitions, dtype=torch.int64)
    for _ in range(remove):
        # In rounds, so that every partition loses its first group before any loses its second.
        waiting = (counts == counts.min()).repeat_interleave(problem.groups // len(counts))
        prices = state.prices().masked_fill(removed | ~waiting, math.inf)
        group = int(prices.argmin())
        costs.append(float(prices[group]))
        if not math.isfinite(costs[-1]):
            raise Breakdown
        state.remove(group)
        removed[group] = True
        counts[group // (problem.groups // len(counts))] += 1
    return removed, costs


class _Elimination:
    """M and K of the module's docstring, updated in panels; their diagonal blocks are always up to date."""

    def __init__(self, problem: "Problem", fraction: float) -> None:
        # torch.cholesky_inverse fills one triangle and mirrors it: M is exactly symmetric.
        self.inverse = torch.cholesky_inverse(factor(problem.damped(fraction)))
        # A dead input contributes nothing, whatever its weights are.
        live = problem.weight.masked_fill(problem.dead, 0.0)
        self.energy = live.T @ live
        self.size = problem.size
        self.inverse_blocks = diagonal_blocks(self.inverse, self.size)
        self.energy_blocks = diagonal_blocks(self.energy, self.size)
        room = max(_PANEL // self.size, 1) * self.size
        # Pending: M -= roots^T roots, K -= shares^T energies + energies^T shares.
        self.roots, self.shares, self.energies = (self.inverse.new_empty(room, len(self.inverse)) for _ in range(3))
        self.pending = 0

    def prices(self) -> Tensor:
        """[groups], float64: the cost of removing each group next."""
        return traces(self.inverse_blocks, self.energy_blocks)

    def remove(self, group: int) -> None:
        """Remove a group."""
        columns = slice(group * self.size, (group + 1) * self.size)
        inverse, energy = self._rows(columns)
        # With M_gg = L L^T and roots = L^-1 M_g:, M' = M - roots^T roots is symmetric despite rounding, and A is
        # L^-T roots.
        lower = factor(self.inverse_blocks[group]).to(inverse.dtype)
        root = torch.linalg.solve_triangular(lower, inverse, upper=False)
        share = torch.linalg.solve_triangular(lower.mT, root, upper=True)
        # Split A^T K_gg A in halves: with E = K_g: - K_gg A / 2, K' = K - A^T E - E^T A takes two products of panels
        # instead of three.
        energy -= 0.5 * energy[:, columns] @ share
        place = slice(self.pending, self.pending + self.size)
        self.roots[place], self.shares[place], self.energies[place] = root, share, energy
        self.pending += self.size
        # Prices need only diagonal blocks, which are updated immediately, in float64; the rest is deferred in panels.
        by_group = [columns_by_group(rows, self.size) for rows in (root, share, energy)]
        self.inverse_blocks -= times(by_group[0].mT, by_group[0])
        change = times(by_group[1].mT, by_group[2])
        self.energy_blocks -= change + change.mT
        if self.pending == len(self.roots):
            self._flush()

    def _rows(self, columns: slice) -> tuple[Tensor, Tensor]:
        """The current rows of M and K."""
        roots, shares, energies = (pending[: self.pending] for pending in (self.roots, self.shares, self.energies))
        # Apply pending updates to the few rows that are needed now.
        inverse = self.inverse[columns] - roots[:, columns].T @ roots
        energy = self.energy[columns] - shares[:, columns].T @ energies - energies[:, columns].T @ shares
        return inverse, energy

    def _flush(self) -> None:
        # One [in, panel] by [panel, in] matmul for many removals: limited by compute, not by memory bandwidth.
        self.inverse.addmm_(self.roots.T, self.roots, alpha=-1)
        self.energy.addmm_(self.shares.T, self.energies, alpha=-1)
        self.energy.addmm_(self.energies.T, self.shares, alpha=-1)
        self.pending = 0


def _check_count(remove: int, groups: int, partitions: int) -> None:
    if not 0 <= remove <= groups:
        raise PatternError(f"{remove} of {groups} groups are to be removed", expected=f"a number in [0, {groups}]")
    if groups % partitions or remove % partitions:
        raise PatternError(
            f"{remove} of {groups} groups are to be removed evenly from {partitions} partitions",
            expected="multiples of the partitions",
            fix=f"remove {remove // partitions * partitions} groups, or leave partitions at 1",
        )
