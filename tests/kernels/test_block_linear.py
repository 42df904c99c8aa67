import numpy as np
import pytest
import torch
from block_matrices import DEVICE, Matrix, assert_as_good_as_dense, uneven

from llmprune.kernels import configurations
from llmprune.kernels.block_linear import (
    BLOCKS,
    Configuration,
    choose_configuration,
    choose_default,
)

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """The interpreter holds bfloat16 as uint16 and multiplies the bits: hand its dot the values."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle):
        if handle.dtype.scalar != triton.language.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32)

    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )


def run(matrix, x, configuration, bias=True, per_row=None):
    """The kernel's result in poisoned memory, of which it may write its own part only."""
    from llmprune.kernels.block_linear.kernel import block_linear_triton

    shape = (len(x), len(matrix.dense))
    y = x.new_full((len(x) + 3, shape[1]), torch.nan)
    workspace = None
    if configuration.splits > 1:
        workspace = torch.full((configuration.splits, *shape), torch.nan, device=x.device)
    indices, given = (matrix.crow, matrix.col), matrix.bias if bias else None
    block_linear_triton(x, matrix.values, indices, given, y[: len(x)], per_row, configuration, workspace)
    assert y[len(x) :].isnan().all()
    return y[: len(x)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(tokens, torch.float16) for tokens in (1, 3, 5, 17, 63, 64, 65, 123)]
    + [(3, torch.bfloat16), (65, torch.bfloat16)],
)
def test_kernel_is_right_in_its_default_configuration(tokens, block, dtype):
    columns = 3 if block == 128 else 7
    matrix = Matrix(block, uneven(3, columns), dtype)
    x = matrix.inputs(tokens)
    assert_as_good_as_dense(run(matrix, x, matrix.default(tokens)), x, matrix)


@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("block", [16, 64])
def test_kernel_is_right_in_float32(block, tokens):
    matrix = Matrix(block, uneven(3, 4), torch.float32)
    x = matrix.inputs(tokens)
    assert_as_good_as_dense(run(matrix, x, matrix.default(tokens)), x, matrix)


@pytest.mark.parametrize(
    "kept",
    [[[1]], [[0]], [[1, 1, 1]], [[0, 1, 0, 1, 1]], [[1], [0], [1]], [[0, 0], [0, 0]], [[1, 1], [1, 1]]],
    ids=str,
)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("block", [16, 32])
def test_kernel_is_right_where_blocks_stand_anywhere(kept, splits, block):
    matrix = Matrix(block, kept)
    x = matrix.inputs(5)
    configuration = Configuration(16, 16, 64, splits)
    assert_as_good_as_dense(run(matrix, x, configuration), x, matrix)
    y = run(matrix, x, configuration, bias=False, per_row=matrix.per_row)
    assert_as_good_as_dense(y, x, matrix, bias=False)


