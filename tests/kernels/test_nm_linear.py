import pytest
import torch
import torch.nn.functional as F
from test_nm_fragments import matrix

from llmprune.kernels import configurations, nm_linear, workspace
from llmprune.kernels.nm_linear import HIGHEST_DECODE_TOKENS, linear_24, linear_24_portable
from llmprune.kernels.nm_linear.fragments import to_fragments
from llmprune.kernels.nm_linear.reference import dense_24_reference

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
ROWS, COLUMNS = 40, 264
OPS = ["fragments", "portable"]


class Case:
    """One matrix in both layouts, and the operation over one of them."""

    def __init__(self, op, dtype=torch.float16, rows=ROWS, columns=COLUMNS):
        self.op, self.dtype, self.shape = op, dtype, (rows, columns)
        self.values, self.meta = (part.to(DEVICE) for part in matrix(rows, columns, dtype))
        self.a, self.e = to_fragments(self.values, self.meta) if dtype != torch.float32 else (None, None)
        self.dense = dense_24_reference(self.values, self.meta)
        self.bias = torch.randn(rows).to(dtype).to(DEVICE)

    def x(self, *leading):
        return torch.randn(*leading, self.shape[1]).to(self.dtype).to(DEVICE)

    def arguments(self, x, bias=None):
        if self.op == "portable":
            return x, self.values, self.meta, bias
        return x, self.a, self.e, bias, *self.shape, self.dtype

    def __call__(self, x, bias=None):
        return (linear_24_portable if self.op == "portable" else linear_24)(*self.arguments(x, bias))


@pytest.fixture(params=OPS)
def case(request):
    return Case(request.param)


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    """No choices from this machine's cache, and workspaces that no other test used."""
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
    configurations.forget()
    workspace.release(DEVICE)
    yield
    workspace.release(DEVICE)
    configurations.forget()
    torch.compiler.reset()  # each test compiles anew; what others compiled counts against a limit


@pytest.fixture
def kernels(monkeypatch):
    """Let a CPU run the kernels in the interpreter, as a GPU with 8 multiprocessors; the names of those called."""
    pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")
    from llmprune.kernels.nm_linear import decode, expand, portable

    if DEVICE == CPU:
        import mma_sp_emulation

        mma_sp_emulation.install(monkeypatch)
        monkeypatch.setattr(nm_linear, "_runs_kernels", lambda device: True)
        monkeypatch.setattr(nm_linear, "supported", lambda device: None)
        monkeypatch.setattr(configurations, "sm_count", lambda device: 8)
    calls = []
    for module, name in [
        (decode, "linear_24_decode"),
        (portable, "linear_24_decode_portable"),
        (expand, "expand"),
        (expand, "expand_fragments"),
    ]:
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, whole=whole, name=name: (calls.append(name), whole(*given))[1])
    return calls


def poison():
    """NaN in all memory that the operations share."""
    workspace.scratch(DEVICE, (ROWS, COLUMNS), torch.float16).fill_(torch.nan)
    workspace.partials(DEVICE, (8 * 64 * COLUMNS,)).fill_(torch.nan)


def check(y, case, x, bias=None):
    wide = None if bias is None else bias.double()
    exact = F.linear(x.double(), case.dense.double(), wide)
    eager = F.linear(x, case.dense, bias)
    assert (y.shape, y.dtype) == (eager.shape, eager.dtype)
    assert not y.isnan().any()
    ours, theirs = ((result.double() - exact).abs().max() for result in (y, eager))
    # Floor: half a unit in the last place of the largest result, which eager may meet by luck.
    assert ours <= 2 * theirs + torch.finfo(x.dtype).eps / 2 * exact.abs().max()


