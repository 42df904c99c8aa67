import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from llmprune.kernels import block_linear as block_linear_package
from llmprune.kernels import configurations, workspace
from llmprune.kernels.block_linear import (
    BLOCKS,
    NEVER,
    Configuration,
    block_linear,
    choose_configuration,
    choose_default,
    dispatch_shape,
    expand_into,
)

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.float16, torch.bfloat16)


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


class Matrix:
    """A matrix of blocks, both ways; `kept` is bool [block rows, block columns]."""

    def __init__(self, block, kept, dtype=torch.float16):
        kept = torch.as_tensor(kept, dtype=torch.bool)
        (rows, columns), self.block = kept.shape, block
        tiles = torch.randn(rows, columns, block, block, dtype=torch.float64).to(dtype) * kept[:, :, None, None]
        # What follows the last block in memory is no number.
        memory = torch.full((int(kept.sum()) + 8, block, block), torch.nan, dtype=dtype)
        memory[:-8] = tiles[kept]
        self.values = memory.to(DEVICE)[:-8]
        self.crow = F.pad(kept.sum(1).cumsum(0), (1, 0)).int().to(DEVICE)
        self.col = kept.nonzero()[:, 1].int().to(DEVICE)
        self.dense = tiles.transpose(1, 2).reshape(rows * block, columns * block).to(DEVICE)
        self.bias = torch.randn(rows * block, dtype=torch.float64).to(dtype).to(DEVICE)
        counts = kept.sum(1)
        self.per_row = int(counts[0]) if bool((counts == counts[0]).all()) else None
        self.operands = (self.values, self.crow, self.col)

    def inputs(self, *shape):
        return torch.randn(*shape, self.dense.shape[1], dtype=torch.float64).to(self.dense.dtype).to(DEVICE)

    def default(self, tokens):
        """As on an H200."""
        size = self.values.element_size()
        return choose_default(tokens, len(self.dense), self.block, len(self.values), size, 132, 227 << 10)


def uneven(rows, columns):
    """One row of blocks is empty, one is full, the others have some; the first column is in one row only."""
    kept = torch.rand(rows, columns) < 0.5
    kept[:, 0] = False
    kept[0], kept[-1] = False, True
    return kept


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


def assert_as_good_as_dense(y, x, matrix, bias=True):
    """At most twice the error of the dense product in the same dtype, and one unit of rounding."""
    exact = x.double() @ matrix.dense.double().T + (matrix.bias.double() if bias else 0)
    eager = F.linear(x, matrix.dense, matrix.bias if bias else None).double()
    ours, theirs = ((result.double() - exact).abs().max() for result in (y, eager))
    assert not y.isnan().any()
    assert y.shape == exact.shape
    assert ours <= 2 * theirs + torch.finfo(x.dtype).eps * exact.abs().max() + 1e-12


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


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("block", BLOCKS)
def test_operator_is_right(block, dtype):
    matrix = Matrix(block, uneven(3, 4), dtype)
    out_features = len(matrix.dense)
    for shape in [(1,), (2, 35), (3, 1, 5)]:
        x = matrix.inputs(*shape)
        y = block_linear(x, *matrix.operands, matrix.bias, out_features, None)
        assert y.dtype == dtype
        assert y.shape == (*shape, out_features)
        assert_as_good_as_dense(y.flatten(0, -2), x.flatten(0, -2), matrix)
    y = block_linear(x[0], *matrix.operands, None, out_features, None)
    assert_as_good_as_dense(y.flatten(0, -2), x[0].flatten(0, -2), matrix, bias=False)
    assert block_linear(x[:0], *matrix.operands, matrix.bias, out_features, None).shape == (0, 1, 5, out_features)


