"""Corrected targets against least squares in float64: what to aim at where inputs differ from the dense model's."""

import pytest
import torch
from references import correlated_inputs, least_squares
from torch import Tensor

from llmprune.errors import NumericsError
from llmprune.methods import METHODS, Chain, Refit, SparseGPT
from llmprune.methods.correction import LARGEST, corrected, correction_bytes, correction_work
from llmprune.patterns import parse
from llmprune.statistics import Gram

ROWS, WIDTH, TOKENS = 12, 20, 300


def case(spread: float = 0.05, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Gram]:
    """A weight, its inputs [tokens, in] in the dense model and in the pruned one, and the latter's statistics."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    pruned = correlated_inputs(TOKENS, WIDTH, 2).to(dtype)
    mixing = torch.eye(WIDTH) + spread * torch.randn(WIDTH, WIDTH, generator=generator)
    dense = (pruned @ mixing.to(dtype) + 0.01 * torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)).to(dtype)
    gram = Gram(pruned.T @ pruned, TOKENS)
    gram.add_errors(dense - pruned, pruned)
    return weight, dense, pruned, gram


def ridge(inputs: Tensor, outputs: Tensor, weight: Tensor) -> Tensor:
    """The weights nearest to these outputs, at 0.01 of the mean square for each squared distance from `weight`."""
    pull = (0.01 * inputs.square().sum(0).mean()).sqrt()
    left = torch.cat([inputs, pull * torch.eye(inputs.shape[1], dtype=inputs.dtype)])
    return torch.linalg.lstsq(left, torch.cat([outputs, pull * weight.T])).solution.T


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_target_is_the_least_squares_solution(alpha: float) -> None:
    weight, dense, pruned, gram = case()
    mixed = pruned + alpha * (dense - pruned)
    target, distance = corrected(weight, gram, alpha)
    expected = ridge(pruned, mixed @ weight.T, weight)
    assert torch.allclose(target, expected, rtol=0, atol=1e-9)
    assert distance == pytest.approx(float((expected - weight).norm() / weight.norm()))


def test_float32_sums_are_enough() -> None:
    weight, dense, pruned, _ = case()
    gram = Gram.empty(WIDTH)
    for rows, other in zip(pruned.float().split(70), dense.float().split(70), strict=True):
        gram.update(rows)
        gram.add_errors(other - rows, rows)
    target, _ = corrected(weight.float(), gram, 1.0)
    expected = ridge(pruned, dense @ weight.T, weight)
    assert float((target - expected).norm() / (expected - weight).norm()) < 1e-4


@pytest.mark.parametrize("text", ["0.5", "2:4", "0.5@4x4"])
@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind().needs is Gram])
def test_solvers_come_closer_to_the_dense_outputs(name: str, text: str) -> None:
    """With the target in place of the weight, and nothing else."""
    weight, dense, pruned, gram = case(dtype=torch.float32)
    method, pattern = METHODS[name](), parse(text)
    if reason := method.refuses(pattern):
        pytest.skip(f"{name} refuses {text}: {reason}")
    outputs = dense @ weight.T
    plain, aimed = (method(aim, gram, pattern).weight for aim in (weight, corrected(weight, gram, 1.0)[0]))
    assert (outputs - pruned @ aimed.T).norm() < (outputs - pruned @ plain.T).norm()


def test_a_refit_ends_at_the_least_squares_fit_to_the_dense_outputs() -> None:
    """Of all weights with its mask; only the pull towards the dense weight, which the target has, keeps them apart."""
    weight, dense, pruned, gram = case(spread=0.02)
    chain = Chain(SparseGPT(), (("refit", Refit(damping=0.0, iterations=200)),))
    solved = chain(corrected(weight, gram, 1.0)[0], gram, parse("0.5"))
    best = least_squares(ridge(pruned, dense @ weight.T, weight), solved.mask, pruned)
    outputs = dense @ weight.T
    plain = least_squares(weight, solved.mask, pruned)
    assert torch.allclose(solved.weight, best, rtol=0, atol=1e-4)
    assert (outputs - pruned @ solved.weight.T).norm() < (outputs - pruned @ plain.T).norm()


def test_a_correction_that_is_too_large_is_left_out_and_told() -> None:
    weight, _, _, gram = case(spread=0.5)
    target, distance = corrected(weight, gram, 1.0)
    assert distance > LARGEST
    assert torch.equal(target, weight)
    part = 0.9 * LARGEST / distance
    assert corrected(weight, gram, part)[1] == pytest.approx(0.9 * LARGEST)
    assert not torch.equal(corrected(weight, gram, part)[0], weight)


def test_equal_inputs_and_matrices_of_zeros_need_no_correction() -> None:
    weight, _, pruned, gram = case()
    gram.errors = torch.zeros_like(gram.sums)
    assert torch.equal(corrected(weight, gram, 1.0)[0], weight)
    _, _, _, gram = case()
    assert corrected(torch.zeros_like(weight), gram, 1.0)[1] == 0.0
    assert len(pruned) == TOKENS


def test_errors_that_overflow_are_refused() -> None:
    weight, _, _, gram = case()
    assert gram.errors is not None
    gram.errors[0, 0] = float("inf")
    with pytest.raises(NumericsError, match="products of the inputs' errors"):
        corrected(weight, gram, 1.0)


def test_costs_count_the_product_and_the_two_triangular_solutions() -> None:
    assert correction_work((3, 5)) == 2 * 3 * 5**2 + 2 * 3 * 5**2
    assert correction_bytes((3, 5)) == 4 * 3 * 5 + 4 * 5**2
