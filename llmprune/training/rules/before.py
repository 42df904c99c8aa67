"""Pruning before training, by the gradients of one batch: SNIP and GraSP.

Frankle, Dziugaite, Roy and Carbin 2021, Pruning Neural Networks at Initialization: Why Are We Missing the Mark?, arXiv
2009.08576, find both behind magnitude pruning after training, and no worse with their masks shuffled in each matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmprune.errors import TrainingError
from llmprune.training.rules.rule import Loss, Matrices, Moment, Rule, highest_left


class _Before(Rule):
    """Keeps the highest of scores that are computed once."""

    def choose(self, moment: Moment) -> dict[str, Tensor]:
        """The highest scores of those that are left."""
        return highest_left(moment.scores, moment)


@dataclass(frozen=True, slots=True)
class SNIP(_Before):
    """Keeps weights that the loss depends on most: |g * w|.

    Lee, Ajanthan and Torr 2019, SNIP: Single-shot Network Pruning based on Connection Sensitivity, arXiv 1810.02340,
    equation 6, without the division by the sum, which changes no order.
    """

    def first_scores(self, weights: Matrices, loss: Loss | None) -> dict[str, Tensor]:
        """|g * w| on a batch."""
        gradients = torch.autograd.grad(_required(loss, "snip")(1.0), _training(weights))
        return {
            name: (weight.detach() * gradient).abs()
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }


@dataclass(frozen=True, slots=True)
class GraSP(_Before):
    """Keeps weights that the flow of gradients depends on most: w * (H g), signed.

    Wang, Zhang and Grosse 2020, Picking Winning Tickets Before Training by Preserving Gradient Flow, arXiv 2002.07376,
    equation 8, whose score is the negative: it removes the highest.

    Attributes:
        temperature: by which logits are divided, above 0.
    """

    temperature: float = 200.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise TrainingError(f"temperature is {self.temperature!r}", expected="a number above 0")

    def first_scores(self, weights: Matrices, loss: Loss | None) -> dict[str, Tensor]:
        """W * (H g) on a batch."""
        needed = _required(loss, "grasp")
        parameters = _training(weights)
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
            gradients = torch.autograd.grad(needed(self.temperature), parameters, create_graph=True)
            flow = torch.stack([(gradient * gradient.detach()).sum() for gradient in gradients]).sum()
            products = torch.autograd.grad(flow, parameters)
        return {
            name: weight.detach() * product for (name, weight), product in zip(weights.items(), products, strict=True)
        }


def _training(weights: Matrices) -> list[Tensor]:
    if frozen := [name for name, weight in weights.items() if not weight.requires_grad]:
        raise TrainingError(
            f"{len(frozen)} matrices have no gradients to be chosen by, such as {frozen[0]}",
            expected="matrices that train",
            fix="exclude those that are frozen, or prune by magnitude",
        )
    return list(weights.values())


def _required(loss: Loss | None, rule: str) -> Loss:
    if loss is None:
        raise TrainingError(
            f"{rule} without a loss",
            expected="the loss of a batch, from whose gradients weights are chosen",
            fix="pass loss=lambda temperature: ..., the loss of a batch with its logits divided by the temperature",
        )
    return loss
