"""What a rule is: how masks follow from weights, gradients and scores. Rules know neither models nor optimizers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llmprune.patterns import NM, Unstructured, keep_highest

# Name of a matrix -> tensor [out, in]; masks are bool, True where a weight is kept.
Matrices = Mapping[str, Tensor]
Scope = Literal["matrix", "model"]

# The loss of a batch with its logits divided by a temperature: a scalar with a graph.
Loss = Callable[[float], Tensor]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which weights are compared with each other.

    Attributes:
        scope: "matrix": those of a matrix, each of which has the same sparsity; "model": those of all matrices.
        pattern: N:M: those of each group along the input; a stage on the way there keeps more of each group.
    """

    scope: Scope = "matrix"
    pattern: NM | None = None

    def masks(self, scores: Matrices, sparsity: float) -> dict[str, Tensor]:
        """Keep the highest scores.

        Args:
            scores: of each weight, [out, in], any real dtype, no NaN; among ties the lower index is pruned first.
            sparsity: the fraction to prune, in [0, 1).

        Raises:
            NumericsError: a score is NaN.
            PatternError: the pattern does not divide a matrix.
        """
        if self.pattern is not None:
            pattern = self.at(sparsity)
            return {name: pattern.mask(score) for name, score in scores.items()}
        if self.scope == "matrix":
            return {name: Unstructured(sparsity, "matrix").mask(score) for name, score in scores.items()}
        flat = torch.cat([score.reshape(-1) for score in scores.values()])
        kept = keep_highest(flat[None], int(sparsity * len(flat) + 0.5))[0]
        parts = kept.split([score.numel() for score in scores.values()])
        return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}

    def at(self, sparsity: float) -> NM:
        """The pattern of a stage: the fewest kept of each group with which no more than the sparsity is pruned."""
        assert self.pattern is not None
        size = self.pattern.of
        removed = int(sparsity * size + 1e-6)
        return NM(max(self.pattern.keep, size - removed), size)


@dataclass(frozen=True, slots=True)
class Moment:
    """What a rule sees when it chooses masks.

    Attributes:
        step: optimizer steps so far.
        steps: of the whole training.
        begins: whether a stage begins; otherwise masks are chosen anew within one.
        sparsity: what the schedule asks for now.
        end: what it asks for in the end.
        selection: which weights are compared.
        weights: [out, in]; of a rule that is latent, those outside the forward pass.
        kept: the masks so far.
        gradients: of the loss with respect to every weight, pruned ones too, in the last step, for rules that watch;
            without matrices that it did not use, such as experts without tokens.
        scores: for rules that have them.
        generator: for random choices; on the CPU.
    """

    step: int
    steps: int
    begins: bool
    sparsity: float
    end: float
    selection: Selection
    weights: Matrices
    kept: Matrices
    gradients: Matrices = field(default_factory=dict)
    scores: Matrices = field(default_factory=dict)
    generator: torch.Generator | None = None

    @property
    def pattern(self) -> NM | None:
        """N:M of this stage; None: zeros may be anywhere."""
        return None if self.selection.pattern is None else self.selection.at(self.sparsity)


class Rule(ABC):
    """A way to choose masks: a frozen dataclass of knobs, without any state.

    Attributes:
        latent: pruned weights keep values, which the forward pass does not see, and may come back with them; otherwise
            they are zero.
        watches: needs the gradients of all weights in the step before masks are chosen.
        grows: weights that are zero may be kept again; otherwise the zeros that a model begins with stay.
        passes: gradients of pruned weights reach the optimizer, through `gradient`; otherwise they are masked.
    """

    latent: ClassVar[bool] = False
    watches: ClassVar[bool] = False
    grows: ClassVar[bool] = False
    passes: ClassVar[bool] = False

    @property
    def interval(self) -> int:
        """Steps after which masks are chosen anew within a stage; 0: only when a stage begins."""
        return 0

    @property
    def score_rate(self) -> float:
        """Adam's learning rate of scores that are trained with the weights; 0: there are none.

        The gradient of a score is that of the weight in the forward pass, times the weight.
        """
        return 0.0

    @abstractmethod
    def choose(self, moment: Moment) -> dict[str, Tensor]:
        """The masks from now on, for every matrix, bool [out, in]."""

    def gradient(self, gradient: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
        """What the optimizer gets where `passes` is set.

        Args:
            gradient: of the loss with respect to the weights of the forward pass, pruned ones too.
            weight: of the same shape, outside the forward pass.
            kept: the mask, bool.
        """
        return gradient * kept

    def first_scores(self, weights: Matrices, loss: Loss | None) -> dict[str, Tensor]:
        """The scores before training, each in the shape of its weights; empty for rules without any.

        Args:
            weights: parameters that require gradients, by their own names, in their own shapes.
            loss: of a batch; None: there is none.

        Raises:
            TrainingError: the rule needs a loss.
        """
        return {}

    def penalty(self, scores: Matrices, share: float) -> dict[str, Tensor]:
        """What is added to the gradients of scores, each in its shape; empty: nothing.

        Args:
            scores: of all parameters.
            share: of the schedule's last sparsity that it has reached by now, in [0, 1].
        """
        return {}


def highest_left(scores: Matrices, moment: Moment) -> dict[str, Tensor]:
    """Keep the highest scores of the weights that are left; no pruned one returns, even if more are than asked for."""
    left = {name: score.masked_fill(~moment.kept[name], -torch.inf) for name, score in scores.items()}
    masks = moment.selection.masks(left, moment.sparsity)
    return {name: mask & moment.kept[name] for name, mask in masks.items()}
