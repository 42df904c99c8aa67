"""The loss of a rotation against a float64 reference, written out element by element."""

import math

import pytest
import torch
from references import correlated_inputs
from torch import Tensor

from llmprune.rotation.concentration import HeadIndex, Reader, Writer, entropy, reader_entropy, writer_entropy
from llmprune.rotation.search import random_rotation

HIDDEN, HEADS, SIZE = 8, 2, 3
# V's outputs lie in reverse; O reads two copies of each head.
ROWS = HeadIndex(torch.tensor([[[5, 4, 3]], [[2, 1, 0]]]))
COLUMNS = HeadIndex(torch.arange(HEADS * 2 * SIZE).view(HEADS, 2, SIZE))


def slow_entropy(values: list[float]) -> float:
    shares = [value / sum(values) for value in values]
    return -sum(share * math.log(share) for share in shares if share > 0)


def slow_rows(scores: Tensor) -> float:
    return sum(slow_entropy(row) for row in scores.tolist())


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


def test_entropy_of_known_scores() -> None:
    uniform, single = torch.ones(1, 4), torch.tensor([[0.0, 3.0, 0.0, 0.0]])
    assert float(entropy(uniform, -1)) == pytest.approx(math.log(4))
    assert float(entropy(single, -1)) == pytest.approx(0, abs=1e-6)
    assert float(entropy(torch.zeros(2, 4), -1)) == pytest.approx(0, abs=1e-6)


def test_readers(weights: tuple[Tensor, Tensor], turned: tuple[Tensor, Tensor]) -> None:
    (value, _), (stream, heads), inverse = weights, turned, inverse_gram(HIDDEN, 1)
    product, scales = value @ stream, (stream.T @ inverse @ stream).diagonal()
    assert float(reader_entropy(Reader(value, inverse), stream)) == pytest.approx(slow_rows(product.square() / scales))
    scores = (blockwise(heads, ROWS, HEADS * SIZE).T @ product).square() / scales
    found = reader_entropy(Reader(value, inverse, ROWS), stream, heads)
    assert float(found) == pytest.approx(slow_rows(scores) + slow_rows(scores.T))


def test_writers(weights: tuple[Tensor, Tensor], turned: tuple[Tensor, Tensor]) -> None:
    (_, output), (stream, heads), width = weights, turned, HEADS * 2 * SIZE
    inverse = inverse_gram(width, 2)
    product = stream.T @ output
    plain = writer_entropy(Writer(output[None], inverse.diagonal()[None]), stream)
    assert float(plain) == pytest.approx(slow_rows((product.square() / inverse.diagonal()).T))
    block = blockwise(heads, COLUMNS, width)
    scores = (product @ block).square() / (block.T @ inverse @ block).diagonal()
    blocks = inverse[COLUMNS.index[..., :, None], COLUMNS.index[..., None, :]]
    found = writer_entropy(Writer(output[None], blocks, COLUMNS), stream, heads)
    assert float(found) == pytest.approx(slow_rows(scores.T) + slow_rows(scores))


def test_experts_are_added_up(turned: tuple[Tensor, Tensor]) -> None:
    stream, weight = turned[0], torch.randn(3, HIDDEN, 5, dtype=torch.float64)
    diagonal = torch.rand(3, 5, dtype=torch.float64) + 0.1
    each = [writer_entropy(Writer(weight[n : n + 1], diagonal[n : n + 1]), stream) for n in range(3)]
    assert float(writer_entropy(Writer(weight, diagonal), stream)) == pytest.approx(float(sum(each)))


def test_heads_are_rotated_in_their_own_places(turned: tuple[Tensor, Tensor]) -> None:
    heads, width = turned[1], HEADS * SIZE + 1
    matrix = torch.randn(4, width, dtype=torch.float64)
    wanted = matrix @ blockwise(heads, ROWS, width)
    torch.testing.assert_close(ROWS.rotate(matrix, heads, 1), wanted)
    torch.testing.assert_close(ROWS.rotate(matrix.T, heads, 0), wanted.T)
    assert torch.equal(ROWS.rotate(matrix, heads, 1)[:, -1], matrix[:, -1])


def test_gradients_are_finite_where_weights_are_zero() -> None:
    rotation = torch.eye(HIDDEN).requires_grad_()
    weight = torch.zeros(3, HIDDEN)
    weight[0, 0] = 1
    reader_entropy(Reader(weight, torch.eye(HIDDEN)), rotation).backward()
    assert rotation.grad is not None
    assert bool(rotation.grad.isfinite().all())
