import functools

import pytest
import torch
from test_nm_fragments import matrix

from llmprune.kernels.nm_linear.fragments import activation_fragments_reference, to_fragments
from llmprune.kernels.nm_linear.reference import dense_24_reference

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")

from llmprune.kernels.nm_linear import decode  # noqa: E402 - needs triton
from llmprune.kernels.nm_linear.decode import CHOICES, DecodeConfiguration, linear_24_decode  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rounding of one output in each 16-bit type, as a floor for sums that eager torch happens to round exactly.
FLOOR = {torch.bfloat16: 2**-10, torch.float16: 2**-13}


@pytest.fixture(autouse=True)
def emulation(monkeypatch):
    if DEVICE == "cpu":
        import mma_sp_emulation

        mma_sp_emulation.install(monkeypatch)


def operands(tokens, rows, inputs, dtype):
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(rows)).to(dtype)
    return x.to(DEVICE), *(part.to(DEVICE) for part in matrix(rows, inputs, dtype)), bias.to(DEVICE)


@pytest.fixture
def allocated(monkeypatch):
    """What `torch.empty` made, all of it poisoned: NaN, or -1 for integers, which are the words of two NaN."""
    tensors, empty = [], torch.empty

    def poisoned(*shape, **options):
        tensor = empty(*shape, **options)
        tensors.append(tensor.fill_(torch.nan if tensor.is_floating_point() else -1))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    return tensors


def check(y, x, values, meta, bias):
    weight = dense_24_reference(values, meta)
    wide = None if bias is None else bias.double()
    exact = torch.nn.functional.linear(x.double(), weight.double(), wide)
    eager = torch.nn.functional.linear(x, weight, bias)
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert not y.isnan().any()
    for norm in (torch.linalg.vector_norm, lambda error: error.abs().max()):
        ours, theirs = (norm(result.double() - exact) / norm(exact) for result in (y, eager))
        assert ours <= 2 * theirs + FLOOR[x.dtype]


def run(tokens, rows, inputs, dtype, configuration, with_bias):
    x, values, meta, bias = operands(tokens, rows, inputs, dtype)
    bias = bias if with_bias else None
    a, e = to_fragments(values, meta)
    y = linear_24_decode(x, a, e, bias, rows, configuration)
    check(y, x, values, meta, bias)
    return y


