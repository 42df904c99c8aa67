"""The loss of a rotation against a float64 reference, written out element by element."""

import math

import pytest
import torch
from references import correlated_inputs
from torch import Tensor

from llmprune.patterns import parse
from llmprune.rotation.loss import (
    HeadIndex,
    Reader,
    Writer,
    input_scales,
    log_dropped,
    reader_scores,
    writer_scores,
)
from llmprune.rotation.search import random_rotation

HIDDEN, HEADS, SIZE = 8, 2, 3
# V's outputs lie in reverse; O reads two copies of each head.
ROWS = HeadIndex(torch.tensor([[[5, 4, 3]], [[2, 1, 0]]]))
COLUMNS = HeadIndex(torch.arange(HEADS * 2 * SIZE).view(HEADS, 2, SIZE))


def slow_dropped(scores: Tensor) -> float:
    """The two lowest of each four, at 2:4."""
    return sum(sum(sorted(group)[:2]) for row in scores.tolist() for group in zip(*[iter(row)] * 4, strict=True))


def inverse_gram(width: int, seed: int) -> Tensor:
    inputs = correlated_inputs(64, width, seed).double()
    return torch.linalg.inv(inputs.T @ inputs + torch.eye(width))


def blockwise(heads: Tensor, index: HeadIndex, width: int) -> Tensor:
    """R2 as one orthogonal matrix [width, width]."""
    matrix = torch.eye(width, dtype=torch.float64)
    for head, copies in enumerate(index.index.tolist()):
        for places in copies:
            for i, row in enumerate(places):
                for j, column in enumerate(places):
                    matrix[row, column] = heads[head, i, j]
    return matrix


@pytest.fixture
def weights() -> tuple[Tensor, Tensor]:
    drawn = torch.randn(HEADS * SIZE + HEADS * 2 * SIZE, HIDDEN, dtype=torch.float64)
    return drawn[: HEADS * SIZE], drawn[HEADS * SIZE :].T.contiguous()


@pytest.fixture
def turned() -> tuple[Tensor, Tensor]:
    found = random_rotation(HIDDEN, {0: (HEADS, SIZE)}, 3)
    return found.stream, found.heads[0]


def test_what_each_pattern_drops() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 60.0, 70.0, 8.0]], dtype=torch.float64)
    for pattern, dropped in (("2:4", 3 + 13), ("0.25/row", 1 + 5), ("0.25/matrix", 1 + 2), ("0.5@2x2", 68)):
        assert float(log_dropped(scores, parse(pattern))) == pytest.approx(math.log(dropped))
    # Experts that are stored together are compared together.
    assert float(log_dropped(scores[:, None], parse("2:4"))) == pytest.approx(math.log(3 + 13))


def test_readers(weights: tuple[Tensor, Tensor], turned: tuple[Tensor, Tensor]) -> None:
    (value, _), (stream, heads), inverse = weights, turned, inverse_gram(HIDDEN, 1)
    product, scales = value @ stream, (stream.T @ inverse @ stream).diagonal()
    torch.testing.assert_close(
        reader_scores(Reader(value), input_scales(inverse, stream), stream), product.square() / scales
    )
    scores = (blockwise(heads, ROWS, HEADS * SIZE).T @ product).square() / scales
    found = reader_scores(Reader(value, ROWS), input_scales(inverse, stream), stream, heads)
    torch.testing.assert_close(found, scores)
    assert math.exp(float(log_dropped(found, parse("2:4")))) == pytest.approx(slow_dropped(scores))


def test_writers(weights: tuple[Tensor, Tensor], turned: tuple[Tensor, Tensor]) -> None:
    (_, output), (stream, heads), width = weights, turned, HEADS * 2 * SIZE
    inverse = inverse_gram(width, 2)
    product = stream.T @ output
    plain = product.square() / inverse.diagonal()
    torch.testing.assert_close(writer_scores(Writer(output[None], inverse.diagonal()[None]), stream)[0], plain)
    block = blockwise(heads, COLUMNS, width)
    scores = (product @ block).square() / (block.T @ inverse @ block).diagonal()
    blocks = inverse[COLUMNS.index[..., :, None], COLUMNS.index[..., None, :]]
    torch.testing.assert_close(writer_scores(Writer(output[None], blocks, COLUMNS), stream, heads)[0], scores)
    torch.testing.assert_close(writer_scores(Writer(output[None], blocks, COLUMNS), stream)[0], plain)


def test_scores_of_experts_are_their_own(turned: tuple[Tensor, Tensor]) -> None:
    stream, weight = turned[0], torch.randn(3, HIDDEN, 5, dtype=torch.float64)
    diagonal = torch.rand(3, 5, dtype=torch.float64) + 0.1
    each = [writer_scores(Writer(weight[n : n + 1], diagonal[n : n + 1]), stream) for n in range(3)]
    torch.testing.assert_close(writer_scores(Writer(weight, diagonal), stream), torch.cat(each))


def test_heads_are_rotated_in_their_own_places(turned: tuple[Tensor, Tensor]) -> None:
    heads, width = turned[1], HEADS * SIZE + 1
    matrix = torch.randn(4, width, dtype=torch.float64)
    wanted = matrix @ blockwise(heads, ROWS, width)
    torch.testing.assert_close(ROWS.rotate(matrix, heads, 1), wanted)
    torch.testing.assert_close(ROWS.rotate(matrix.T, heads, 0), wanted.T)
    assert torch.equal(ROWS.rotate(matrix, heads, 1)[:, -1], matrix[:, -1])


@pytest.mark.parametrize("pattern", ["2:4", "0.0/row"])
def test_gradients_are_finite_where_nothing_is_dropped(pattern: str) -> None:
    rotation = torch.eye(HIDDEN).requires_grad_()
    weight = torch.zeros(3, HIDDEN)
    weight[0, 0] = 1
    log_dropped(reader_scores(Reader(weight), torch.ones(HIDDEN), rotation), parse(pattern)).backward()
    assert rotation.grad is not None
    assert bool(rotation.grad.isfinite().all())