@pytest.mark.parametrize(
    ("block", "configuration"),
    [
        (16, Configuration(16, 8, 16)),
        (16, Configuration(16, 8, 128, splits=2)),
        (32, Configuration(16, 16, 16, group=1)),
        (32, Configuration(32, 32, 64, splits=9, group=2)),
        (64, Configuration(32, 32, 16, splits=2, group=3)),
        (64, Configuration(32, 32, 128, group=5)),
        (128, Configuration(64, 32, 32, splits=5)),
        (128, Configuration(128, 32, 64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("balanced", [False, True])
def test_kernel_is_right_in_other_configurations(block, configuration, balanced):
    configuration.check(block)
    matrix = Matrix(block, [[0, 1, 1], [1, 1, 0], [1, 0, 1]] if balanced else uneven(3, 3))
    x = matrix.inputs(9 if block == 128 else 33)
    assert_as_good_as_dense(run(matrix, x, configuration, per_row=matrix.per_row), x, matrix)


@pytest.mark.parametrize("step", [16, 32, 64])
def test_inputs_of_absent_blocks_are_not_read_into_the_sum(step):
    matrix = Matrix(16, uneven(3, 7)[:-1])
    x = matrix.inputs(5)
    y = run(matrix, x, Configuration(16, 16, step, splits=2))
    x[:, :16] = torch.nan
    assert torch.equal(run(matrix, x, Configuration(16, 16, step, splits=2)), y)


@pytest.mark.parametrize(("step", "count"), [(16, 3), (64, 4), (64, 3)])
def test_balanced_rows_give_the_same_bits(step, count):
    matrix = Matrix(16, torch.rand(4, 6).argsort(1) < count)
    assert matrix.per_row == count
    x, configuration = matrix.inputs(20), Configuration(16, 32, step, splits=2)
    # What crow holds must not matter to balanced rows.
    plain = run(matrix, x, configuration)
    matrix.crow = torch.full_like(matrix.crow, 7)
    assert torch.equal(run(matrix, x, configuration, per_row=count), plain)


@pytest.mark.parametrize("tokens", [1, 100])
def test_fresh_memory_is_allocated_as_the_configuration_asks(tokens):
    from llmprune.kernels.block_linear.kernel import block_linear_allocating

    matrix = Matrix(16, uneven(2, 9))
    for splits in (1, 2):
        x, indices = matrix.inputs(tokens), (matrix.crow, matrix.col)
        configuration = Configuration(16, 16, 32, splits)
        y = block_linear_allocating(x, matrix.values, indices, matrix.bias, 32, None, configuration)
        assert_as_good_as_dense(y, x, matrix)


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 8192])
@pytest.mark.parametrize("out_features", [128, 4096, 28672])
@pytest.mark.parametrize("shared_bytes", [99 << 10, 227 << 10])
def test_defaults_fit(tokens, out_features, shared_bytes):
    for block in BLOCKS:
        for itemsize in (2, 4):
            for per_row in (0, 1, 100):
                blocks = per_row * out_features // block
                chosen = choose_default(tokens, out_features, block, blocks, itemsize, 132, shared_bytes)
                chosen.check(block)
                assert chosen.shared_bytes(itemsize) <= shared_bytes
                assert 1 <= chosen.splits <= max(1, per_row * block // chosen.step)


def test_few_programs_share_the_blocks_of_a_row():
    def splits(out_features, per_row):
        return choose_default(1, out_features, 64, out_features // 64 * per_row, 2, 132, 227 << 10).splits

    assert splits(4096, 64) == 8  # of 8 steps: 9 would make 4 programs for each processor, but share out no better
    assert splits(4096, 30) == 6  # of 5 steps: the 7 that have at least 4 would leave one without a step
    assert splits(131072, 64) == 1


@pytest.mark.parametrize(
    "wrong", [{"rows": 32}, {"rows": 8}, {"tokens": 24}, {"tokens": 4}, {"step": 48}, {"step": 8}, {"splits": 0}]
)
def test_configurations_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Configuration(**({"rows": 16, "tokens": 16, "step": 32} | wrong)).check(16)


def test_a_measured_choice_is_taken(monkeypatch):
    matrix = Matrix(16, torch.ones(2, 5))
    default = choose_configuration(5, 80, 32, matrix.values, 5)
    asked = {
        "tokens": 8,
        "in_features": 80,
        "out_features": 32,
        "block": 16,
        "blocks": 10,
        "balanced": 1,
        "itemsize": 2,
    }
    choice = {"rows": 16, "tokens": 8, "step": 32, "splits": 2, "group": 4, "warps": 1, "stages": 5}
    monkeypatch.setattr(
        configurations,
        "measured",
        lambda op, device, **shape: choice if (op, shape) == ("block_linear", asked) else None,
    )
    assert choose_configuration(5, 80, 32, matrix.values, 5) == Configuration(**choice) != default
    assert choose_configuration(5, 80, 32, matrix.values, None) == default
    choice["rows"] = 32
    with pytest.raises(ValueError, match="at most 16 rows"):
        choose_configuration(5, 80, 32, matrix.values, 5)