def test_the_dense_path_is_right_in_memory_that_others_used():
    workspace.release(torch.device(DEVICE))
    matrix = Matrix(16, uneven(5, 4))
    workspace.scratch(torch.device(DEVICE), (200, 200), torch.float16).fill_(torch.nan)
    x = matrix.inputs(7)
    y = block_linear_package._expanded_product(x, *matrix.operands, matrix.bias, len(matrix.dense))
    assert_as_good_as_dense(y, x, matrix)
    expected = torch.empty_like(matrix.dense)
    expand_into(expected, *matrix.operands)
    assert torch.equal(expected, matrix.dense)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU chooses by what was measured on it")
def test_many_tokens_are_multiplied_densely_on_a_cpu(monkeypatch):
    matrix = Matrix(16, uneven(5, 4))
    paths = []
    multiply = block_linear_package.block_linear_reference
    monkeypatch.setattr(
        block_linear_package, "block_linear_reference", lambda *rest: paths.append("blocks") or multiply(*rest)
    )
    few, many = matrix.inputs(511), matrix.inputs(2, 256)
    for x in (few, many):
        y = block_linear(x, *matrix.operands, matrix.bias, len(matrix.dense), None)
        assert_as_good_as_dense(y.flatten(0, -2), x.flatten(0, -2), matrix)
    assert paths == ["blocks"]


def test_the_dense_path_begins_where_it_was_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
    configurations.forget()
    values = Matrix(16, uneven(5, 4)).values
    assert block_linear_package._dense_from(64, 80, values) == NEVER
    configurations.record("block_linear.dispatch", values.device, {"limit": 33}, **dispatch_shape(64, 80, values))
    assert block_linear_package._dense_from(64, 80, values) == 33
    assert block_linear_package._dense_from(64, 96, values) == NEVER
    configurations.forget()


def test_operator_takes_a_vector_and_a_matrix_without_blocks():
    matrix = Matrix(16, torch.zeros(2, 3))
    y = block_linear(matrix.inputs(), *matrix.operands, matrix.bias, 32, 0)
    assert torch.equal(y, matrix.bias)


def test_reference_works_through_more_blocks_than_it_takes_at_once(monkeypatch):
    from llmprune.kernels.block_linear import reference

    matrix = Matrix(16, uneven(3, 7))
    x = matrix.inputs(4)
    whole = reference.block_linear_reference(x, *matrix.operands, matrix.bias, 48)
    monkeypatch.setattr(reference, "_AT_ONCE", 16 * 24 * 2)
    assert_as_good_as_dense(reference.block_linear_reference(x, *matrix.operands, matrix.bias, 48), x, matrix)
    assert_as_good_as_dense(whole, x, matrix)


def test_float16_does_not_overflow_between_blocks():
    matrix = Matrix(16, torch.ones(1, 2))
    matrix.values[0], matrix.values[1] = 100, -100
    x = torch.full((1, 32), 100.0, dtype=torch.float16, device=DEVICE)
    assert torch.equal(block_linear(x, *matrix.operands, None, 16, 2), torch.zeros_like(x[:, :16]))


@pytest.mark.parametrize("per_row", [None, 2])
def test_operator_is_a_good_citizen_of_torch(per_row):
    matrix = Matrix(16, [[1, 0, 1], [0, 1, 1]], torch.float32)
    x = matrix.inputs(2, 3).requires_grad_()
    operator = torch.ops.llmprune.block_linear.default
    torch.library.opcheck(operator, (x, *matrix.operands, matrix.bias.requires_grad_(), 32, per_row))
    torch.library.opcheck(operator, (x.detach(), *matrix.operands, None, 32, per_row))


def test_operator_compiles_into_one_graph():
    matrix = Matrix(16, uneven(2, 3))
    compiled = torch.compile(block_linear, backend="eager", fullgraph=True)
    for tokens in (1, 2, 5, 70):
        x = matrix.inputs(tokens)
        arguments = (x, *matrix.operands, matrix.bias, 32, None)
        assert torch.equal(compiled(*arguments), block_linear(*arguments))


