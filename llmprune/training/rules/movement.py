"""Movement pruning: keep weights that move away from zero in training.

Sanh, Wolf and Rush 2020, Movement Pruning: Adaptive Sparsity by Fine-Tuning, arXiv 2005.07683. The model computes with
W * M(S). The gradient of a score is that of its weight in the product, times the weight (straight through; equation 2),
also where it is pruned: such weights keep their values and may come back.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.errors import TrainingError
from llmprune.training.rules.rule import Loss, Matrices, Moment, Rule

# Of a matrix, soft movement prunes no more than all but this share (as the authors' code does).
_LEAST = 0.005


@dataclass(frozen=True, slots=True)
class Movement(Rule):
    """Hard movement pruning: keeps the highest scores, as many as the schedule says.

    Attributes:
        score_rate: Adam's learning rate of the scores, above 0.
    """

    latent: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    score_rate: float = 1e-2

    def __post_init__(self) -> None:
        if not self.score_rate > 0:
            raise TrainingError(f"score_rate is {self.score_rate!r}", expected="a learning rate above 0")

    @property
    def interval(self) -> int:
        """Every step."""
        return 1

    def choose(self, moment: Moment) -> dict[str, Tensor]:
        """The highest scores."""
        return moment.selection.masks(moment.scores, moment.sparsity)

    def first_scores(self, weights: Matrices, loss: Loss | None) -> dict[str, Tensor]:
        """Zero."""
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}


@dataclass(frozen=True, slots=True)
class SoftMovement(Rule):
    """Soft movement pruning: keeps scores whose sigmoid is above a threshold, and a penalty lowers them all.

    Threshold and penalty rise with the schedule, to their values at its end. How many weights are pruned follows from
    the penalty; the schedule's sparsities only say how fast both rise.

    Attributes:
        score_rate: Adam's learning rate of the scores, above 0.
        threshold: of the sigmoid in the end, in (0, 1).
        strength: lambda, by which the mean sigmoid of all scores counts in the loss in the end, at least 0.
    """

    latent: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    score_rate: float = 1e-2
    threshold: float = 0.1
    strength: float = 400.0

    def __post_init__(self) -> None:
        checks = (
            ("score_rate", self.score_rate > 0, "a learning rate above 0"),
            ("threshold", 0 < self.threshold < 1, "a number between 0 and 1"),
            ("strength", self.strength >= 0, "at least 0"),
        )
        for name, valid, expected in checks:
            if not valid:
                raise TrainingError(f"{name} is {getattr(self, name)!r}", expected=expected)

    @property
    def interval(self) -> int:
        """Every step."""
        return 1

    def choose(self, moment: Moment) -> dict[str, Tensor]:
        """Scores above the threshold of now; of each matrix at least a few."""
        bound = self.threshold * moment.sparsity / moment.end
        masks = {name: score.sigmoid() > bound for name, score in moment.scores.items()}
        for name, mask in masks.items():
            if int(mask.count_nonzero()) < _LEAST * mask.numel():
                masks[name] = moment.selection.masks({name: moment.scores[name]}, 1 - _LEAST)[name]
        return masks

    def first_scores(self, weights: Matrices, loss: Loss | None) -> dict[str, Tensor]:
        """2.2 each, whose sigmoid is 0.9, as in the authors' code."""
        return {name: torch.full_like(weight, 2.197) for name, weight in weights.items()}

    def penalty(self, scores: Matrices, share: float) -> dict[str, Tensor]:
        """The gradient of lambda times the mean sigmoid of all scores."""
        factor = self.strength * share / sum(score.numel() for score in scores.values())
        slopes = {name: score.sigmoid() for name, score in scores.items()}
        return {name: slope * (1 - slope) * factor for name, slope in slopes.items()}
