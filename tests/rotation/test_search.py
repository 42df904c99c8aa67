"""Rotations: orthogonal, repeatable, and better than what they began with."""

import pytest
import torch
from torch import Tensor

from llmprune.errors import NumericsError
from llmprune.patterns import parse
from llmprune.rotation.loss import Reader, log_dropped, reader_scores
from llmprune.rotation.search import hadamard_rotation, learn, random_rotation

SIZE, HEADS = 12, {1: (2, 6)}


def is_orthogonal(matrix: Tensor) -> bool:
    return bool(torch.allclose(matrix @ matrix.mT, torch.eye(matrix.shape[-1]).double().expand_as(matrix), atol=1e-12))


def mixed_loss(layer: int, rotation: Tensor, heads: Tensor | None) -> Tensor:
    """Lowest where the rotation undoes one by which concentrated weights were spread."""
    spread = random_rotation(SIZE, {}, 7).stream.float()
    sparse = torch.zeros(20, SIZE)
    sparse[torch.arange(20), torch.arange(20) % SIZE] = 1.0
    total = log_dropped(reader_scores(Reader(sparse @ spread.T), torch.ones(SIZE), rotation), parse("0.5/row"))
    return total if heads is None else total + (heads[:, 0, 1] - 0.5).square().sum()


@pytest.mark.parametrize("draw", [random_rotation, hadamard_rotation])
@pytest.mark.parametrize("size", [1, 2, 8, 12, 15])
def test_drawn_rotations_are_orthogonal_and_repeatable(draw, size: int) -> None:
    one, same, other = (draw(size, HEADS, seed) for seed in (0, 0, 1))
    assert is_orthogonal(one.stream)
    assert one.heads[1].shape == (2, 6, 6)
    assert is_orthogonal(one.heads[1])
    assert torch.equal(one.stream, same.stream)
    assert torch.equal(one.heads[1], same.heads[1])
    assert size == 1 or not torch.equal(one.stream, other.stream)


def test_a_power_of_two_is_all_hadamard() -> None:
    entries = hadamard_rotation(16, {}, 0).stream.abs()
    torch.testing.assert_close(entries, torch.full_like(entries, 0.25))


def test_the_search_starts_at_the_identity_and_keeps_the_best() -> None:
    steps: list[tuple[int, float]] = []
    found = learn(SIZE, HEADS, 2, mixed_loss, steps=60, watch=lambda step, loss: steps.append((step, loss)))
    identity = sum(float(mixed_loss(n, torch.eye(SIZE), torch.eye(6).repeat(2, 1, 1) if n else None)) for n in (0, 1))
    assert found.losses[0] == pytest.approx(identity, rel=1e-5)
    assert [step for step, _ in steps] == list(range(61))
    assert tuple(loss for _, loss in steps) == found.losses
    assert min(found.losses) < found.losses[0] - 1
    assert is_orthogonal(found.rotation.stream)
    assert is_orthogonal(found.rotation.heads[1])
    assert set(found.rotation.heads) == {1}
    stream, own = found.rotation.stream.float(), found.rotation.heads[1].float()
    best = float(mixed_loss(0, stream, None) + mixed_loss(1, stream, own))
    assert best == pytest.approx(min(found.losses), rel=1e-4)


def test_the_search_is_repeatable() -> None:
    one, other = (learn(SIZE, HEADS, 2, mixed_loss, steps=5) for _ in range(2))
    assert torch.equal(one.rotation.stream, other.rotation.stream)
    assert one.losses == other.losses


def test_a_loss_that_is_not_finite_is_named() -> None:
    with pytest.raises(NumericsError, match="loss of the rotation is nan at step 0"):
        learn(SIZE, {}, 1, lambda layer, rotation, own: rotation.sum() * float("nan"), steps=3)