@pytest.mark.skipif(DEVICE != CPU, reason="a GPU runs kernels, which sum in another order")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading", [(1,), (3, 5), (), (0,), (2, 0), (70,)])
def test_without_kernels_it_equals_the_dense_layer(op, dtype, leading):
    case = Case(op, dtype)
    x = case.x(*leading)
    assert torch.equal(case(x), F.linear(x.view(-1, COLUMNS), case.dense).view(*leading, ROWS))
    assert torch.equal(case(x, case.bias), F.linear(x.view(-1, COLUMNS), case.dense, case.bias).view(*leading, ROWS))


def test_float32_takes_plain_torch(monkeypatch):
    monkeypatch.setattr(nm_linear, "_runs_kernels", lambda device: True)
    case = Case("portable", torch.float32)
    x = case.x(3)
    assert torch.equal(case(x, case.bias), F.linear(x, case.dense, case.bias))


@pytest.mark.parametrize("tokens", [1, 9, HIGHEST_DECODE_TOKENS, HIGHEST_DECODE_TOKENS + 1])
def test_tokens_decide_the_path(case, kernels, tokens):
    decode, expand = {
        "fragments": ("linear_24_decode", "expand_fragments"),
        "portable": ("linear_24_decode_portable", "expand"),
    }[case.op]
    poison()
    x = case.x(tokens)
    check(case(x, case.bias), case, x, case.bias)
    assert kernels == [decode if tokens <= HIGHEST_DECODE_TOKENS else expand]


def test_no_tokens_give_no_outputs(case, kernels):
    assert case(case.x(0), case.bias).shape == (0, ROWS)
    assert case(case.x(2, 0)).shape == (2, 0, ROWS)


def test_a_measured_limit_moves_the_path(case, kernels):
    op = "linear_24" if case.op == "fragments" else "linear_24_portable"
    configurations.record(f"{op}.dispatch", DEVICE, {"limit": 3}, out_features=ROWS, in_features=COLUMNS)
    for tokens, path in ((2, "decode"), (3, "expand")):
        x = case.x(tokens)
        check(case(x), case, x)
        assert path in kernels.pop()


def measurable(case, tokens):
    """The operation's name, a choice for it that is no default, and what looks it up."""
    from llmprune.kernels.nm_linear.decode import CHOICES, token_groups

    if case.op == "portable":
        choice = {"rows": 16, "columns": 32, "splits": 3, "warps": 2}
        return "linear_24_portable", choice, nm_linear.portable_configuration
    warps, row_tiles = CHOICES[token_groups(tokens)][-1]
    choice = {"warps": warps, "row_tiles": row_tiles, "splits": 2}
    return "linear_24", choice, nm_linear.decode_configuration


@pytest.mark.parametrize("tokens", [3, 20])
def test_a_measured_configuration_runs(case, kernels, tokens):
    op, choice, find = measurable(case, tokens)
    default = find(DEVICE, ROWS, COLUMNS, tokens)
    configurations.record(op, DEVICE, choice, **nm_linear.shape_key(ROWS, COLUMNS, tokens))
    found = find(DEVICE, ROWS, COLUMNS, tokens)
    assert found != default
    assert {name: getattr(found, name) for name in choice} == choice
    poison()
    x = case.x(tokens)
    check(case(x, case.bias), case, x, case.bias)


@pytest.mark.parametrize("change", [{"warps": 3}, {"warps": "4"}, {"splits": 0}, {"splits": 2.5}, {"unknown": 1}])
def test_a_choice_that_no_kernel_can_run_is_not_used(case, kernels, change):
    op, choice, find = measurable(case, 3)
    default = find(DEVICE, ROWS, COLUMNS, 3)
    configurations.record(op, DEVICE, choice | change, **nm_linear.shape_key(ROWS, COLUMNS, 3))
    with pytest.warns(UserWarning, match=rf"{op}, in_features=264 out_features=40 tokens=8: (.|\n)*is not used"):
        assert find(DEVICE, ROWS, COLUMNS, 3) == default


