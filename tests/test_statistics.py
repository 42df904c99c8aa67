import copy
from itertools import permutations
from typing import TypeVar

import pytest
import torch
from jaxtyping import TypeCheckError
from references import correlated_inputs, inverse_cholesky
from torch import Tensor

from llmprune.errors import NumericsError
from llmprune.precision import add_gram, float32_products
from llmprune.statistics import ColumnNorm, Factor, Gram, check_finite

Kind = TypeVar("Kind", ColumnNorm, Gram)

KINDS = [ColumnNorm, Gram]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def collected(kind: type[Kind], *batches: Tensor) -> Kind:
    statistics = kind.empty(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def sums(statistics: ColumnNorm | Gram) -> Tensor:
    return statistics.products if isinstance(statistics, Gram) else statistics.squares


def exact_sums(kind: type[Kind], x: Tensor) -> Tensor:
    return x.double().T @ x.double() if kind is Gram else x.double().square().sum(0)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest error, relative to what the features' scales allow: |G_ij| <= sqrt(G_ii G_jj)."""
    diagonal = exact.diagonal() if exact.ndim == 2 else exact
    scale = torch.outer(diagonal, diagonal).sqrt() if exact.ndim == 2 else diagonal
    return float(((found.double() - exact) / scale).abs().max())


@pytest.fixture
def x() -> Tensor:
    return correlated_inputs(500, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_update_equals_the_float64_reference(kind: type[Kind], dtype: torch.dtype, x: Tensor) -> None:
    batches = x.to(dtype).split([1, 99, 400])
    statistics = collected(kind, *batches)
    exact = exact_sums(kind, x.to(dtype))
    eager = sum((b.float().T @ b.float() if kind is Gram else b.float().square().sum(0)) for b in batches)
    assert statistics.tokens == 500
    assert sums(statistics).dtype == torch.float32
    # 2^-8, as for products rounded to bfloat16, would be far outside.
    assert relative_error(sums(statistics), exact) <= 2 * relative_error(torch.as_tensor(eager), exact) + 1e-6


def test_products_of_half_precision_inputs_are_exact() -> None:
    """The product of two bfloat16 or float16 numbers fits into float32; one token leaves nothing else to round."""
    x = torch.randn(1, 64)
    for dtype in (torch.bfloat16, torch.float16):
        row = x.to(dtype)
        assert torch.equal(collected(Gram, row).products.double(), row.double().T @ row.double())
        assert torch.equal(collected(ColumnNorm, row).squares.double(), row[0].double().square())


def test_the_sum_is_not_rounded_to_the_inputs_dtype() -> None:
    """4096 ones: in bfloat16 the sum would stop at 256, in float16 at 2048."""
    for dtype in DTYPES:
        ones = torch.ones(4096, 32, dtype=dtype)
        assert torch.equal(collected(Gram, ones).products, torch.full((32, 32), 4096.0))
        assert torch.equal(collected(ColumnNorm, ones).squares, torch.full((32,), 4096.0))
        # What is there already counts as much as the new rows.
        total = torch.full((32, 32), 2.0**23 + 1)
        add_gram(total, ones)
        assert torch.equal(total, torch.full((32, 32), 2.0**23 + 4097))


def test_a_float64_gram_sums_in_float64(x: Tensor) -> None:
    for dtype in DTYPES:
        statistics = Gram(torch.zeros(40, 40, dtype=torch.float64))
        statistics.update(x.to(dtype))
        assert relative_error(statistics.products, exact_sums(Gram, x.to(dtype))) < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_not_changed(kind: type[Kind], x: Tensor) -> None:
    for dtype in DTYPES:
        inputs = x.to(dtype)
        before = inputs.clone()
        collected(kind, inputs)
        assert torch.equal(inputs, before)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_shards_equal_one_pass(kind: type[Kind], x: Tensor) -> None:
    first, second = collected(kind, x[:123]), collected(kind, x[123:])
    second_before = copy.deepcopy(second)
    first.merge(second)
    assert first.tokens == 500
    assert relative_error(sums(first), exact_sums(kind, x)) < 1e-6
    assert torch.equal(sums(second), sums(second_before))
    assert second.tokens == second_before.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_exact_where_sums_are(kind: type[Kind]) -> None:
    """Whole numbers leave no rounding, so shards must merge to the same bits in any order."""
    x = torch.randint(-8, 8, (90, 12)).float()
    whole = collected(kind, x)
    for order in permutations(x.split(30)):
        merged = kind.empty(12)
        for shard in order:
            merged.merge(collected(kind, shard))
        assert torch.equal(sums(merged), sums(whole))
        assert merged.tokens == whole.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_batches_does_not_matter(kind: type[Kind], x: Tensor) -> None:
    batches = x.split(100)
    forwards, backwards = collected(kind, *batches), collected(kind, *batches[::-1])
    assert relative_error(sums(forwards), sums(backwards).double()) < 1e-6
    assert forwards.tokens == backwards.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_tokens_adds_nothing(kind: type[Kind], x: Tensor) -> None:
    statistics = collected(kind, x)
    before = sums(statistics).clone()
    statistics.update(x[:0])
    assert torch.equal(sums(statistics), before)
    assert statistics.tokens == 500


def test_squares_are_the_diagonal_of_the_gram(x: Tensor) -> None:
    assert torch.equal(collected(Gram, x).squares, collected(Gram, x).products.diagonal())
    assert relative_error(collected(Gram, x).squares, exact_sums(ColumnNorm, x)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_adds_uncorrelated_tokens_of_that_mean_square(kind: type[Kind], x: Tensor) -> None:
    statistics = collected(kind, x)
    before = sums(statistics).clone()
    statistics.add_prior(100, 2.5)
    added = torch.full((40,), 250.0)
    assert statistics.tokens == 600
    assert torch.allclose(sums(statistics), before + (added.diag() if kind is Gram else added))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_no_matrix_are_refused(kind: type[Kind]) -> None:
    with pytest.raises(TypeCheckError):
        kind.empty(4).update(torch.rand(2, 3, 4))


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.01, 0.1, 1.0])
def test_the_factor_reproduces_the_damped_gram(damping: float, x: Tensor) -> None:
    gram = collected(Gram, x)
    factor = gram.factor(damping)
    damped = gram.products.double() + damping * gram.products.double().diagonal().mean() * torch.eye(40)
    assert (factor.damping, factor.tried) == (damping, (damping,))
    assert torch.equal(factor.upper, factor.upper.triu())
    upper = factor.upper.double()
    assert relative_error(upper @ upper.T, damped) < 1e-5


def test_the_factor_is_the_inverse_of_the_papers_upper_factor(x: Tensor) -> None:
    gram = Gram(x.double().T @ x.double(), len(x))
    upper = gram.factor(0.01).upper
    assert torch.allclose(upper @ inverse_cholesky(gram.products, 0.01), torch.eye(40, dtype=torch.float64), atol=1e-9)


def test_factorising_leaves_the_sums_alone(x: Tensor) -> None:
    gram = collected(Gram, x)
    before = gram.products.clone()
    gram.factor(0.5)
    assert torch.equal(gram.products, before)


def test_dead_inputs_get_a_diagonal_of_one(x: Tensor) -> None:
    x[:, [0, 7, 39]] = 0
    damped = collected(Gram, x).factor(0.01).upper
    damped = damped @ damped.T
    for dead in (0, 7, 39):
        assert torch.equal(damped[dead], torch.eye(40)[dead])
    # The living are damped as if the dead counted in the mean: it is the mean of the whole diagonal.
    squares = exact_sums(ColumnNorm, x)
    assert damped[3, 3].item() == pytest.approx(float(squares[3] + 0.01 * squares.mean()), rel=1e-5)


def test_no_tokens_at_all_factorise_to_the_identity() -> None:
    for damping in (0.0, 0.01):
        assert torch.equal(Gram.empty(5).factor(damping).upper, torch.eye(5))


def singular_gram() -> Tensor:
    """Of 8 tokens and 64 inputs: 56 pivots are nothing but rounding, so some are negative whatever computes them."""
    x = torch.randn(8, 64)
    return x.T @ x


@pytest.mark.parametrize("scale", [2.0**-60, 1.0, 2.0**60])
def test_a_singular_gram_climbs_the_ladder_and_says_so(scale: float) -> None:
    gram = singular_gram() * scale
    factor = Gram(gram).factor(0.0)
    assert factor.damping == 0.01
    assert factor.tried == (0.0, 0.01)
    assert torch.equal(factor.upper, Gram(gram).factor(0.01).upper)


def test_damping_that_works_is_not_raised() -> None:
    assert Gram(singular_gram()).factor(1e-3).tried == (1e-3,)


@pytest.mark.parametrize(
    ("smallest", "damping", "tried"),
    [
        (-0.05, 0.0, (0.0, 0.01, 0.1)),
        (-0.05, 0.03, (0.03, 0.1)),
        (-0.5, 0.01, (0.01, 0.1, 1.0)),
        (-0.5, 0.4, (0.4, 1.0)),
        (-0.5, 2.0, (2.0,)),
    ],
)
def test_every_rung_that_was_tried_is_reported(smallest: float, damping: float, tried: tuple[float, ...]) -> None:
    """Unit diagonal, eigenvalues `smallest` and 2 - `smallest`: any damping above -`smallest` will do."""
    indefinite = torch.tensor([[1, 1 - smallest], [1 - smallest, 1]])
    factor = Gram(indefinite).factor(damping)
    assert (factor.damping, factor.tried) == (tried[-1], tried)


def test_a_gram_that_no_damping_mends_is_refused_with_the_numbers() -> None:
    with pytest.raises(NumericsError, match=r"width 2 from 9 tokens.*\[0.0, 0.01, 0.1, 1.0\]") as caught:
        Gram(torch.tensor([[1.0, 3.0], [3.0, 2.0]]), 9).factor(0.0)
    assert "from 1.000e+00 to 2.000e+00, mean 1.500e+00" in caught.value.what


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_gram_that_is_not_finite_is_refused(value: float) -> None:
    on_diagonal, beside = torch.eye(4), torch.eye(4)
    on_diagonal[2, 2] = value
    beside[1, 2] = beside[2, 1] = value
    with pytest.raises(NumericsError, match="1 values that are NaN or infinite"):
        Gram(on_diagonal).factor(0.01)
    with pytest.raises(NumericsError):
        Gram(beside).factor(0.01)


def test_overflowing_inputs_are_refused_when_the_gram_is_used() -> None:
    gram = collected(Gram, torch.full((2, 3), 1e30))
    with pytest.raises(NumericsError, match="3 values that are NaN or infinite"):
        gram.factor(0.01)


def test_matrices_that_share_an_input_share_the_factor(x: Tensor) -> None:
    gram = collected(Gram, x)
    assert gram.factor(0.01) is gram.factor(0.01)
    assert gram.factor(0.1) is not gram.factor(0.01)
    assert gram.factor(0.01) is gram.factor(0.01)


def test_new_tokens_make_the_factor_anew(x: Tensor) -> None:
    gram = collected(Gram, x)
    for change in (lambda: gram.update(x), lambda: gram.merge(collected(Gram, x)), lambda: gram.add_prior(500, 1.0)):
        before: Factor = gram.factor(0.01)
        change()
        assert gram.factor(0.01) is not before
        assert torch.equal(gram.factor(0.01).upper, Gram(gram.products).factor(0.01).upper)


def test_check_finite_counts_and_names() -> None:
    check_finite(torch.zeros(3), "the input")
    with pytest.raises(NumericsError, match=r"^the input holds 2 values that are NaN or infinite \(of 4\)"):
        check_finite(torch.tensor([1.0, float("nan"), float("-inf"), 0.0]), "the input")


def test_the_precision_of_products_is_restored_even_after_an_error() -> None:
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    with float32_products("bf16"):
        assert (cpu.fp32_precision, cuda.fp32_precision) == ("bf16", "ieee")
    with pytest.raises(ZeroDivisionError), float32_products("bf16"):
        _ = 1 / 0
    assert (cpu.fp32_precision, cuda.fp32_precision) == before
    add_gram(torch.zeros(2, 2), torch.ones(3, 2, dtype=torch.bfloat16))
    assert (cpu.fp32_precision, cuda.fp32_precision) == before


def test_float32_inputs_are_never_rounded_to_bfloat16() -> None:
    """Also where the program around it allows faster products."""
    x = 1 + 2.0**-12 * torch.randint(0, 2, (64, 64))
    with float32_products("bf16"):
        statistics = collected(Gram, x)
    assert relative_error(statistics.products, exact_sums(Gram, x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gram_wider_than_one_panel_is_whole_and_symmetric_to_the_bit(dtype: torch.dtype) -> None:
    x = torch.randn(40, 1100).to(dtype)
    gram = Gram.empty(1100)
    gram.update(x[:30])
    gram.update(x[30:])
    exact = x.double().T @ x.double()
    assert relative_error(gram.products, exact) < 1e-6
    assert torch.equal(gram.products, gram.products.T)
    half = Gram.empty(1100)
    half.update(x[:30])
    half.merge(gram)
    assert relative_error(half.products, exact + x[:30].double().T @ x[:30].double()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_the_inputs_add_up_over_batches_and_shards(dtype: torch.dtype, x: Tensor) -> None:
    error = (0.1 * correlated_inputs(500, 40, seed=9)).to(dtype)
    x = x.to(dtype)
    shards = [Gram.empty(40), Gram.empty(40)]
    for shard, part in ((0, slice(0, 1)), (1, slice(1, 100)), (1, slice(100, 500))):
        shards[shard].update(x[part])
        shards[shard].add_errors(error[part], x[part])
    whole = Gram.empty(40)
    for shard in shards:
        whole.merge(shard)
    assert whole.errors is not None
    exact = error.double().T @ x.double()
    assert float((whole.errors - exact).norm() / exact.norm()) < 1e-5
    assert whole.tokens == 500
