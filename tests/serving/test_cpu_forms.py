"""Packed matrices on a CPU: which kernel serves them, what their layers hold and compute, and what is measured."""

import copy

import pytest
import torch
from cpu_matrices import error, make, needs_kernels
from packed_models import save_packed
from tiny_models import random_ids
from torch import nn

from llmprune.errors import FormatError
from llmprune.kernels import configurations, cpu
from llmprune.measuring.explain import why_not_faster
from llmprune.patterns import Unstructured
from llmprune.pruning.packing import unpack
from llmprune.serving import cpu_forms, dense_product
from llmprune.serving.cpu_forms import measure_products
from llmprune.serving.forms import choose_form
from llmprune.serving.loader import load
from llmprune.serving.quantizer import sparse_layers
from llmprune.serving.sparse_linear import SparseLinear
from llmprune.storage.formats import BitmaskLayout, BlockLayout, Int8BitmaskLayout, Int8NMLayout, NMLayout, quantise

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = BitmaskLayout((128, 256), 64 * 256)
TWO_OF_FOUR = NMLayout((128, 256), 2, 4)
NO_COMPILER = "no C++ compiler: install g++"


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(dense_product, "_chosen", {})
    configurations.forget()
    yield
    configurations.forget()


def available(monkeypatch, reason=None):
    monkeypatch.setattr(cpu_forms.cpu, "unavailable", lambda: reason)


def layer_of(matrix, bias=None):
    """A settled layer, and the tensors that it was loaded from."""
    layer = SparseLinear(matrix.layout, bias=bias is not None, dtype=matrix.values.dtype, device="cpu")
    stored = matrix.layout.pack(matrix.weight) | ({} if bias is None else {"bias": bias})
    layer.load_state_dict(stored)
    layer.settle()
    return layer, stored


@pytest.mark.parametrize(
    ("layout", "served", "dtype", "form"),
    [
        (HALF, "auto", torch.bfloat16, "cpu-bitmask"),
        (HALF, "packed", torch.float16, "cpu-bitmask"),
        (HALF, "dense", torch.bfloat16, "dense"),
        (HALF, "auto", torch.float64, "dense"),
        (HALF, "packed", torch.float64, "unpacked"),
        (BitmaskLayout((128, 256), 120 * 256), "auto", torch.bfloat16, "dense"),
        (BitmaskLayout((128, 256), 120 * 256), "packed", torch.bfloat16, "cpu-bitmask"),
        (TWO_OF_FOUR, "auto", torch.float32, "cpu-nm"),
        (TWO_OF_FOUR, "dense", torch.bfloat16, "dense"),
        (NMLayout((128, 252), 2, 4), "auto", torch.bfloat16, "cpu-nm"),
        (NMLayout((128, 256), 1, 4), "auto", torch.bfloat16, "dense"),
        (BlockLayout((128, 256), 16, 64, balanced=True), "auto", torch.bfloat16, "dense"),
        (Int8BitmaskLayout((128, 256), 64 * 256, 128), "auto", torch.bfloat16, "cpu-int8"),
        (Int8BitmaskLayout((128, 256), 64 * 256, 256), "auto", torch.float32, "cpu-int8"),
        (Int8BitmaskLayout((128, 256), 64 * 256, 128), "dense", torch.bfloat16, "dense"),
        (Int8BitmaskLayout((128, 256), 64 * 256, 96), "auto", torch.bfloat16, "dense"),
        (Int8NMLayout((128, 200), 2, 4, 200), "auto", torch.bfloat16, "cpu-int8"),
        (Int8NMLayout((128, 256), 4, 8, 128), "auto", torch.bfloat16, "dense"),
    ],
)
def test_a_cpu_gets_the_fastest_form(monkeypatch, layout, served, dtype, form):
    available(monkeypatch)
    choice = choose_form(layout, CPU, dtype, served)
    assert choice.form.name == form
    assert why_not_faster(choice, layout) == "" if form.startswith("cpu") else why_not_faster(choice, layout)


@pytest.mark.parametrize("layout", [HALF, TWO_OF_FOUR])
def test_without_a_compiler_weights_are_dense_and_it_says_why(monkeypatch, layout):
    available(monkeypatch, NO_COMPILER)
    assert choose_form(layout, CPU, torch.bfloat16).form.name == "dense"
    assert choose_form(layout, CPU, torch.bfloat16, "packed").form.name == "unpacked"
    assert why_not_faster(choose_form(layout, CPU, torch.bfloat16), layout) == NO_COMPILER


