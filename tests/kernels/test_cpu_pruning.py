"""The CPU kernels that pruning uses, against float64 or by definition, on any number of threads."""

from unittest import mock

import pytest
import torch
from cpu_matrices import needs_kernels

from llmprune.kernels import cpu
from llmprune.kernels.obs_sweep import sweep_block
from llmprune.kernels.obs_sweep.reference import sweep_block_reference
from llmprune.precision import add_gram

SHAPES = [(1, 1), (3, 63), (16, 5), (20, 33), (64, 64), (128, 70), (256, 130)]
GROUPS = [None, (2, 4), (1, 4), (4, 8), (0, 2), (3, 3), (16, 32)]


def fits(columns, group):
    return group is None or columns % group[1] == 0


needs_bf16 = pytest.mark.skipif(
    cpu.unavailable() is not None or cpu.library().level < 2 or torch.cpu._is_amx_tile_supported(),
    reason="no AVX-512 BF16, or AMX, which torch uses",
)


def operands(columns, rows):
    generator = torch.Generator().manual_seed(columns * 1000 + rows)
    x = torch.randn(2 * columns + 3, columns, generator=generator, dtype=torch.float64)
    upper = torch.linalg.cholesky(x.T @ x).T.float().contiguous()
    sums, original = torch.randn(2, columns, rows, generator=generator) * torch.tensor([20.0, 1.0])[:, None, None]
    keep = torch.rand(columns, rows, generator=generator) > 0.5
    return sums, original, upper, upper.diagonal().square(), keep


def exact(sums, original, upper, importance, keep, group):
    doubles = [tensor.double() for tensor in (sums, original, upper, importance)]
    keep = keep.clone()
    sweep_block_reference(*doubles, keep, group)
    return doubles[0], keep


@needs_kernels
@pytest.mark.parametrize(
    ("columns", "rows", "group"), [(*shape, group) for shape in SHAPES for group in GROUPS if fits(shape[0], group)]
)
def test_the_sweep_equals_the_float64_reference_on_every_instruction_set(columns, rows, group):
    inputs = operands(columns, rows)
    expected, mask = exact(*inputs, group)
    for level in range(1, cpu.library().level + 1):
        sums, keep = inputs[0].clone(), inputs[4].clone()
        cpu.library().sweep(sums, *inputs[1:4], keep, group, level)
        assert torch.equal(keep, mask)
        assert (sums.double() - expected).norm() <= 1e-5 * expected.norm()


@needs_kernels
@pytest.mark.parametrize("group", [None, (2, 4), (3, 5)])
def test_blocks_of_any_number_of_columns_are_swept(group):
    inputs = operands(cpu.MOST_COLUMNS + 54 if group is None or group[1] == 5 else cpu.MOST_COLUMNS + 44, 20)
    expected, mask = exact(*inputs, group)
    sums, keep = inputs[0].clone(), inputs[4].clone()
    # Not contiguous, as the factor of a Gram matrix is.
    sweep_block(sums, inputs[1], inputs[2].T.contiguous().T, inputs[3], keep, group)
    assert torch.equal(keep, mask)
    assert (sums.double() - expected).norm() <= 1e-5 * expected.norm()


@needs_kernels
def test_longer_groups_take_the_reference():
    inputs = operands(80, 6)
    mask = exact(*inputs, (20, 40))[1]
    sums, keep = inputs[0].clone(), inputs[4].clone()
    with mock.patch.object(cpu.library(), "sweep", side_effect=AssertionError):
        sweep_block(sums, *inputs[1:4], keep, (20, 40))
    assert torch.equal(keep, mask)


@needs_kernels
def test_the_number_of_threads_changes_no_bit():
    inputs, threads, found = operands(128, 5000), torch.get_num_threads(), []
    x = torch.randn(300, 700).bfloat16()
    try:
        for count in range(1, 5):
            torch.set_num_threads(count)
            sums, keep, total = inputs[0].clone(), inputs[4].clone(), torch.zeros(700, 700)
            sweep_block(sums, *inputs[1:4], keep, (2, 4))
            add_gram(total, x)
            found.append((sums, keep, cpu.keep_in_groups_compiled(inputs[1].view(-1, 4), 2), total.tril()))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0][:3], other[:3], strict=True))
        if cpu.library().level >= 2:
            assert torch.equal(found[0][3], other[3])


