"""ALPS: ADMM with a rising penalty, then conjugate gradient on the mask (Meng et al. 2024, arXiv 2406.07831).

Minimise tr((W - B) G (W - B)^T) subject to B = D, with D in the pattern: B solves the regression with a penalty rho
for its distance from D, D is the projection of B + V / rho, and V += rho (B - D). Every few iterations rho grows, the
faster the more the mask still changes; when it no longer changes, the kept weights are refitted on it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.errors import RecipeError
from llmprune.methods.admm import Alternating, Scaled
from llmprune.methods.method import matrix_workspace
from llmprune.methods.refit import least_squares
from llmprune.patterns import Pattern
from llmprune.precision import float32_products

# The penalty grows by a factor if more than this share of the kept weights changed since the last look.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


@dataclass(frozen=True)
class ALPS(Alternating):
    """Find mask and weights by ADMM, then refit the weights.

    Attributes:
        damping: added to the diagonal of the scaled Gram, >= 0.
        penalty: the first rho, > 0 (the paper's 0.1).
        every: iterations between two looks at the mask, >= 1 (the paper's 3).
        iterations: of ADMM at most, >= 1; it usually ends earlier, when the mask stands still.
        refit: iterations of conjugate gradient at most, >= 0 (the paper's 10).
    """

    damping: float = 0.01
    penalty: float = 0.1
    every: int = 3
    iterations: int = 300
    refit: int = 20

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise RecipeError(f"alps.damping is {self.damping}", expected="a fraction of the diagonal, >= 0")
        if not self.penalty > 0:
            raise RecipeError(f"alps.penalty is {self.penalty}", expected="a number > 0")
        for knob, least in (("every", 1), ("iterations", 1), ("refit", 0)):
            if getattr(self, knob) < least:
                raise RecipeError(f"alps.{knob} is {getattr(self, knob)}", expected=f"iterations, >= {least}")

    def solve(self, problem: Scaled, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Alternate until the mask stands still, then refit."""
        values, mask = self._alternate(problem, pattern)
        return least_squares(problem.weight, values, mask, problem.gram, self.refit), mask

    def _alternate(self, problem: Scaled, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """ADMM; returns the projection and its mask."""
        target, penalty = problem.target, self.penalty
        mask = seen = pattern.mask(problem.weight.square())
        projected, multipliers = problem.weight * mask, torch.zeros_like(problem.weight)
        solve = problem.inverse(penalty)
        with float32_products("ieee"):
            for step in range(1, self.iterations + 1):
                solution = (target - multipliers + penalty * projected) @ solve
                shifted = solution + multipliers / penalty
                mask = pattern.mask(shifted.square())
                projected = shifted * mask
                multipliers += penalty * (solution - projected)
                if step % self.every:
                    continue
                changed = int((mask != seen).count_nonzero()) / max(2 * int(mask.count_nonzero()), 1)
                if not changed:
                    break
                penalty *= next(factor for share, factor in _GROWTH if changed > share)
                solve, seen = problem.inverse(penalty), mask
        return projected, mask

    def work(self, shape: tuple[int, int], pattern: Pattern) -> float:
        """2 out in^2 an iteration and in^3 a look, for 40 iterations (27 to 42 on the bundled model), and the refit."""
        rows, width = shape
        usual = min(self.iterations, 40)
        return 2.0 * rows * width**2 * (usual + self.refit + 2) + width**3 * (1 + usual / self.every)

    def workspace(self, shape: tuple[int, int]) -> int:
        """The matrices, six more of their shape, and three square ones: the scaled Gram, its factor and inverse."""
        rows, width = shape
        return matrix_workspace(shape) + 24 * rows * width + 12 * width**2
