"""Products of packed weights on a CPU against float64."""

import copy

import pytest
import torch
from cpu_matrices import SHAPES, error, make, needs_kernels, of
from torch.autograd import forward_ad
from torch.nn import functional as F

from llmprune.kernels import configurations, cpu

pytestmark = needs_kernels

TYPES = tuple(cpu.TYPES)
KINDS = tuple(cpu.KINDS)
# 19 tokens are a block of 16, one of 2 and one of 1.
TOKENS = (1, 2, 3, 4, 8, 19)


@pytest.fixture
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("level", range(1, len(cpu.LEVELS)))
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_multiplies_every_shape(kind, dtype, level):
    if level > cpu.library().level:
        pytest.skip(f"this processor has no {cpu.LEVELS[level]}")
    for shape in SHAPES[kind]:
        matrix = make(kind, shape, dtype)
        bias = torch.randn(shape[0]).to(dtype)
        for tokens in TOKENS:
            x = torch.randn(tokens, shape[1]).to(dtype)
            y = torch.full((tokens, shape[0]), torch.nan, dtype=dtype)
            cpu.library().multiply([matrix.packed], x, bias, y, level)
            assert error(y, x, matrix.weight, bias) <= 3, (shape, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_weights_and_matrices_of_nothing_else(kind):
    for dtype in TYPES:
        weight = make(kind, (40, 64), dtype).weight
        weight[[0, 15, 16, 39]] = 0
        for some in (weight, torch.zeros_like(weight)):
            matrix, x = of(kind, some), torch.randn(3, 64).to(dtype)
            y = cpu.linear(x, [matrix.packed], None, [40])
            assert error(y, x, some) <= 3
            assert not y[:, 0].any()


def test_a_bitmask_without_any_zero():
    for dtype in TYPES:
        weight = torch.randn(40, 64).to(dtype).abs() + 1
        x = torch.randn(3, 64).to(dtype)
        assert error(cpu.linear(x, [of("bitmask", weight).packed], None, [40]), x, weight) <= 3


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_matrices_without_rows_or_columns(shape):
    matrix = of("bitmask", torch.zeros(shape).bfloat16())
    bias = torch.randn(shape[0]).bfloat16()
    y = cpu.linear(torch.randn(2, shape[1]).bfloat16(), [matrix.packed], bias, [shape[0]])
    assert torch.equal(y, bias.expand(2, -1))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_weight_comes_back_bit_for_bit(kind, dtype):
    for shape in SHAPES[kind]:
        matrix = make(kind, shape, dtype)
        bits, values = cpu.unpack(matrix.packed)
        assert torch.equal(bits, matrix.bits)
        assert torch.equal(values, matrix.values)
        assert torch.equal(cpu.dense(matrix.packed), matrix.weight)
        assert matrix.packed.nbytes >= matrix.values.nbytes // (2 if dtype == torch.float32 else 1)


def test_float32_weights_that_bfloat16_holds_take_half_the_bytes():
    wide = make("bitmask", (64, 256), torch.float32)
    narrow = of("bitmask", wide.weight.bfloat16().float())
    assert narrow.packed.nbytes < 0.6 * wide.packed.nbytes
    assert cpu.unpack(narrow.packed)[1].dtype == torch.float32
    assert torch.equal(cpu.dense(narrow.packed), narrow.weight)
    x = torch.randn(2, 256)
    assert error(cpu.linear(x, [narrow.packed], None, [64]), x, narrow.weight) <= 3


@pytest.mark.usefixtures("same_threads")
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(kind):
    """Large enough for four: see `Library.threads`."""
    parts = [make(kind, (1000 + 8 * number, 512), torch.bfloat16) for number in range(3)]
    packed, sizes = [part.packed for part in parts], [len(part.weight) for part in parts]
    x = torch.randn(5, 512).bfloat16()
    weight = torch.cat([part.weight for part in parts])
    products, rows = [], []
    for threads in (1, 2, 3, 4, 4):
        torch.set_num_threads(threads)
        assert cpu.library().threads(packed[0].nbytes) == threads
        products.append(cpu.linear(x, packed, None, sizes))
        rows.append(cpu.dense(packed[1]))
        again = cpu.pack(kind, parts[0].layout.shape, parts[0].bits, parts[0].values)
        assert torch.equal(again.view(torch.uint8), packed[0].view(torch.uint8))
        assert torch.equal(cpu.unpack(packed[0])[1], parts[0].values)
    assert all(torch.equal(product, products[0]) for product in products)
    assert all(torch.equal(dense, parts[1].weight) for dense in rows)
    assert error(products[0], x, weight) <= 3


def test_several_matrices_with_one_bias():
    parts = [make("nm", (size, 64), torch.float16) for size in (24, 5, 16)]
    bias, x = torch.randn(45).half(), torch.randn(2, 3, 64).half()
    y = cpu.linear(x, [part.packed for part in parts], bias, [24, 5, 16])
    assert y.shape == (2, 3, 45)
    assert error(y.flatten(0, 1), x.flatten(0, 1), torch.cat([part.weight for part in parts]), bias) <= 3


@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_are_multiplied_by_expanded_rows(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
    configurations.forget()
    matrix = make(kind, (70, 64), torch.bfloat16)
    bias, x = torch.randn(70).bfloat16(), torch.randn(200, 64).bfloat16()
    called = []
    real = cpu.operator.expanded_linear
    monkeypatch.setattr(cpu.operator, "expanded_linear", lambda *args: (called.append(len(args[0])), real(*args))[1])
    for tokens in (63, 64):
        y = cpu.linear(x[:tokens], [matrix.packed], bias, [70])
        assert error(y, x[:tokens], matrix.weight, bias) <= 3
    other = make(kind, (24, 64), torch.bfloat16)
    weight, both = torch.cat([matrix.weight, other.weight]), torch.cat([bias, bias[:24]])
    for slab in (1 << 20, 32 * 64 * 2):  # all rows at once, and in four parts
        monkeypatch.setattr(cpu.operator, "_SLAB", slab)
        y = cpu.linear(x, [matrix.packed, other.packed], both, [70, 24])
        assert error(y, x, weight, both) <= 3
    assert called == [64, 200, 200]
    cpu.choices.record_limit([matrix.packed], [70], 8)
    cpu.linear(x[:8], [matrix.packed], bias, [70])
    assert called == [64, 200, 200, 8]
    configurations.forget()


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_rows_are_widened_in_parts(kind, monkeypatch):
    weight = make(kind, (70, 64), torch.bfloat16).weight.float()
    matrix, x, bias = of(kind, weight), torch.randn(100, 64), torch.randn(140)
    assert cpu.library().describe(matrix.packed).dtype == torch.bfloat16
    for piece in (1 << 20, 32 * 64 * 4):
        monkeypatch.setattr(cpu.operator, "PIECE", piece)
        y = cpu.expanded_linear(x, [matrix.packed] * 2, bias, [70, 70])
        assert error(y, x, weight.repeat(2, 1), bias) <= 3


@pytest.mark.parametrize("first", [*cpu.measuring.COUNTS, cpu.measuring.NEVER])
def test_the_limit_is_found_wherever_it_is(first):
    assert cpu.measuring.find_limit(lambda tokens: tokens >= first) == first


def test_a_measured_limit_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
    configurations.forget()
    matrix = make("bitmask", (64, 128), torch.bfloat16)
    assert cpu.measured_limit([matrix.packed], [64]) is None
    limit = cpu.measure_dense_from([[matrix.packed]], [64])
    assert limit in (*cpu.measuring.COUNTS, cpu.measuring.NEVER)
    assert cpu.measured_limit([matrix.packed], [64]) == cpu.dense_from([matrix.packed], [64]) == limit
    monkeypatch.setattr(cpu.choices, "source_hash", lambda: "others")
    assert cpu.measured_limit([matrix.packed], [64]) is None
    configurations.forget()


@pytest.mark.parametrize(("times", "is_kept"), [((2, 2, 2, 2.5, 9), True), ((2, 9, 2.7, 2.7, 9), False)])
def test_a_limit_that_was_measured_beside_other_load_holds_in_this_process(tmp_path, monkeypatch, times, is_kept):
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
    configurations.forget()
    matrix = make("bitmask", (64, 128), torch.bfloat16)
    monkeypatch.setattr(cpu.measuring, "_times", lambda copies, sizes, tokens: (times, (1, 1, 1, 1, 1)))
    assert cpu.measure_dense_from([[matrix.packed]], [64]) == cpu.measuring.FEWEST_TOKENS
    assert cpu.measured_limit([matrix.packed], [64]) == cpu.measuring.FEWEST_TOKENS
    configurations.forget()
    assert (cpu.measured_limit([matrix.packed], [64]) is not None) is is_kept
    configurations.forget()


def test_activations_that_start_anywhere():
    matrix = make("bitmask", (32, 64), torch.bfloat16)
    buffer = torch.randn(65).bfloat16()
    y = cpu.linear(buffer[1:].view(1, 64), [matrix.packed], None, [32])
    assert error(y, buffer[1:].view(1, 64), matrix.weight) <= 3
    apart = torch.randn(64, 2).bfloat16().t()
    assert error(cpu.linear(apart, [matrix.packed], None, [32]), apart, matrix.weight) <= 3


def test_it_is_compiled_without_a_break_and_differentiated():
    matrix = make("nm", (32, 64), torch.float32)
    bias = torch.randn(32, requires_grad=True)
    x = torch.randn(3, 64, requires_grad=True)

    def product(x, bias):
        return cpu.linear(x, [matrix.packed], bias, [32])

    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x.detach(), bias.detach()), product(x.detach(), bias.detach()))
    (product(x, bias) ** 2).sum().backward()
    found = x.grad.clone(), bias.grad.clone()
    x.grad = bias.grad = None
    (F.linear(x, matrix.weight, bias) ** 2).sum().backward()
    torch.testing.assert_close(found, (x.grad, bias.grad), rtol=1e-4, atol=1e-4)
    torch.library.opcheck(
        torch.ops.llmprune.cpu_linear.default, (x.detach(), [matrix.packed], bias.detach(), [32]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


# torch's own tracing and forward derivatives use what it deprecates.
tracing = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@tracing
def test_a_trace_records_it():
    matrix, bias = make("nm", (32, 64), torch.bfloat16), torch.randn(32).bfloat16()
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: cpu.linear(x, [matrix.packed], bias, [32]), torch.zeros(3, 64).bfloat16())
        x = torch.randn(3, 64).bfloat16()
        assert torch.equal(traced(x), cpu.linear(x, [matrix.packed], bias, [32]))


@tracing
def test_transforms_and_forward_derivatives_go_through_the_dense_matrix():
    parts = [make("bitmask", (rows, 64), torch.float32) for rows in (24, 8)]
    weight, bias, x = torch.cat([part.weight for part in parts]), torch.randn(32), torch.randn(5, 3, 64)

    def product(x):
        return cpu.linear(x, [part.packed for part in parts], bias, [24, 8])

    def expected(x):
        return F.linear(x, weight, bias)

    for transform in (
        lambda call: torch.func.vmap(call, in_dims=1, out_dims=1)(x),
        lambda call: torch.func.jvp(call, (x,), (x + 1,))[1],
        lambda call: torch.func.vmap(torch.func.grad(lambda one: call(one).square().sum()))(x),
    ):
        assert torch.equal(transform(product), transform(expected))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        found, wanted = (forward_ad.unpack_dual(call(dual)).tangent for call in (product, expected))
        assert torch.equal(found, wanted)


def test_a_copy_of_a_matrix_is_one():
    matrix = make("bitmask", (32, 64), torch.bfloat16)
    x = torch.randn(1, 64).bfloat16()
    for another in (copy.deepcopy(matrix.packed), matrix.packed.clone()):
        assert torch.equal(cpu.linear(x, [another], None, [32]), cpu.linear(x, [matrix.packed], None, [32]))
