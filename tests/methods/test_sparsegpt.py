"""SparseGPT against the paper's own algorithm, with its explicit inverse, in float64."""

import gc
import math
import weakref
from dataclasses import dataclass

import pytest
import torch
from references import correlated_inputs, inverse_cholesky, least_squares, output_error, textbook_sparsegpt
from torch import Tensor

from llmprune.errors import NumericsError, PatternError, RecipeError
from llmprune.methods import SparseGPT
from llmprune.patterns import Pattern, Unstructured, parse
from llmprune.statistics import Gram


@dataclass(frozen=True)
class Fixed:
    """A pattern whose mask is given, to look at the weights alone."""

    keep: Tensor
    column_multiple: int = 1

    @property
    def sparsity(self) -> float:
        return 1 - float(self.keep.float().mean())

    def check(self, shape: tuple[int, int]) -> None:
        assert shape == tuple(self.keep.shape)

    def zeros(self, shape: tuple[int, int]) -> int:
        return int((~self.keep).sum())

    def compared(self, over: str) -> "Fixed":
        return self

    def mask(self, scores: Tensor, *, start: int = 0) -> Tensor:
        return self.keep[:, start : start + scores.shape[1]]


def sample(rows: int, width: int, dtype: torch.dtype, seed: int = 0, tokens: int = 400) -> tuple[Tensor, Gram]:
    """A weight, and the Gram of correlated inputs, both exact in float32.

    The Gram is symmetric to the last bit: which of its triangles a factorisation reads must not matter here.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    gram = Gram.empty(width)
    gram.update(correlated_inputs(tokens, width, seed))
    products = gram.products.triu() + gram.products.triu(1).T
    return weight.to(dtype), Gram(products.to(dtype), gram.tokens)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


# Widths that 128, and 32, do not divide.
CASES = [("0.5", 200), ("0.6/row", 200), ("2:4", 200), ("4:8", 200), ("3:6", 198), ("0.5@8x32", 224)]


@pytest.mark.parametrize("damping", [0.001, 0.01, 1.0])
@pytest.mark.parametrize("block_size", [128, 32])
@pytest.mark.parametrize(("text", "width"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_equals_the_textbook(
    text: str, width: int, block_size: int, damping: float, dtype: torch.dtype, tolerance: float
) -> None:
    weight, gram = sample(16, width, dtype)
    pruned = SparseGPT(damping, block_size)(weight, gram, parse(text))
    exact, mask = textbook_sparsegpt(weight, gram.products, parse(text), damping=damping, block_size=block_size)
    assert torch.equal(pruned.mask, mask)
    assert pruned.weight.dtype == dtype
    assert relative(pruned.weight, exact) < tolerance
    assert torch.allclose(pruned.weight.double(), exact, rtol=0, atol=10 * tolerance * float(exact.abs().max()))
    assert (pruned.damping, pruned.tried) == (damping, (damping,))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 300), (5, 17), (64, 128), (3, 257)])
def test_equals_the_textbook_in_odd_shapes(rows: int, width: int) -> None:
    weight, gram = sample(rows, width, torch.float64)
    pruned = SparseGPT()(weight, gram, Unstructured(0.4))
    exact, mask = textbook_sparsegpt(weight, gram.products, Unstructured(0.4))
    assert torch.equal(pruned.mask, mask)
    assert relative(pruned.weight, exact) < 1e-10


@pytest.mark.parametrize("block_size", [1, 5, 16, 17, 1000])
@pytest.mark.parametrize("text", ["0.5/row", "1:4", "2:20", "0.5@4x10"])
def test_every_block_size_equals_the_textbook(text: str, block_size: int) -> None:
    """Smaller than a group, and larger than the matrix, as well."""
    weight, gram = sample(8, 60, torch.float64)
    pruned = SparseGPT(block_size=block_size)(weight, gram, parse(text))
    exact, mask = textbook_sparsegpt(weight, gram.products, parse(text), block_size=block_size)
    assert torch.equal(pruned.mask, mask)
    assert relative(pruned.weight, exact) < 1e-10


def test_groups_longer_than_a_byte_counts() -> None:
    weight, gram = sample(4, 600, torch.float64, tokens=1200)
    pruned = SparseGPT()(weight, gram, parse("20:300"))
    exact, mask = textbook_sparsegpt(weight, gram.products, parse("20:300"))
    assert torch.equal(pruned.mask, mask)
    assert relative(pruned.weight, exact) < 1e-10


@pytest.mark.parametrize("text", ["2:4", "0.5@8x10"])
def test_groups_do_not_depend_on_the_block_size(text: str) -> None:
    weight, gram = sample(8, 200, torch.float64)
    small, large = (SparseGPT(block_size=size)(weight, gram, parse(text)) for size in (16, 128))
    assert torch.equal(small.mask, large.mask)
    assert relative(small.weight, large.weight) < 1e-12


@pytest.mark.parametrize("tokens", [40, 2000])
@pytest.mark.parametrize("damping", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_is_no_worse_than_the_textbooks(tokens: int, damping: float, seed: int) -> None:
    """With fewer tokens than inputs, only the damping keeps the Gram regular."""
    weight, gram = sample(32, 200, torch.float32, seed, tokens)
    fixed = Fixed(torch.rand(weight.shape) > 0.5)
    pattern = FixedTextbook(fixed.keep)
    exact = pattern.prune(weight, gram, damping, torch.float64)
    eager = pattern.prune(weight, gram, damping, torch.float32)
    ours = SparseGPT(damping)(weight, gram, fixed).weight
    assert relative(ours, exact) <= 2 * relative(eager, exact) + 1e-7


@dataclass(frozen=True)
class FixedTextbook:
    """The textbook sweep for a given mask: each column's error goes to all later ones."""

    keep: Tensor

    def prune(self, weight: Tensor, gram: Gram, damping: float, dtype: torch.dtype) -> Tensor:
        remaining = weight.to(dtype, copy=True)
        upper = inverse_cholesky(gram.products, damping, dtype)
        for column in range(weight.shape[1]):
            error = remaining[:, column].masked_fill(self.keep[:, column], 0) / upper[column, column]
            remaining[:, column:] -= torch.outer(error, upper[column, column:])
        return remaining * self.keep


