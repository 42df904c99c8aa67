"""Lottery tickets: find a sparse model by training, and train it again from its early weights.

Frankle and Carbin 2019, The Lottery Ticket Hypothesis, arXiv 1803.03635 (rewinding to the initialisation, k = 0);
Frankle, Dziugaite, Roy and Carbin 2020, Linear Mode Connectivity and the Lottery Ticket Hypothesis, arXiv 1912.05671
(rewinding to step k). The smallest weights of the whole model go. One stage is one cycle of training, pruning and
rewinding; of more stages, each prunes and rewinds, which finds better tickets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from llmprune.errors import TrainingError
from llmprune.patterns import NM
from llmprune.training.rules.magnitude import GradualMagnitude

Control = Literal["none", "random-ticket", "random-init"]


@dataclass(frozen=True, slots=True)
class Lottery(GradualMagnitude):
    """Gradual magnitude pruning in which each stage begins again from the weights of an early step.

    Attributes:
        rewind: k, the step to whose weights each stage returns, at least 0.
        control: what the last stage trains: the ticket ("none"), as many weights of each matrix in random places
            ("random-ticket"), or the ticket's places with newly initialised weights ("random-init").
    """

    rewind: int = 0
    control: Control = "none"

    def __post_init__(self) -> None:
        if self.rewind < 0:
            raise TrainingError(f"rewind is {self.rewind!r}", expected="the number of a step, at least 0")
        if self.control not in get_args(Control):
            raise TrainingError(f"control is {self.control!r}", expected=", ".join(get_args(Control)))


def random_ticket(
    kept: Mapping[str, Tensor], generator: torch.Generator, pattern: NM | None = None
) -> dict[str, Tensor]:
    """As many weights of each matrix, in random places.

    Args:
        kept: the ticket, bool [out, in].
        generator: on the CPU.
        pattern: N:M, with as many weights of each group; None: they may be anywhere.
    """
    if pattern is not None:
        return {name: _within(mask.reshape(-1, pattern.of), generator).view(mask.shape) for name, mask in kept.items()}
    return {
        name: mask.reshape(-1)[torch.randperm(mask.numel(), generator=generator).to(mask.device)].view(mask.shape)
        for name, mask in kept.items()
    }


def _within(groups: Tensor, generator: torch.Generator) -> Tensor:
    """Each row in an order of its own."""
    order = torch.multinomial(torch.ones(groups.shape), groups.shape[1], generator=generator)
    return groups.gather(1, order.to(groups.device))
