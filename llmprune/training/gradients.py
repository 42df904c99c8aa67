"""Gradients of all weights, pruned ones too, which are taken before torch accumulates and exchanges them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llmprune.torchrun import processes


def accumulates(weight: nn.Parameter) -> bool:
    """Whether a weight has a gradient already, which the next one is added to."""
    return weight.grad is not None and bool(weight.grad.any())


def average(gradients: Mapping[str, Tensor]) -> None:
    """Average over the processes of DDP, in place: every one must choose the same masks."""
    if processes() > 1 and torch.distributed.is_initialized():
        for gradient in (gradients[name] for name in sorted(gradients)):  # in one order
            torch.distributed.all_reduce(gradient)
            gradient /= processes()