def test_one_zero_costs_its_score() -> None:
    """The score is the rise of the damped output error when one weight goes and all later ones adjust."""
    weight, gram = sample(40, 40, torch.float64)
    damped = gram.products + 0.01 * gram.products.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    scores = SparseGPT().scores(weight, gram)
    keep = ~torch.eye(40, dtype=torch.bool)
    difference = weight - SparseGPT()(weight, gram, Fixed(keep)).weight
    costs = ((difference @ damped) * difference).sum(1)
    assert torch.allclose(costs, scores.diagonal(), rtol=1e-9)
    # Nothing before the zero moves, and nothing after it could be better.
    assert torch.equal(difference.tril(-1), torch.zeros(40, 40, dtype=torch.float64))
    assert torch.allclose((difference @ damped).triu(1), torch.zeros(40, 40, dtype=torch.float64), atol=1e-9)


def test_scores_equal_the_papers() -> None:
    weight, gram = sample(8, 50, torch.float64)
    inverse_diagonal = inverse_cholesky(gram.products, 0.03).diagonal()
    assert torch.allclose(SparseGPT(0.03).scores(weight, gram), weight**2 / inverse_diagonal**2, rtol=1e-9)


def test_uncorrelated_inputs_leave_the_weights_that_stay_as_they_are() -> None:
    weight = torch.randn(8, 64)
    gram = Gram(torch.diag(torch.rand(64) + 0.5), 100)
    pruned = SparseGPT()(weight, gram, Unstructured(0.5, "row"))
    assert torch.equal(pruned.weight, weight * pruned.mask)


def test_duplicate_inputs_take_over_from_one_another() -> None:
    """Each input twice: half of the weights can go for almost nothing, and the twin gets their sum."""
    inputs = correlated_inputs(400, 32).repeat_interleave(2, 1)
    weight = torch.randn(8, 64)
    gram = Gram.empty(64)
    gram.update(inputs)
    keep = torch.arange(64).expand(8, -1) % 2 == 1
    pruned = SparseGPT(damping=1e-4)(weight, gram, Fixed(keep)).weight
    assert output_error(weight, pruned, inputs) < 1e-3 * output_error(weight, weight * keep, inputs)


