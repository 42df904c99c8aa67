"""Swap removed and kept groups while that lowers the exact loss."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmprune.structures.remove.block_matrices import blocks, factor, times, traces

if TYPE_CHECKING:
    from llmprune.structures.remove.problem import Problem

# Entries of the pairs that are evaluated at once.
_EXCHANGES = 1 << 22

# A swap must gain this fraction of the greedy search's loss; smaller gains are rounding errors and could cycle.
_GAIN = 1e-6


def exchange(problem: "Problem", fraction: float, removed: Tensor) -> int:
    """Swap removed and kept groups, in place, while the exact loss falls; returns the number of swaps."""
    tableau = Tableau(problem, fraction, removed)
    for done in range(problem.settings.swaps):
        change, back, out = tableau.best()
        if not change < -_GAIN * tableau.loss:
            return done
        tableau.sweep(back, 1)
        tableau.sweep(out, -1)
        removed[back], removed[out] = False, True
    return problem.settings.swaps


class Tableau:
    """The tableau of the symmetric sweep operator: what removing or restoring each group would change.

    With S the kept and R the removed columns, M = (H_SS)^-1 and U = M H_SR:

        pivots  T = [[M, U], [U^T, H_RS U - H_RR]]      energies  K = F^T F,  F = [V_S, (V - W) H_R]

    Sweeping on group g, with D = T_gg^-1 and A = D T_g: (zero in the columns of g), moves it to the other side:

        T' = T - T_:g A,   F' = F - F_g A,   T'_g: = -|D| T_g:,   F'_g = -F_g |D|,   T'_gg = -D

    where |D| is whichever of D and -D is positive definite.
    """

    def __init__(self, problem: "Problem", fraction: float, removed: Tensor) -> None:
        self.size, self.removed = problem.size, removed
        self.partition = torch.arange(problem.groups, device=removed.device)
        self.partition //= problem.groups // problem.settings.partitions
        kept, gone = problem.columns(~removed), problem.columns(removed)
        damped = problem.damped(fraction)
        lower = factor(damped[kept][:, kept])
        across = damped[kept][:, gone]
        shares = torch.cholesky_solve(across, lower)
        surplus = damped[gone][:, gone] - across.T @ shares
        # F of the docstring: the refitted weight in the kept columns, half the loss's gradient in the removed ones.
        live = problem.weight.masked_fill(problem.dead, 0.0)
        rows = torch.empty_like(live)
        rows[:, kept] = live[:, kept] + live[:, gone] @ shares.T
        rows[:, gone] = -live[:, gone] @ surplus
        self.energies = rows.T @ rows
        # (W - V) H is zero in S, and V in R: the loss is tr((W - V) H W^T) over R.
        self.loss = -float((rows[:, gone] * live[:, gone]).sum(dtype=torch.float64))
        self.pivots = damped
        self.pivots[kept[:, None], kept] = torch.cholesky_inverse(lower)
        self.pivots[kept[:, None], gone] = shares
        self.pivots[gone[:, None], kept] = shares.T
        self.pivots[gone[:, None], gone] = -surplus

    def best(self) -> tuple[float, int, int]:
        """(change of the loss, group to restore, group to remove) of the best swap."""
        removed, kept = self.removed.nonzero().view(-1), (~self.removed).nonzero().view(-1)
        best = math.inf, -1, -1
        # All pairs at once would be [removed, kept, size, size]; chunks of the removed groups limit the memory.
        for some in removed.split(max(_EXCHANGES // (len(kept) * self.size**2), 1)):
            changes = self._changes(some, kept)
            # Each partition must keep losing the same number.
            changes.masked_fill_(self.partition[some][:, None] != self.partition[kept], math.inf)
            place = int(changes.argmin())
            change = float(changes.view(-1)[place])
            if change < best[0]:
                best = change, int(some[place // len(kept)]), int(kept[place % len(kept)])
        return best

    def _changes(self, back: Tensor, out: Tensor) -> Tensor:
        """[back, out], float64: the loss after swapping each pair, minus the current one."""
        pivots, energies = (blocks(matrix, self.size) for matrix in (self.pivots, self.energies))
        # Restoring a group gains tr(surplus^-1 gradient). The cost of then removing another one is read from the
        # tableau after that step, of which only one block is computed: the sweep's formulas for g = back, restricted
        # to `out`.
        surplus, gradient = -pivots[back, back].double(), energies[back, back].double()
        gains = traces(surplus, gradient)
        link = pivots[out, back[:, None]].double()
        share = times(link, torch.linalg.inv(surplus)[:, None])
        mixed = times(energies[out, back[:, None]].double(), share.mT)
        inverse = pivots[out, out].double() + times(share, link.mT)
        energy = energies[out, out].double() + mixed + mixed.mT + times(times(share, gradient[:, None]), share.mT)
        return traces(inverse, energy) - gains[:, None]

    def sweep(self, group: int, sign: int) -> None:
        """Move a group to the other side: 1 restores it, -1 removes it."""
        columns = slice(group * self.size, (group + 1) * self.size)
        pivot, energy = self.pivots[columns].clone(), self.energies[columns].clone()
        # The pivot of a removed group is negative definite.
        inverse = torch.cholesky_inverse(factor(-sign * pivot[:, columns].double())).to(pivot.dtype)
        share = -sign * inverse @ pivot
        share[:, columns] = 0
        # As in the solver: half of the quadratic term on each side.
        own = energy[:, columns].clone()
        energy -= 0.5 * own @ share
        self.pivots.addmm_(pivot.T, share, alpha=-1)
        self.energies.addmm_(share.T, energy, alpha=-1)
        self.energies.addmm_(energy.T, share, alpha=-1)
        self._write(self.pivots, columns, -inverse @ pivot, sign * inverse)
        self._write(self.energies, columns, -inverse @ (energy - 0.5 * own @ share), inverse @ own @ inverse)

    @staticmethod
    def _write(matrix: Tensor, columns: slice, rows: Tensor, block: Tensor) -> None:
        matrix[columns], matrix[:, columns] = rows, rows.T
        matrix[columns, columns] = block