def test_gpus_without_mma_sp_expand(kernels, monkeypatch):
    monkeypatch.setattr(nm_linear, "supported", lambda device: "it cannot")
    case = Case("fragments")
    x = case.x(2)
    check(case(x), case, x)
    assert kernels == ["expand_fragments"]


def test_tokens_count_as_the_kernels_are_compiled():
    pytest.importorskip("triton", reason="triton is not installed")
    from llmprune.kernels.nm_linear.decode import TOKENS, token_groups

    for tokens in range(1, HIGHEST_DECODE_TOKENS + 1):
        assert nm_linear.shape_key(1, 1, tokens)["tokens"] == TOKENS * token_groups(tokens)


@pytest.mark.parametrize("portable", [False, True])
def test_forward_allocates_no_workspace_once_layers_are_built(kernels, portable):
    case = Case("portable" if portable else "fragments", rows=48, columns=1024)
    nm_linear.reserve(DEVICE, *case.shape, portable=portable)
    before = workspace.reserved(DEVICE)
    assert before >= 2 * 48 * 1024
    for tokens in (1, 8, 64, 65):
        x = case.x(tokens)
        check(case(x), case, x)
    assert workspace.reserved(DEVICE) == before


def test_nothing_is_reserved_where_no_kernel_runs():
    nm_linear.reserve(torch.device("meta"), 64, 64)
    nm_linear.reserve(torch.device("cpu"), 64, 64)
    assert workspace.reserved(torch.device("cpu")) == 0


def test_views_that_cannot_be_read_wide_are_copied(case, kernels):
    x = case.x(4, 2)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view_as(x).copy_(x)
    for strange in (shifted, x.transpose(0, 1), x[::2], torch.stack((x, x), -1)[..., 0]):
        check(case(strange), case, strange)


def test_dense_matrix_is_written_out(case):
    if case.op == "portable":
        dense = nm_linear.dense_24_portable(case.values, case.meta)
    else:
        dense = nm_linear.dense_24(case.a, case.e, *case.shape, case.dtype)
    assert torch.equal(dense, case.dense)


def test_operations_are_well_defined_for_the_compiler(case):
    for x, bias in ((case.x(3), None), (case.x(2, 5).requires_grad_(), case.bias.clone().requires_grad_())):
        op = linear_24_portable if case.op == "portable" else linear_24
        torch.library.opcheck(op, case.arguments(x, bias))
    torch.library.opcheck(nm_linear.dense_24, (case.a, case.e, *case.shape, case.dtype))
    torch.library.opcheck(nm_linear.dense_24_portable, (case.values, case.meta))


def test_compiles_without_a_graph_break(case):
    def layer(x):
        return F.silu(case(x, case.bias)) + 1

    x = case.x(2, 3)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    aot = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (2, 7):
        x = case.x(tokens)
        assert torch.equal(aot(x), layer(x))


def test_gradients_reach_inputs_and_bias(case):
    x, bias = case.x(2, 3).requires_grad_(), case.bias.clone().requires_grad_()
    towards = torch.randn(2, 3, ROWS).to(case.dtype).to(DEVICE)
    ours = torch.autograd.grad(case(x, bias), (x, bias), towards)
    theirs = torch.autograd.grad(F.linear(x, case.dense, bias), (x, bias), towards)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_through_the_compiler(case):
    x = case.x(3).requires_grad_()
    compiled = torch.compile(lambda x: case(x, case.bias).sum(), backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(gradient, case.dense.sum(0).expand(3, -1), rtol=1e-2, atol=1e-2)


def test_packed_weights_have_no_gradient():
    case = Case("portable")
    case.values.requires_grad_()
    y = case(case.x(2))  # forward is fine: parameters ask for gradients unless told otherwise
    with pytest.raises(RuntimeError, match=r"packed 2:4 weights\n(.|\n)*fix: call requires_grad_\(False\)"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_autocast_casts_to_the_weights_dtype(op, given, dtype):
    case = Case(op, dtype)
    x, bias = case.x(3).to(given), case.bias.to(given)
    expected = case(x.to(dtype), bias.to(dtype))
    for autocast in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE.type, dtype=autocast):
            y = case(x, bias)
            compiled = torch.compile(case, backend="aot_eager", fullgraph=True)(x, bias)
            assert torch.is_autocast_enabled(DEVICE.type)
        assert y.dtype == dtype
        assert torch.equal(y, expected)
        assert torch.equal(compiled, expected)


def test_autocast_leaves_gradients_in_the_dtype_of_their_input(case):
    x = case.x(3).float().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = case(x)
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, case.dense.float().sum(0).expand(3, -1), rtol=1e-2, atol=1e-2)


