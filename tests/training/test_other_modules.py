"""Copies, compiled models and models with masks of torch, in `sparsify`."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from llmprune import sparsify
from llmprune.errors import ModelError


class Net(nn.Module):
    """One layer in a list; the loss is a sum with known factors: these are the gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 1, bias=False)])
        self.layers[0].weight = nn.Parameter(torch.tensor([[4.0, -1.0, 3.0, 2.0]]))

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.layers[0].weight
        return found

    def forward(self, slope: Tensor) -> Tensor:
        return (self.weight * slope).sum()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def step(model: Net, optimizer: torch.optim.Optimizer, slope: list[float]) -> list[float]:
    """One step, and the model's weights before it, in its forward pass."""
    loss = model(torch.tensor([slope]))
    seen: list[float] = model.weight.detach()[0].tolist()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_trains_by_itself(duplicate: Callable[[Net], Net]) -> None:
    model = Net()
    with sparsify(model, "magnitude", {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 2}) as masks:
        twin = duplicate(model)
        assert step(twin, sgd(twin), [1.0, 5.0, 1.0, 10.0]) == [4.0, -1.0, 3.0, 2.0]
        assert twin.weight[0].tolist() == [pytest.approx(value) for value in (3.9, -1.5, 2.9, 1.0)]
        assert masks.sparsity == masks.state.step == 0
        assert step(model, sgd(model), [1.0, 1.0, 1.0, 1.0]) == [4.0, 0.0, 3.0, 0.0]


def test_a_model_may_be_compiled_before_or_afterwards() -> None:
    schedule = {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 2}
    for before in (True, False):
        torch._dynamo.reset()
        model = Net()
        compiled: Any = torch.compile(model, backend="eager")
        with sparsify(compiled if before else model, "magnitude", schedule) as masks:
            optimizer = sgd(model)
            for _ in range(2):
                compiled(torch.tensor([[1.0, 5.0, 1.0, 1.0]])).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert model.weight[0].tolist() == [pytest.approx(value) for value in (3.8, 0.0, 2.8, 0.0)]
        assert masks.masks.keys() == {"layers.0.weight"}
    torch._dynamo.reset()


def test_masks_of_torch_are_made_permanent_first() -> None:
    model = Net()
    prune.l1_unstructured(model.layers[0], "weight", 0.5)
    with pytest.raises(ModelError, match=r"the weight of layers\.0 is computed"):
        sparsify(model, "magnitude", {"every": 2})