def test_operator_traces_without_data():
    matrix = Matrix(16, uneven(2, 3))
    tensors = (*matrix.operands, matrix.bias)
    traced = make_fx(lambda *given: block_linear(*given, 32, None), tracing_mode="symbolic")(
        matrix.inputs(2, 3), *tensors
    )
    assert "llmprune.block_linear" in traced.code
    x = matrix.inputs(7, 2)
    assert torch.equal(traced(x, *tensors), block_linear(x, *tensors, 32, None))
    on_meta = [tensor.to("meta") for tensor in (x, *tensors)]
    assert block_linear(*on_meta, 32, None).shape == (7, 2, 32)


def test_autocast_casts_the_inputs_to_the_weights():
    matrix = Matrix(16, uneven(2, 3), torch.bfloat16)
    x = matrix.inputs(3)
    with torch.autocast(DEVICE, dtype=torch.float16):
        y = block_linear(x.float(), *matrix.operands, matrix.bias, 32, None)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, block_linear(x, *matrix.operands, matrix.bias, 32, None))


def test_gradients_are_those_of_the_dense_matrix():
    matrix = Matrix(32, uneven(3, 4), torch.float32)
    x, bias = matrix.inputs(2, 5).requires_grad_(), matrix.bias.clone().requires_grad_()
    weights = torch.randn(2, 5, 96, device=DEVICE)
    ours = torch.autograd.grad((block_linear(x, *matrix.operands, bias, 96, None) * weights).sum(), (x, bias))
    dense = torch.autograd.grad((F.linear(x, matrix.dense, bias) * weights).sum(), (x, bias))
    for one, other in zip(ours, dense, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_the_weights_are_refused():
    matrix = Matrix(16, uneven(2, 3))
    x = matrix.inputs(2)
    matrix.values.requires_grad_()
    with pytest.raises(ValueError, match="requires_grad_"):
        block_linear(x, *matrix.operands, None, 32, None)
    with torch.no_grad():
        assert block_linear(x, *matrix.operands, None, 32, None).shape == (2, 32)


def test_operands_are_not_changed():
    matrix = Matrix(16, uneven(2, 3))
    operands = (matrix.inputs(4), *matrix.operands, matrix.bias)
    copies = [operand.clone() for operand in operands]
    block_linear(*operands, 32, None)
    assert all(torch.equal(one, other) for one, other in zip(operands, copies, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": lambda x: x.float()}, TypeError, "x is torch.float32; expected torch.float16"),
        ({"values": lambda v: v.double()}, TypeError, "expected bfloat16"),
        ({"crow": lambda c: c.long()}, TypeError, "expected int32"),
        ({"col": lambda c: c.long()}, TypeError, "expected int32"),
        ({"values": lambda v: v[:, :8]}, ValueError, r"expected \[blocks, B, B\]"),
        ({"values": lambda v: v[:, :8, :8]}, ValueError, r"expected \[blocks, B, B\]"),
        ({"values": lambda v: v[0]}, ValueError, r"expected \[blocks, B, B\]"),
        ({"values": lambda v: v.mT}, ValueError, "contiguous"),
        ({"x": lambda x: x[:, :40]}, ValueError, "multiples of 16"),
        ({"out_features": lambda n: n + 8}, ValueError, "multiples of 16"),
        ({"crow": lambda c: c[:-1]}, ValueError, r"expected \[3\] and \[4\]"),
        ({"col": lambda c: c[:-1]}, ValueError, r"expected \[3\] and \[4\]"),
        ({"per_row": lambda _: 3}, ValueError, "expected 2 rows of 3"),
        ({"bias": lambda b: b[:1]}, ValueError, r"expected \[32\]"),
        ({"bias": lambda b: b.to("meta")}, ValueError, "meta"),
    ],
)
def test_wrong_operands_are_refused(changes, error, words):
    matrix = Matrix(16, [[1, 0, 1], [0, 1, 1]])
    names = ("x", "values", "crow", "col", "bias", "out_features", "per_row")
    arguments = dict(zip(names, (matrix.inputs(2), *matrix.operands, matrix.bias, 32, 2), strict=True))
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    with pytest.raises(error, match=words):
        block_linear(**arguments)
