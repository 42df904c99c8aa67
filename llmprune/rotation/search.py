"""Find a rotation: a random one, a Hadamard matrix, or one learned by gradient descent.

An orthogonal matrix is the Q of A = QR, so that A can be optimised without constraints.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llmprune.errors import NumericsError

_LEARNING_RATE = 0.03
_LARGEST_GRADIENT = 1.0

# The loss of a layer as a function of R and of the R2 of its KV heads, [heads, size, size], or None.
LayerLoss = Callable[[int, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Rotations of the whole model.

    Attributes:
        stream: R, of the residual stream, [hidden, hidden], float64, orthogonal.
        heads: layer -> R2 of its KV heads, [heads, size, size], float64; layers without it are left out.
    """

    stream: Float[Tensor, "hidden hidden"]
    heads: Mapping[int, Float[Tensor, "heads size size"]]


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """The result of a search.

    Attributes:
        rotation: the best one.
        losses: of every step, the first one without a rotation; the best is their minimum.
    """

    rotation: Rotation
    losses: tuple[float, ...]


def learn(
    size: int,
    heads: Mapping[int, tuple[int, int]],
    layers: int,
    loss: LayerLoss,
    *,
    steps: int,
    device: torch.device | str = "cpu",
    watch: Callable[[int, float], None] = lambda step, loss: None,
) -> Learned:
    """Minimise the sum of all layers' losses over the rotations, from the identity, and keep the best.

    Each layer's loss is differentiated by itself, so that only one layer has to be in memory.

    Args:
        size: of the residual stream.
        heads: layer -> (KV heads, size of a value), for the layers whose values are rotated, too.
        layers: how many there are.
        loss: of a layer, differentiable.
        steps: of Adam, at least 0.
        device: of the matrices.
        watch: told about each step and its loss.

    Raises:
        NumericsError: the loss is not finite.
    """
    stream = torch.eye(size, device=device).requires_grad_()
    free = {
        layer: torch.eye(width, device=device).repeat(count, 1, 1).requires_grad_()
        for layer, (count, width) in heads.items()
    }
    parameters = [stream, *free.values()]
    optimiser = torch.optim.Adam(parameters, lr=_LEARNING_RATE)
    best = [parameter.detach().clone() for parameter in parameters]
    losses: list[float] = []
    for step in range(steps + 1):
        optimiser.zero_grad()
        value = _descend(stream, free, layers, loss)
        if not math.isfinite(value):
            raise NumericsError(
                f"the loss of the rotation is {value} at step {step}",
                expected="a finite number",
                fix="check the calibration text and the model's activations",
            )
        if not losses or value < min(losses):
            best = [parameter.detach().clone() for parameter in parameters]
        losses.append(value)
        watch(step, value)
        torch.nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT)
        optimiser.step()
    orthogonal = [_orthogonal(parameter.double()) for parameter in best]
    return Learned(Rotation(orthogonal[0], dict(zip(free, orthogonal[1:], strict=True))), tuple(losses))


def random_rotation(size: int, heads: Mapping[int, tuple[int, int]], seed: int) -> Rotation:
    """Rotations drawn uniformly from all of them.

    Args:
        size: of the residual stream.
        heads: layer -> (KV heads, size of a value).
        seed: of the draw.
    """
    random = torch.Generator().manual_seed(seed)
    return _filled(size, heads, lambda width: _uniform(width, random))


def hadamard_rotation(size: int, heads: Mapping[int, tuple[int, int]], seed: int) -> Rotation:
    """Randomised Hadamard matrices; an odd factor of a size, of which there is none, has a random rotation of its own.

    Args:
        size: of the residual stream.
        heads: layer -> (KV heads, size of a value).
        seed: of the signs, and of the rotations of odd factors.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        odd = width // (width & -width)
        matrix = _uniform(odd, random).contiguous() if odd > 1 else torch.ones(1, 1, dtype=torch.float64)
        step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
        while len(matrix) < width:
            matrix = torch.kron(step, matrix)
        signs = torch.randint(2, (width, 1), generator=random, dtype=torch.float64) * 2 - 1
        return signs * matrix

    return _filled(size, heads, draw)


def _descend(stream: Tensor, free: Mapping[int, Tensor], layers: int, loss: LayerLoss) -> float:
    """The loss of all layers, its gradients added to those of the free matrices."""
    rotation = _orthogonal(stream)
    # The layers' gradients are collected here, and pass the QR factorisation once.
    at = rotation.detach().requires_grad_()
    total = 0.0
    for layer in range(layers):
        own = _orthogonal(free[layer]) if layer in free else None
        value = loss(layer, at, own)
        value.backward()
        total += float(value.detach())
    if at.grad is not None:
        rotation.backward(at.grad)
    return total


def _orthogonal(matrix: Tensor) -> Tensor:
    """Q of QR, with the signs that make R's diagonal positive: Q is then a continuous function, I for I."""
    q, r = torch.linalg.qr(matrix)
    signs = r.detach().diagonal(dim1=-2, dim2=-1).sign()
    return q * signs.where(signs != 0, 1.0)[..., None, :]


def _filled(size: int, heads: Mapping[int, tuple[int, int]], draw: Callable[[int], Tensor]) -> Rotation:
    stream = draw(size)
    own = {layer: torch.stack([draw(width) for _ in range(count)]) for layer, (count, width) in heads.items()}
    return Rotation(stream, own)


def _uniform(size: int, random: torch.Generator) -> Tensor:
    return _orthogonal(torch.randn(size, size, generator=random, dtype=torch.float64))