@pytest.mark.parametrize("tokens", [1, 3, 5, 8, 9, 16, 17, 33, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_number_of_tokens(tokens, dtype, allocated):
    warps, row_tiles = CHOICES[decode.token_groups(tokens)][-1]
    run(tokens, 24, 1288, dtype, DecodeConfiguration(warps, row_tiles), tokens % 2 == 0)


@pytest.mark.parametrize(
    ("tokens", "warps", "row_tiles"), [(8 * groups - 1, *choice) for groups in CHOICES for choice in CHOICES[groups]]
)
def test_every_configuration(tokens, warps, row_tiles, allocated):
    """Two rounds, of which the second has one step and eight inputs; two row tiles of which the second is half full."""
    run(tokens, 24, 256 * (warps + 1) + 8, torch.float16, DecodeConfiguration(warps, row_tiles), True)


@pytest.mark.parametrize(
    ("splits", "with_bias", "tokens", "row_tiles", "dtype"),
    [
        (1, False, 5, 1, torch.bfloat16),
        (2, True, 5, 1, torch.bfloat16),
        (2, False, 20, 2, torch.float16),
        (3, True, 5, 2, torch.float16),
        (3, False, 9, 2, torch.bfloat16),
        (8, True, 20, 2, torch.bfloat16),
    ],
)
def test_splits(splits, with_bias, tokens, row_tiles, dtype, allocated):
    """22 steps: of 3 splits some do two rounds with idle warps, of 8 splits the last two have nothing to do."""
    run(tokens, 17, 22 * 256, dtype, DecodeConfiguration(4, row_tiles, splits), with_bias)


@pytest.mark.parametrize(
    ("inputs", "tokens"), [(8, 2), (256, 2), (264, 2), (1024, 2), (1032, 2), (2040, 2), (4096, 2), (8, 20), (1048, 20)]
)
def test_any_number_of_inputs(inputs, tokens, allocated):
    run(tokens, 16, inputs, torch.bfloat16, DecodeConfiguration(4, 2), False)


def test_one_row():
    x, values, meta, bias = operands(1, 1, 256, torch.float16)
    check(linear_24_decode(x, *to_fragments(values, meta), bias, 1, DecodeConfiguration(4, 1)), x, values, meta, bias)


def test_infinite_activations_stay_with_their_token_and_padding_does_not_see_them():
    """Padding tokens repeat the last one, and padding weights are zero: neither may turn it into another's NaN."""
    x, values, meta, _ = operands(3, 16, 264, torch.float16)
    x[2] = torch.inf
    values[:] = values.abs() + 1
    y = linear_24_decode(x, *to_fragments(values, meta), None, 16, DecodeConfiguration(4, 1))
    assert y[:2].isfinite().all()


@pytest.mark.parametrize(("tokens", "splits"), [(3, 1), (3, 2), (30, 1), (30, 3)])
def test_workspace_is_enough_used_and_never_read_before_written(tokens, splits, allocated):
    rows, inputs = 40, 1032
    x, values, meta, bias = operands(tokens, rows, inputs, torch.float16)
    configuration = DecodeConfiguration(4, 2, splits)
    size = decode.workspace_bytes(tokens, rows, inputs, configuration) // 4
    workspace = torch.full((size + 8,), torch.nan, device=DEVICE)
    call = functools.partial(linear_24_decode, x, *to_fragments(values, meta), bias, rows, configuration)
    allocated.clear()
    y = call(workspace[:size])
    assert len(allocated) == 1, "nothing but the output"
    check(y, x, values, meta, bias)
    assert workspace[size:].isnan().all()
    assert torch.equal(y, call(workspace)), "bit-identical twice"
    assert torch.equal(y, call(None))
    if size:
        with pytest.raises(ValueError, match=f"at least {size}"):
            call(workspace[: size - 1])
        with pytest.raises(ValueError, match="16 bytes"):
            call(workspace[1:])


@pytest.mark.parametrize(("tokens", "inputs", "groups"), [(1, 8, 1), (9, 264, 2), (17, 512, 4)])
def test_activation_fragments_follow_their_definition(tokens, inputs, groups, allocated):
    x = operands(tokens, 1, inputs, torch.float16)[0]
    fragments = decode.activation_fragments(x, groups)
    assert torch.equal(fragments.cpu(), activation_fragments_reference(x.cpu(), groups))


def test_inputs_are_not_changed():
    x, values, meta, bias = operands(9, 16, 512, torch.bfloat16)
    inputs = [x, *to_fragments(values, meta), bias]
    copies = [tensor.clone() for tensor in inputs]
    linear_24_decode(*inputs, 16, DecodeConfiguration(4, 2, 2))
    assert all(torch.equal(one, other) for one, other in zip(inputs, copies, strict=True))


def misaligned(tensor):
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:].view(tensor.shape)
    return moved.copy_(tensor)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": misaligned}, "x starts at address .* 16 bytes"),
        ({"a": misaligned}, "a starts at address .* 16 bytes"),
        ({"e": misaligned}, "e starts at address .* 16 bytes"),
        ({"bias": misaligned}, "bias starts at address .* 16 bytes"),
        ({"x": lambda x: x.float()}, "bfloat16 or float16"),
        ({"x": lambda x: x.T.contiguous().T}, "contiguous"),
        ({"x": lambda x: x.repeat(20, 1)}, "80 tokens"),
        ({"x": lambda x: x[:0]}, "0 tokens"),
        ({"x": lambda x: x[:, :256].contiguous()}, "16 x 256"),
        ({"a": lambda a: a.long()}, "int64"),
        ({"bias": lambda bias: bias[:8]}, "bias"),
        ({"configuration": lambda _: DecodeConfiguration(3, 1)}, "warps=3"),
        ({"configuration": lambda _: DecodeConfiguration(4, 1, 9)}, r"splits in \[1, 8\]"),
    ],
)
def test_what_the_kernel_was_not_made_for_is_refused(change, words):
    x, values, meta, bias = operands(4, 16, 512, torch.float16)
    a, e = to_fragments(values, meta)
    arguments = {"x": x, "a": a, "e": e, "bias": bias, "out_features": 16, "configuration": DecodeConfiguration(4, 1)}
    arguments |= {name: function(arguments[name]) for name, function in change.items()}
    with pytest.raises(ValueError, match=words):
        linear_24_decode(**arguments)


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32, 33, 64])
@pytest.mark.parametrize(
    ("rows", "inputs"), [(16, 8), (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (3072, 2048)]
)
@pytest.mark.parametrize("sm_count", [1, 40, 132])
def test_defaults_are_configurations_in_use(tokens, rows, inputs, sm_count):
    configuration = decode.choose_default(rows, inputs, tokens, sm_count)
    assert (configuration.warps, configuration.row_tiles) in CHOICES[decode.token_groups(tokens)]
    assert 1 <= configuration.splits <= decode.HIGHEST_SPLITS


def test_defaults_give_each_multiprocessor_warps_without_a_second_launch():
    for tokens in (1, 16, 32, 64):
        for rows, inputs in [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)]:
            choice = decode.choose_default(rows, inputs, tokens, 132)
            assert choice.splits == 1
            assert rows / 16 / choice.row_tiles * choice.warps >= 12 * 132
    assert decode.choose_default(28672, 4096, 1, 132) == DecodeConfiguration(4, 1)
    assert decode.choose_default(28672, 4096, 16, 132) == DecodeConfiguration(4, 2)
    assert decode.choose_default(256, 14336, 1, 132).splits > 1
