"""A decoder layer for one token in two calls, against float64."""

import pytest
import torch
from cpu_matrices import make, needs_kernels
from torch.nn import functional as F

from llmprune.kernels import cpu
from llmprune.kernels.cpu import Norm, TokenLayer, Weights
from llmprune.patterns import Unstructured
from llmprune.storage.formats import Int8BitmaskLayout, quantise

pytestmark = needs_kernels

HIDDEN, INNER, HEADS, SHARED, WIDTH, EPS = 36, 44, 6, 2, 80, 1e-5
SHAPES = (
    (HEADS * WIDTH, HIDDEN), (SHARED * WIDTH, HIDDEN), (SHARED * WIDTH, HIDDEN), (HIDDEN, HEADS * WIDTH),
    (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER),
)  # fmt: skip
FORMS = ("float32", "bfloat16", "float16", "bitmask", "nm", "int8")


def matrix(form, shape, dtype):
    """A random matrix as the library takes it, and in float64."""
    if form in ("bitmask", "nm"):
        made = make(form, shape, dtype)
        return made.packed, made.weight.double()
    weight = torch.randn(shape)
    if form != "int8":
        weight = weight.to(getattr(torch, form))
        return weight, weight.double()
    weight = quantise(weight.to(dtype) * Unstructured(0.5).mask(torch.rand(shape)), 128)
    layout = Int8BitmaskLayout.fit(weight, Unstructured(0.5), 128)
    stored = layout.pack(weight)
    return cpu.pack("bitmask", shape, stored["mask"], stored["values"], stored["peaks"], layout.group), weight.double()


