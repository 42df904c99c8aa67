"""A model of one layer whose gradients are known, and its steps."""

from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """One layer in a list, and a head; the loss is a sum with known factors: these are the gradients."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 1, bias=False)])
        self.head = nn.Linear(4, 4)
        self.layers[0].weight = nn.Parameter(torch.tensor([weight]))

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.layers[0].weight
        return found

    def forward(self, slope: Tensor) -> Tensor:
        return (self.weight * slope).sum()


def step(model: Net, optimizer: torch.optim.Optimizer, slope: list[float], parts: int = 1) -> list[float]:
    """One step, and the model's weights before it, in its forward pass."""
    seen: list[float] = []
    for _ in range(parts):
        loss = model(torch.tensor([slope])) / parts
        seen = model.weight.detach()[0].tolist()
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return seen


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})