def test_nothing_is_compiled_for_what_no_kernel_would_serve(monkeypatch):
    monkeypatch.setattr(cpu_forms.cpu, "unavailable", lambda: pytest.fail("looked for kernels"))
    for layout, device, served in ((HALF, CUDA, "auto"), (HALF, CPU, "dense"), (NMLayout((8, 8), 1, 4), CPU, "auto")):
        choose_form(layout, device, torch.bfloat16, served)


@needs_kernels
@pytest.mark.parametrize("dtype", tuple(cpu.TYPES))
@pytest.mark.parametrize("kind", tuple(cpu.KINDS))
def test_a_layer_multiplies_and_is_saved_as_it_was(kind, dtype):
    matrix, bias = make(kind, (48, 200), dtype), torch.randn(48).to(dtype)
    layer, stored = layer_of(matrix, bias)
    assert layer.form.name == f"cpu-{kind}"
    assert list(layer.held) == ["packed"]
    layer.test("a layer")
    x = torch.randn(2, 3, 200).to(dtype)
    for some in (layer, copy.deepcopy(layer)):
        assert error(some(x).flatten(0, 1), x.flatten(0, 1), matrix.weight, bias) <= 3
    assert torch.equal(layer.unpack(), matrix.weight)
    saved = layer.state_dict()
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key], stored[key]) for key in stored)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@needs_kernels
@pytest.mark.parametrize("dtype", tuple(cpu.TYPES))
@pytest.mark.parametrize("kind", tuple(cpu.KINDS))
def test_a_layer_of_8_bits_multiplies_and_is_saved_as_it_was(kind, dtype):
    weight, bias = quantise(make(kind, (48, 200), dtype).weight), torch.randn(48).to(dtype)
    layout = Int8NMLayout((48, 200), 2, 4, 128) if kind == "nm" else Int8BitmaskLayout.fit(weight, Unstructured(0.5))
    layer = SparseLinear(layout, bias=True, dtype=dtype, device="cpu")
    stored = layout.pack(weight) | {"bias": bias}
    layer.load_state_dict(stored)
    layer.settle()
    assert (layer.form.name, layer.dtype) == ("cpu-int8", dtype)
    x = torch.randn(2, 3, 200).to(dtype)
    off = error(layer(x).flatten(0, 1), x.flatten(0, 1), weight, bias)
    assert off <= max(3, 1e-4 / torch.finfo(dtype).eps)  # activations have 16 bits
    assert torch.equal(layer.unpack(), weight)
    saved = layer.state_dict()
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key], stored[key]) for key in stored)
    damaged = SparseLinear(layout, bias=True, dtype=dtype, device="cpu")
    damaged.load_state_dict({**stored, "values": torch.full_like(stored["values"], -128)})
    with pytest.raises(FormatError, match="-128"):
        damaged.settle()


@needs_kernels
@pytest.mark.parametrize(("layout", "pattern"), [("int8-bitmask", "0.5"), ("int8-nm", "2:4")])
def test_a_model_of_8_bits_computes_what_its_dense_one_does(tmp_path, layout, pattern):
    save_packed(tmp_path, layout, pattern, dtype=torch.float32, hidden_size=64, intermediate_size=96)
    model, dense = (load(tmp_path / name, device="cpu") for name in ("packed", "dense"))
    assert {layer.form.name for _, layer in sparse_layers(model)} == {"cpu-int8"}
    assert any(layer.fusion for _, layer in sparse_layers(model))
    ids = random_ids(2, 12)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=2e-3, atol=2e-3)
    model.save_pretrained(tmp_path / "saved")
    unpack(tmp_path / "saved", tmp_path / "unpacked")
    again = load(tmp_path / "unpacked", device="cpu")
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), dense.parameters(), strict=True))


@needs_kernels
def test_a_layer_is_cast_and_moved():
    matrix = make("bitmask", (48, 200), torch.bfloat16)
    layer, _ = layer_of(matrix)
    x = torch.randn(3, 200)
    layer.float()
    assert layer.form.name == "cpu-bitmask"
    assert error(layer(x), x, matrix.weight) <= 3
    layer.to(torch.float64)
    assert layer.form.name == "dense"
    layer.to(torch.bfloat16)
    assert torch.equal(layer.unpack(), matrix.weight)


@needs_kernels
@pytest.mark.parametrize("kind", tuple(cpu.KINDS))
def test_damaged_tensors_are_refused_by_name_of_what_is_wrong(kind):
    matrix = make(kind, (48, 200), torch.bfloat16)
    layer = SparseLinear(matrix.layout, bias=False, dtype=torch.bfloat16, device="cpu")
    stored = matrix.layout.pack(matrix.weight)
    stored["meta" if kind == "nm" else "mask"].fill_(255)
    layer.load_state_dict(stored)
    with pytest.raises(FormatError):
        layer.settle()


