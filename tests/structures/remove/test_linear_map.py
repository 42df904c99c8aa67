"""The linear map that stands for removed layers, beside a plain float64 fit."""

import pytest
import torch
from torch import Tensor

from llmprune.errors import NumericsError
from llmprune.structures.remove.linear_map import LinearMap

SIZE = 7


def rows(tokens: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """m, y and t of some tokens; one of them is a thousand times larger."""
    random = torch.Generator().manual_seed(0)
    mlp, outputs, targets = (torch.randn(tokens, SIZE, generator=random) for _ in range(3))
    targets[5] *= 1000
    return mlp, outputs, targets


def fitted(mlp: Tensor, outputs: Tensor, targets: Tensor, damping: float, parts: int = 1) -> Tensor:
    fit = LinearMap(SIZE, torch.device("cpu"))
    for part in zip(*(rows.chunk(parts) for rows in (mlp, outputs, targets)), strict=True):
        fit.add(*part)
    return fit.solve(damping)


@pytest.mark.parametrize("damping", [0.0, 0.01, 3.0])
def test_it_is_the_weighted_ridge_solution(damping: float) -> None:
    mlp, outputs, targets = (tensor.double() for tensor in rows())
    weight = 1 / targets.norm(dim=1, keepdim=True)
    scaled = mlp * weight
    ridge = damping * scaled.square().sum() / SIZE
    # The ridge as further rows of an ordinary least-squares problem.
    left = torch.cat([scaled, ridge.sqrt() * torch.eye(SIZE, dtype=torch.float64)])
    right = torch.cat([(targets - outputs) * weight, torch.zeros(SIZE, SIZE, dtype=torch.float64)])
    wanted = torch.eye(SIZE, dtype=torch.float64) + torch.linalg.lstsq(left, right).solution.T
    assert torch.allclose(fitted(*rows(), damping), wanted, rtol=0, atol=1e-5)
    assert torch.allclose(fitted(*rows(), damping, parts=4), wanted, rtol=0, atol=1e-5)


def test_a_map_that_exists_is_found() -> None:
    mlp, outputs, _ = rows()
    true = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    found = fitted(mlp, outputs, outputs - mlp + mlp @ true.T, 0.0)
    assert torch.allclose(found, true.double(), rtol=0, atol=1e-4)


def test_damping_pulls_it_towards_the_layer_as_it_is() -> None:
    eye = torch.eye(SIZE, dtype=torch.float64)
    far, near = (float((fitted(*rows(), damping) - eye).norm()) for damping in (0.1, 1e4))
    assert near < 1e-3 < far


def test_a_fit_that_is_not_unique_is_refused() -> None:
    mlp, outputs, targets = rows(SIZE - 1)
    with pytest.raises(NumericsError, match="damping of 0") as raised:
        fitted(mlp, outputs, targets, 0.0)
    assert "structures.depth.damping" in str(raised.value)
    fitted(mlp, outputs, targets, 0.01)
