import pytest
import torch

from llmprune.kernels.obs_sweep import run_columns, sweep_block
from llmprune.kernels.obs_sweep.reference import sweep_block_reference

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")

SHAPES = [(1, 1), (3, 63), (16, 5), (20, 33), (128, 70)]


def operands(columns, rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(columns * 1000 + rows)
    x = torch.randn(2 * columns + 3, columns, generator=generator, dtype=torch.float64)
    upper = torch.linalg.cholesky(x.T @ x).T.contiguous()
    asked = 20 * torch.randn(columns, rows, generator=generator, dtype=torch.float64)
    original = torch.randn(columns, rows, generator=generator, dtype=torch.float64)
    keep = torch.rand(columns, rows, generator=generator) > 0.5
    return asked.to(dtype), original.to(dtype), upper.to(dtype), upper.diagonal().square().to(dtype), keep


def swept(implementation, sums, original, upper, importance, keep, group):
    """What the columns lose, and the mask; the operands stay as they are."""
    sums, keep = sums.clone(), keep.clone()
    assert implementation(sums, original, upper, importance, keep, group) is None
    return sums, keep


def by_definition(asked, original, upper, keep):
    """Column by column, in float64, straight from the formula."""
    errors = torch.zeros_like(original)
    for k in range(len(asked)):
        total = asked[k] + upper[:k, k] @ errors[:k]
        errors[k] = torch.where(keep[k], -total / upper[k, k], original[k])
    return errors


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_reference_follows_the_formula(columns, rows):
    asked, original, upper, importance, keep = operands(columns, rows, torch.float64)
    errors, kept = swept(sweep_block_reference, asked, original, upper, importance, keep, None)
    torch.testing.assert_close(errors, by_definition(asked, original, upper, keep), rtol=1e-9, atol=1e-9)
    assert torch.equal(kept, keep)


@pytest.mark.parametrize(
    ("columns", "rows", "group"), [(4, 7, (2, 4)), (32, 9, (2, 4)), (24, 5, (4, 8)), (6, 3, (1, 3))]
)
def test_groups_are_chosen_by_their_values_when_their_turn_comes(columns, rows, group):
    asked, original, upper, importance, keep = operands(columns, rows, torch.float64)
    errors, kept = swept(sweep_block_reference, asked, original, upper, importance, keep, group)
    n, m = group
    for high in range(m, columns + 1, m):
        # With everything before it fixed and everything in it kept, a column is worth its present value.
        trial = kept.clone()
        trial[high - m : high] = True
        present = original - by_definition(asked, original, upper, trial)
        scores = (present.square() * importance[:, None])[high - m : high]
        expected = torch.zeros(m, rows, dtype=torch.bool).scatter(0, scores.topk(n, dim=0).indices, True)
        assert torch.equal(kept[high - m : high], expected)
    torch.testing.assert_close(errors, by_definition(asked, original, upper, kept), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("group", [None, (2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize(("columns", "rows"), [(16, 5), (24, 33), (128, 33)])
def test_kernel_equals_the_reference(columns, rows, group):
    from llmprune.kernels.obs_sweep.kernel import sweep_block_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [tensor.to(device) for tensor in operands(columns, rows)]
    errors, kept = swept(sweep_block_triton, *inputs, group)
    expected, expected_kept = swept(sweep_block_reference, *inputs, group)
    exact, _ = swept(sweep_block_reference, *(t.double() if t.is_floating_point() else t for t in inputs), group)
    assert torch.equal(kept, expected_kept)
    ours, theirs = ((e.double() - exact).norm() / exact.norm() for e in (errors, expected))
    assert not errors.isnan().any()
    assert ours <= 2 * theirs + 1e-7


def test_only_the_sums_and_a_mask_that_is_chosen_change():
    for group, changed in (((2, 4), {0, 4}), (None, {0})):
        inputs = operands(32, 8)
        copies = [tensor.clone() for tensor in inputs]
        sweep_block(*inputs, group)
        assert {i for i, pair in enumerate(zip(inputs, copies, strict=True)) if not torch.equal(*pair)} == changed


@pytest.mark.parametrize("columns", [1, 4, 5, 37, 64])
@pytest.mark.parametrize("step", [1, 4, 7, 100])
def test_columns_are_decided_once_in_order_with_all_that_is_asked_of_them(columns, step):
    generator = torch.Generator().manual_seed(columns)
    upper = torch.randn(columns, columns, generator=generator, dtype=torch.float64).triu()
    lost = torch.randn(columns, 3, generator=generator, dtype=torch.float64)
    sums, seen = torch.zeros_like(lost), []

    def decide(low, high):
        seen.append((low, high))
        torch.testing.assert_close(sums[low:high], upper[:low, low:high].T @ lost[:low], rtol=1e-12, atol=1e-12)
        sums[low:high] = lost[low:high]

    run_columns(sums, upper, step, decide)
    assert seen == [(low, min(low + step, columns)) for low in range(0, columns, step)]
    assert torch.equal(sums, lost)


@pytest.mark.slow
def test_compiles_for_gpus_without_spilling():
    from compile_ahead import compile_all

    from llmprune.kernels.obs_sweep.kernel import _ROWS, _WARPS

    pointers = dict.fromkeys(("sums", "original", "upper", "importance"), "*fp32") | {"keep": "*i8"}
    jobs = [
        {
            "kernel": "llmprune.kernels.obs_sweep.kernel:_sweep_kernel",
            "capability": capability,
            "arguments": pointers | dict.fromkeys(("rows", "columns", "stride"), "i32"),
            "constants": {"N": n, "M": m, "COLUMNS": 128, "ROWS": _ROWS},
            "warps": _WARPS,
        }
        for capability in (80, 90, 100)
        for n, m in ((0, 0), (2, 4), (4, 8))
    ]
    for job, used in zip(jobs, compile_all(jobs), strict=True):
        assert used["STACK"] == used["LOCAL"] == 0, job