def test_the_error_is_near_the_least_squares_optimum() -> None:
    """The sweep cannot look back, so it stays above the optimum, but it gets most of the way from the bare mask."""
    for seed in range(3):
        weight, gram = sample(32, 128, torch.float32, seed, tokens=1000)
        inputs = correlated_inputs(1000, 128, seed)
        pruned = SparseGPT()(weight, gram, Unstructured(0.5))
        best = output_error(weight, least_squares(weight, pruned.mask, inputs), inputs)
        bare = output_error(weight, weight * pruned.mask, inputs)
        assert best <= output_error(weight, pruned.weight, inputs) < best + 0.5 * (bare - best)


@pytest.mark.parametrize("text", ["0.5/row", "2:4", "0.5@4x4"])
def test_dead_inputs_do_not_disturb_the_living(text: str) -> None:
    weight, gram = sample(8, 64, torch.float64)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[3, 16, 17, 40, 63]] = True
    gram.products[dead], gram.products[:, dead] = 0, 0
    pruned = SparseGPT()(weight, gram, parse(text))
    exact, mask = textbook_sparsegpt(weight, gram.products, parse(text))
    assert torch.equal(pruned.mask, mask)
    assert relative(pruned.weight[:, ~dead], exact[:, ~dead]) < 1e-10
    if text != "0.5@4x4":
        assert not pruned.mask[:, dead].any()


def test_a_singular_gram_is_pruned_at_the_damping_that_is_reported() -> None:
    weight, gram = sample(4, 64, torch.float32, tokens=8)
    pruned = SparseGPT(damping=0.0)(weight, gram, parse("2:4"))
    assert (pruned.damping, pruned.tried) == (0.01, (0.0, 0.01))
    assert torch.equal(pruned.weight, SparseGPT(damping=0.01)(weight, gram, parse("2:4")).weight)


def test_a_gram_that_no_damping_mends_is_refused() -> None:
    with pytest.raises(NumericsError, match="not positive definite"):
        SparseGPT()(torch.randn(2, 2), Gram(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 1), Unstructured(0.5))


def test_nothing_is_kept_until_a_garbage_collection() -> None:
    """The operands of a sweep are the largest tensors of a run, and a cycle of references would hold them."""
    weight, gram = sample(8, 64, torch.float32)
    operands = weakref.ref(gram.factor(0.01).upper), weakref.ref(weight)
    gc.collect()
    gc.disable()
    try:
        SparseGPT()(weight, gram, parse("2:4"))
        del weight, gram
        assert [operand() for operand in operands] == [None, None]
    finally:
        gc.enable()


def test_matrices_that_share_an_input_are_factorised_once() -> None:
    weight, gram = sample(4, 16, torch.float32)
    factor = gram.factor(0.01)
    gram.products.fill_(math.nan)  # would be refused if it were factorised again
    before = factor.upper.clone()
    for pattern in (Unstructured(0.5), parse("2:4")):
        SparseGPT()(weight, gram, pattern)
    assert torch.equal(factor.upper, before)


@pytest.mark.parametrize("damping", [-1e-9, -1.0, math.nan, -math.inf])
def test_a_damping_out_of_range_is_refused(damping: float) -> None:
    with pytest.raises(RecipeError, match=r"sparsegpt\.damping is"):
        SparseGPT(damping=damping)


@pytest.mark.parametrize("block_size", [0, -128])
def test_a_block_size_out_of_range_is_refused(block_size: int) -> None:
    with pytest.raises(RecipeError, match=r"sparsegpt\.block_size is"):
        SparseGPT(block_size=block_size)


@pytest.mark.parametrize("text", ["3:7", "0.5@8x48"])
def test_a_pattern_that_does_not_fit_is_refused_before_any_work(text: str) -> None:
    weight, gram = sample(8, 64, torch.float32)
    pattern: Pattern = parse(text)
    with pytest.raises(PatternError, match="8 x 64"):
        SparseGPT()(weight, gram, pattern)
    gram.products.fill_(math.nan)
    with pytest.raises(PatternError, match="8 x 64"):
        SparseGPT()(weight, gram, pattern)