def test_inference_mode(case):
    with torch.inference_mode():
        x = case.x(3)
        check(case(x), case, x)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 256, dtype=torch.float16)}, ValueError, r"x is \[2, 256\]; expected \[\.\.\., 264\]"),
        ({"x": torch.zeros(2, 264)}, TypeError, "x is torch.float32, the weights torch.float16; cast x"),
        ({"bias": torch.zeros(1, dtype=torch.float16)}, ValueError, r"bias is \[1\]; expected \[40\]"),
        ({"bias": torch.zeros(40)}, TypeError, "bias is torch.float32, the weights torch.float16"),
        ({"x": torch.zeros(2, 264, dtype=torch.float16, device="meta")}, ValueError, "cpu, meta; expected all on one"),
    ],
)
@pytest.mark.skipif(DEVICE != CPU, reason="the tensors here are on a CPU")
def test_mistakes_are_told_in_words(case, change, error, words):
    x, bias = change.get("x", case.x(2)), change.get("bias", case.bias)
    fragments = nm_linear.linear_24._init_fn
    operation = linear_24_portable._init_fn if case.op == "portable" else fragments
    with pytest.raises(error, match=words):
        operation(*case.arguments(x, bias))


def test_layouts_that_do_not_fit_are_refused():
    case = Case("portable")
    x = case.x(2)
    for values, meta, error in (
        (case.values, case.meta.int(), TypeError),
        (case.values.int(), case.meta, TypeError),
        (case.values[:, 4:], case.meta, ValueError),
        (case.values, case.meta[1:], ValueError),
        (case.values, case.meta.T.contiguous().T, ValueError),
    ):
        with pytest.raises(error, match="expected"):
            linear_24_portable(x, values, meta, None)
    case = Case("fragments")
    for a, e in ((case.a[1:], case.e), (case.a, case.e[:, 1:]), (case.a.long(), case.e)):
        with pytest.raises(ValueError, match=f"{ROWS} x {COLUMNS}"):
            linear_24(x, a, e, None, ROWS, COLUMNS, torch.float16)
    with pytest.raises(ValueError, match="multiple of 8"):
        linear_24(torch.zeros(2, 260, dtype=torch.float16, device=DEVICE), case.a, case.e, None, ROWS, 260, case.dtype)


def test_a_cpu_says_why_it_has_no_sparse_tensor_cores():
    assert nm_linear.supported(CPU) == "cpu is not an NVIDIA GPU"


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "Old has compute capability 7.5; mma.sp needs 8.0 or higher"), ((8, 0), None), ((12, 0), None)],
)
def test_a_gpu_is_judged_by_its_capability(monkeypatch, capability, reason):
    device = torch.device("cuda", 7)  # one that `supported` remembers nothing about
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(configurations, "device_key", lambda device: "Old")
    monkeypatch.setattr(nm_linear, "_has_triton", lambda: True)
    assert nm_linear.supported.__wrapped__(device) == reason
    monkeypatch.setattr(nm_linear, "_has_triton", lambda: False)
    assert nm_linear.supported.__wrapped__(device) == "triton is not installed"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert nm_linear.supported.__wrapped__(device) == "Old is not an NVIDIA GPU"
