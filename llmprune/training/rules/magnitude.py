"""Gradual magnitude pruning: each stage zeroes the smallest weights that are left.

Zhu and Gupta 2017, To prune, or not to prune, arXiv 1710.01878, section 3. There, pruned weights keep their values and
may return when the others shrink; here they are gone, as in Han et al. 2015, so that zeros never become fewer.
"""

from dataclasses import dataclass

from torch import Tensor

from llmprune.training.rules.rule import Moment, Rule, highest_left


@dataclass(frozen=True, slots=True)
class GradualMagnitude(Rule):
    """Keeps the largest |w|."""

    def choose(self, moment: Moment) -> dict[str, Tensor]:
        """The largest of the weights that are left."""
        sizes = {name: weight.abs() for name, weight in moment.weights.items()}
        return highest_left(sizes, moment)
