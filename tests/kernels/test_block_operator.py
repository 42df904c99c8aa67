import pytest
import torch
import torch.nn.functional as F
from block_matrices import DEVICE, HALF, Matrix, assert_as_good_as_dense, uneven
from torch.fx.experimental.proxy_tensor import make_fx

from llmprune.kernels import block_linear as block_linear_package
from llmprune.kernels import configurations, workspace
from llmprune.kernels.block_linear import BLOCKS, NEVER, block_linear, dispatch_shape, expand_into

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")


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
