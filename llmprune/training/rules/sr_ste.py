"""SR-STE: train N:M weights from dense ones that lie behind them.

Zhou et al. 2021, Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, arXiv 2102.04010, equation
9. The model computes with W * M; the gradient goes straight through to all of W, and pruned weights shrink as well, so
that masks settle. With Adam, the shrinking passes through its moments, as in the paper.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.errors import TrainingError
from llmprune.training.rules.rule import Moment, Rule


@dataclass(frozen=True, slots=True)
class SRSTE(Rule):
    """Keeps the largest weights after every step; meant for N:M, and defined for any sparsity.

    Attributes:
        decay: lambda, by which pruned weights shrink, at least 0.
    """

    latent: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    passes: ClassVar[bool] = True
    decay: float = 2e-4

    def __post_init__(self) -> None:
        if not self.decay >= 0:
            raise TrainingError(f"decay is {self.decay!r}", expected="a number of at least 0")

    @property
    def interval(self) -> int:
        """Every step."""
        return 1

    def choose(self, moment: Moment) -> dict[str, Tensor]:
        """The largest weights, whether they were pruned or not."""
        sizes = {name: weight.abs() for name, weight in moment.weights.items()}
        return moment.selection.masks(sizes, moment.sparsity)

    def gradient(self, gradient: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
        """Add lambda (1 - M) W."""
        return gradient + self.decay * (weight * ~kept)
