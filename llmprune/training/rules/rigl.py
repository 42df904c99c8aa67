"""RigL: drop the smallest weights, and grow as many where the gradient is largest.

Evci, Gale, Menick, Castro and Elsen 2020, Rigging the Lottery, arXiv 1911.11134, section 3; as in the authors' code, a
weight that was dropped may be grown again at once, and keeps its value then.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llmprune.errors import TrainingError
from llmprune.patterns import NM, keep_highest
from llmprune.training.rules.rule import Moment, Rule, highest_left


@dataclass(frozen=True, slots=True)
class RigL(Rule):
    """Moves zeros to other places, at an unchanged number in each matrix, or each group; grown weights start from zero.

    Attributes:
        interval: steps between two moves, at least 1.
        fraction: alpha, the share of kept weights that the first one moves, in (0, 1); it falls along a cosine.
        until: share of the training after which no zero moves any more, in (0, 1].
        initial: which weights are pruned first: "random" (from scratch) or the smallest ("magnitude").
    """

    watches: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    interval: int = 100
    fraction: float = 0.3
    until: float = 0.75
    initial: Literal["random", "magnitude"] = "magnitude"

    def __post_init__(self) -> None:
        checks = (
            ("interval", self.interval >= 1, "at least one step"),
            ("fraction", 0 < self.fraction < 1, "a number between 0 and 1"),
            ("until", 0 < self.until <= 1, "above 0 and at most 1"),
            ("initial", self.initial in ("random", "magnitude"), "random or magnitude"),
        )
        for name, valid, expected in checks:
            if not valid:
                raise TrainingError(f"{name} is {getattr(self, name)!r}", expected=expected)

    def choose(self, moment: Moment) -> dict[str, Tensor]:
        """When a stage begins, as many as it asks for; within a stage, the same number in other places."""
        if moment.begins:
            scores = {name: weight.abs() for name, weight in moment.weights.items()}
            if self.initial == "random" and all(bool(mask.all()) for mask in moment.kept.values()):
                random = {name: torch.rand(w.shape, generator=moment.generator) for name, w in scores.items()}
                scores = {name: value.to(scores[name].device) for name, value in random.items()}
            return highest_left(scores, moment)
        if moment.step >= self.until * moment.steps:
            return dict(moment.kept)
        share = self.fraction / 2 * (1 + math.cos(math.pi * moment.step / (self.until * moment.steps)))
        return {
            name: _moved(weight.abs(), moment.gradients[name].abs(), moment.kept[name], share, moment.pattern)
            if name in moment.gradients
            else moment.kept[name]
            for name, weight in moment.weights.items()
        }


def _moved(size: Tensor, slope: Tensor, kept: Tensor, share: float, pattern: NM | None) -> Tensor:
    """Masks [out, in] with a share of the kept weights moved; with a pattern, each within its group."""
    count = int(kept.count_nonzero())
    moving = int(share * count)
    total = kept.numel()
    sizes = size.masked_fill(~kept, -torch.inf).reshape(1, -1)
    staying = keep_highest(sizes, total - count + moving).view(kept.shape)
    if pattern is not None:
        return pattern.mask(slope.masked_fill(staying, torch.inf))  # whose groups lack as many as they have dropped
    slopes = slope.masked_fill(staying, -torch.inf).reshape(1, -1)
    return staying | keep_highest(slopes, total - moving).view(kept.shape)