class Case:
    """A layer of random weights, one token, and the keys and values before it."""

    def __init__(self, forms, *, biased=True, head_norms=True, length=12, dtype=torch.float32):
        made = [matrix(form, shape, dtype) for form, shape in zip(forms, SHAPES, strict=True)]
        self.biases = [torch.randn(shape[0]).to(dtype) if biased else None for shape in SHAPES]
        self.gains = [(torch.rand(HIDDEN) + 0.5).to(dtype) for _ in range(2)]
        self.gains += [(torch.rand(WIDTH) + 0.5).to(dtype) for _ in range(2)] if head_norms else [None, None]
        self.dense = [weight for _, weight in made]
        self.weights = [
            Weights(tensor, form in ("bitmask", "nm", "int8"), bias, shape)
            for form, (tensor, _), bias, shape in zip(forms, made, self.biases, SHAPES, strict=True)
        ]
        self.norms = [gain if gain is None else Norm(gain, EPS) for gain in self.gains]
        self.layer = TokenLayer(cpu.library(), self.weights, self.norms, WIDTH)
        self.x, (self.cos, self.sin) = torch.randn(1, 1, HIDDEN).to(dtype), torch.randn(2, 1, 1, WIDTH).to(dtype)
        # Longer than what is read, and with other heads between: views, as caches of a fixed length return them.
        self.keys, self.values = torch.randn(2, 1, 2 * SHARED, length + 3, WIDTH).to(dtype)[:, :, ::2, :length]

    def ours(self):
        q, k, v = self.layer.begin(self.x, self.cos, self.sin)
        return q, k, v, self.layer.attend(self.x, q, self.keys, self.values, 0.1)

    def exact(self, dtype=torch.float64):
        """The same by torch, in another dtype."""

        def linear(x, place):
            bias = self.biases[place]
            return F.linear(x, self.dense[place].to(dtype), None if bias is None else bias.to(dtype))

        def norm(x, place):
            return x if self.gains[place] is None else F.rms_norm(x, x.shape[-1:], self.gains[place].to(dtype), EPS)

        def turn(x):
            first, second = x.chunk(2, -1)
            return x * self.cos.to(dtype) + torch.cat([-second, first], -1) * self.sin.to(dtype)

        x = self.x.to(dtype)
        q, k, v = (linear(norm(x, 0), place).view(1, -1, 1, WIDTH) for place in range(3))
        q, k = turn(norm(q, 2)), turn(norm(k, 3))
        keys, values = (one.to(dtype).repeat_interleave(HEADS // SHARED, 1) for one in (self.keys, self.values))
        attended = (0.1 * q @ keys.mT).softmax(-1) @ values
        x = x + linear(attended.view(1, 1, -1), 3)
        inner = norm(x, 1)
        return q, k, v, x + linear(F.silu(linear(inner, 4)) * linear(inner, 5), 6)


def assert_right(case, floor=2e-6):
    for ours, exact, eager in zip(case.ours(), case.exact(), case.exact(torch.float32), strict=True):
        error, allowed = ((one.double() - exact).abs().max() / exact.abs().max() for one in (ours, eager))
        assert ours.shape == exact.shape
        assert error <= 2 * allowed + floor, (error, allowed)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_of_each_form_is_right(form):
    # Activations become 16-bit numbers for int8 weights.
    assert_right(Case([form] * 7), floor=2e-4 if form == "int8" else 2e-6)


@pytest.mark.parametrize("length", [1, 3, 8, 301])
def test_every_length_is_right_without_biases_and_norms_of_heads(length):
    forms = ["bitmask", "float32", "bfloat16", "nm", "nm", "bitmask", "float16"]
    assert_right(Case(forms, biased=False, head_norms=False, length=length))


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_of_16_bits_are_rounded_where_they_leave_the_layer(dtype, length):
    form = str(dtype).removeprefix("torch.")
    case = Case(["bitmask", form, "int8", "nm", "bitmask", form, "nm"], dtype=dtype, length=length)
    exact = case.exact()
    for place, (ours, right) in enumerate(zip(case.ours(), exact, strict=True)):
        assert ours.dtype is dtype
        # Half a unit in the last place; the result begins with queries that were rounded to as much.
        eps = torch.finfo(dtype).eps
        allowed = (0.51 * eps) * right.abs() + 1e-3 * right.abs().max() + (place == 3) * 4 * eps * right.abs().max()
        assert ((ours.double() - right).abs() <= allowed).all()


def test_what_attention_made_elsewhere_is_taken():
    case = Case(["float32"] * 7)
    q, *_, y = case.ours()
    keys, values = (one.repeat_interleave(HEADS // SHARED, 1) for one in (case.keys, case.values))
    attended = (0.1 * q @ keys.mT).softmax(-1) @ values
    found = case.layer.end(case.x, attended.transpose(1, 2).contiguous())
    assert (found - y).abs().max() <= 1e-5 * y.abs().max()


def test_large_numbers_and_those_that_are_none_stay_what_they_are():
    case = Case(["float32"] * 7, biased=False)
    case.keys *= 1e4  # one key takes everything
    for gate in (case.dense[4], case.weights[4].matrix):
        gate *= 1e3  # SiLU of thousands, of both signs
    assert_right(case)
    case.values[0, 1, 0, 5] = torch.nan
    assert case.ours()[3].isnan().all()


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr("llmprune.kernels.cpu.layers.THREAD_BYTES", 64)
    case, before = Case(["bitmask", "float32", "int8", "nm", "bitmask", "nm", "bfloat16"]), torch.get_num_threads()
    try:
        results = []
        for threads in range(1, 5):
            torch.set_num_threads(threads)
            results.append(case.ours())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_what_does_not_fit_is_refused_before_it_is_read():
    case = Case(["bitmask", *["float32"] * 6])
    layer, x = case.layer, case.x
    q, k, v = layer.begin(x, case.cos, case.sin)
    for wrong in (x.double(), x[..., :-1], torch.randn(1, HIDDEN, 2)[..., 0][None]):
        with pytest.raises(ValueError, match="expected"):
            layer.begin(wrong, case.cos, case.sin)
    with pytest.raises(ValueError, match="expected"):
        layer.begin(x, case.cos[..., :-2], case.sin)
    for keys, values in ((k[:, :1], v[:, :1]), (k.double(), v), (k, v[:, :, :0]), (k.mT, v.mT), (k[..., ::2], v)):
        assert not layer.fits(keys, values)
        with pytest.raises(ValueError, match="expected"):
            layer.attend(x, q, keys, values, 1.0)
    with pytest.raises(ValueError, match="expected"):
        layer.end(x, q[:, :1])


def take_token(case, weights):
    layer = TokenLayer(cpu.library(), weights, case.norms, WIDTH)
    layer.attend(case.x, layer.begin(case.x, case.cos, case.sin)[0], case.keys, case.values, 1.0)


@pytest.mark.parametrize("place", range(7))
def test_matrices_that_do_not_go_together_are_refused(place):
    case = Case(["float32"] * 7)
    rows, columns = SHAPES[place]
    for smaller in (torch.randn(rows, columns - 1), make("bitmask", (rows - 1, columns), torch.float32).packed):
        weights, is_packed = list(case.weights), smaller.dim() == 1
        # A packed one says that it is as large as it should be; a dense one, what it is.
        shape = SHAPES[place] if is_packed else tuple(smaller.shape)
        weights[place] = Weights(smaller, is_packed, case.biases[place], shape)
        with pytest.raises(ValueError, match="does not go together" if is_packed or place else "expected"):
            take_token(case, weights)
        weights[place] = Weights(smaller, False, case.biases[place], SHAPES[place])
        with pytest.raises(ValueError, match="expected"):
            take_token(case, weights)
    for wrong in (torch.randn(rows + 1), torch.randn(2 * rows)[::2], torch.randn(rows).double()):
        weights[place] = case.weights[place]._replace(bias=wrong)
        with pytest.raises(ValueError, match="expected"):
            TokenLayer(cpu.library(), weights, case.norms, WIDTH)
    for wrong in (None, Norm(torch.ones(HIDDEN).double(), EPS)):
        with pytest.raises(ValueError, match="expected"):
            TokenLayer(cpu.library(), case.weights, [wrong, *case.norms[1:]], WIDTH)
    with pytest.raises(ValueError, match="expected"):
        TokenLayer(
            cpu.library(), case.weights, [case.norms[0], Norm(torch.ones(HIDDEN).half(), EPS), None, None], WIDTH
        )


def test_it_notices_weights_that_have_moved():
    case = Case(["float32"] * 7)
    assert case.layer.is_current()
    case.weights[3].matrix.mul_(2)
    assert case.layer.is_current()
    case.weights[3].matrix.data = case.weights[3].matrix.data.clone()
    assert not case.layer.is_current()