@needs_kernels
@pytest.mark.parametrize("of", [1, 2, 3, 4, 5, 8, 16, 31, 32])
def test_groups_keep_their_highest_scores_and_of_equal_ones_the_last(of):
    generator = torch.Generator().manual_seed(of)
    for count, keep in [(0, 1), (1, 0), (3, of), (67, 1), (1000, of // 2)]:
        # Few values, so that most groups have equal ones; zero has two signs.
        scores = torch.randint(-2, 3, (count, of), generator=generator) * torch.tensor(-0.5)
        scores[:, ::3] = scores[:, ::3].clamp(0).mul(float("inf")).nan_to_num(0, float("inf"))
        found = cpu.library().choose(scores, keep)
        order = scores.sort(dim=1, stable=True).indices
        expected = torch.zeros_like(found).scatter_(1, order[:, of - keep :], True)
        assert torch.equal(found, expected)


@needs_kernels
def test_scores_of_another_layout_or_dtype_are_refused_or_left_to_torch():
    wide = torch.randn(6, 8)
    assert torch.equal(
        cpu.keep_in_groups_compiled(wide[:, ::2], 2), cpu.keep_in_groups_compiled(wide[:, ::2].clone(), 2)
    )
    assert cpu.keep_in_groups_compiled(wide.double(), 2) is None
    assert cpu.keep_in_groups_compiled(torch.randn(2, cpu.MOST_GROUP + 1), 2) is None
    with pytest.raises(ValueError, match="contiguous"):
        cpu.library().choose(wide[:, ::2], 2)
    with pytest.raises(ValueError, match="does not go together"):
        cpu.library().choose(wide, 9)


@needs_bf16
@pytest.mark.parametrize(("tokens", "width"), [(0, 3), (1, 1), (7, 5), (33, 48), (64, 50), (129, 97), (515, 150)])
def test_the_gram_of_bfloat16_is_exact_but_for_float32_sums(tokens, width):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 2 * width, generator=generator).bfloat16()[:, ::2]
    before = torch.randn(width, width, generator=generator)
    total = before.clone()
    assert cpu.add_gram_compiled(total, x)
    expected = before.double() + x.double().T @ x.double()
    assert (total.double() - expected).tril().abs().max() <= 1e-6 * (1 + expected.abs().max())


@needs_bf16
def test_one_product_of_bfloat16_is_not_rounded():
    x = torch.tensor([[1.0078125, 1.9921875], [0.0, 0.0]]).bfloat16()
    total = torch.zeros(2, 2)
    assert cpu.add_gram_compiled(total, x)
    assert torch.equal(total.tril(), (x.float().T @ x.float()).tril())


@needs_bf16
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_that_are_not_finite_reach_the_diagonal(value):
    x = torch.ones(5, 60).bfloat16()
    x[3, 50] = value
    total = torch.zeros(60, 60)
    assert cpu.add_gram_compiled(total, x)
    assert not total[50, 50].isfinite()
    assert total[:50, :50].tril().isfinite().all()


@needs_kernels
def test_other_sums_and_inputs_are_left_to_torch():
    rows = torch.ones(4, 3)
    assert not cpu.add_gram_compiled(torch.zeros(3, 3), rows)
    assert not cpu.add_gram_compiled(torch.zeros(3, 3, dtype=torch.float64), rows.bfloat16())
    assert not cpu.add_gram_compiled(torch.zeros(3, 6)[:, ::2], rows.bfloat16())


@needs_kernels
def test_shapes_that_do_not_go_together_are_refused():
    sums, original, upper, importance, keep = operands(16, 5)
    with pytest.raises(ValueError, match="contiguous"):
        cpu.library().sweep(sums, original[:8], upper, importance, keep, None)
    with pytest.raises(ValueError, match="float32"):
        cpu.library().sweep(sums.bfloat16(), original, upper, importance, keep, None)
    with pytest.raises(ValueError, match="float32"):
        cpu.library().add_gram(torch.zeros(5, 5), original)
    with pytest.raises(ValueError, match="go together"):
        cpu.library().sweep(sums, original, upper, importance, keep, (2, 5))
    with pytest.raises(ValueError, match="go together"):
        cpu.library().sweep(*operands(cpu.MOST_COLUMNS + 1, 2), None)
    with pytest.raises(ValueError, match="inputs of width 3"):
        cpu.library().add_gram(torch.zeros(2, 2), torch.ones(4, 3).bfloat16())