@needs_kernels
def test_a_model_of_both_layouts_and_dense_matrices(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    save_packed(tmp_path / "nm", dtype=torch.float32, **sizes)
    save_packed(tmp_path / "bitmask", "bitmask", "0.5", dtype=torch.float32, **sizes)
    mixed = load(tmp_path / "nm" / "packed", device="cpu")
    other = load(tmp_path / "bitmask" / "packed", device="cpu")
    mixed.model.layers[1] = other.model.layers[1]
    reference = load(tmp_path / "nm" / "dense", device="cpu")
    reference.model.layers[1] = load(tmp_path / "bitmask" / "dense", device="cpu").model.layers[1]
    forms = [layer.form.name for _, layer in sparse_layers(mixed)]
    assert forms == ["cpu-nm"] * 7 + ["cpu-bitmask"] * 7
    ids = random_ids(2, 12)
    with torch.inference_mode():
        torch.testing.assert_close(mixed(ids).logits, reference(ids).logits)
        text = [model.generate(ids[:1], max_new_tokens=6, do_sample=False) for model in (mixed, reference)]
    assert torch.equal(*text)


@needs_kernels
@pytest.mark.usefixtures("empty_cache")
def test_products_are_measured_once_when_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_forms, "MEASURED_WEIGHTS", 0)
    monkeypatch.setattr(dense_product, "_fastest", lambda weights: "own")
    save_packed(tmp_path, "bitmask", "0.5", hidden_size=64, intermediate_size=96)
    model = load(tmp_path / "packed", device="cpu", dtype="bfloat16")
    assert type(model.lm_head) is dense_product.DenseLinear
    weight = model.lm_head.weight
    assert (weight.shape, weight.dtype, torch.get_num_threads()) in dense_product._chosen
    for _, layer in sparse_layers(model):
        parts = (
            (layer.fusion.packed, layer.fusion.sizes)
            if layer.fusion
            else ([layer.held["packed"]], [layer.out_features])
        )
        assert cpu.measured_limit(*parts) is not None
    monkeypatch.setattr(cpu_forms.cpu, "measure_dense_from", lambda *_: pytest.fail("measured twice"))
    monkeypatch.setattr(dense_product, "_fastest", lambda weights: pytest.fail("measured twice"))
    load(tmp_path / "packed", device="cpu", dtype="bfloat16")


@needs_kernels
@pytest.mark.usefixtures("empty_cache")
def test_a_layer_alone_is_measured_on_copies_of_its_own(monkeypatch):
    monkeypatch.setattr(cpu_forms, "MEASURED_WEIGHTS", 0)
    layer = layer_of(make("nm", (16, 32), torch.bfloat16))[0]
    measured = []
    monkeypatch.setattr(cpu_forms.cpu, "measure_dense_from", lambda copies, sizes: measured.append((copies, sizes)))
    cpu_forms.measure_alone(layer)
    ((copies, sizes),) = measured
    assert sizes == [16]
    assert len({matrix.data_ptr() for (matrix,) in copies}) == len(copies) == 16
    assert all(matrix.view(torch.uint8).equal(copies[0][0].view(torch.uint8)) for (matrix,) in copies)


@needs_kernels
def test_a_cache_that_cannot_be_written_is_no_obstacle(monkeypatch):
    monkeypatch.setenv("LLMPRUNE_CACHE", "/proc/no-folder")
    monkeypatch.setattr(cpu_forms, "MEASURED_WEIGHTS", 0)
    configurations.forget()
    model = nn.Sequential(layer_of(make("nm", (16, 32), torch.bfloat16))[0], nn.Linear(16, 4).bfloat16())
    measure_products(model)
    assert type(model[1]) is dense_product.DenseLinear
    assert cpu.measured_limit([model[0].held["packed"]], [16]) is not None
    monkeypatch.setattr(cpu_forms.cpu, "measure_dense_from", lambda *_: pytest.fail("measured twice"))
    measure_products(model)
    configurations.forget()


@pytest.mark.usefixtures("empty_cache")
def test_small_matrices_are_not_measured(monkeypatch):
    monkeypatch.setattr(dense_product, "choose", lambda weights: pytest.fail("measured"))
    measure_products(nn.Sequential(nn.Linear(16, 4).bfloat16()))
