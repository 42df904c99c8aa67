"""Packed checkpoints load, run and save as any other, through transformers' own classes."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from folders import same, tensors
from fresh_processes import TORCH, TRANSFORMERS, FreshProcesses
from packed_models import save_packed
from safetensors.torch import load_file, save_file
from tiny_models import random_ids, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, pipeline

import llmprune  # noqa: F401 - registers with transformers
from llmprune.errors import CheckpointError, FormatError, ModelError, NumericsError
from llmprune.serving import cpu_forms, forms
from llmprune.serving.quantizer import replace_linear, settle, sparse_layers
from llmprune.serving.sparse_linear import SparseLinear
from llmprune.storage.formats import NMLayout
from llmprune.storage.packed_config import NOTICE, NOTICE_KEY

IDS = random_ids(2, 12)

CASES = [("nm", "2:4"), ("nm", "1:4"), ("block", "0.5@16x16"), ("bitmask", "0.7"), ("dense", "0.5")]

# Sizes that blocks of 16 divide.
SIZES = {"hidden_size": 64, "intermediate_size": 96}


def load(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def served(folder: Path, how: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["served"] = how
    return load(folder, config=config)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize(("layout", "pattern"), CASES)
@pytest.mark.parametrize("how", ["auto", "packed", "dense"])
def test_gives_the_outputs_of_the_dense_checkpoint(tmp_path: Path, layout: str, pattern: str, how: str) -> None:
    folder = save_packed(tmp_path, layout, pattern, torch.float32, **SIZES)
    dense, packed = load(folder / "dense"), served(folder / "packed", how)
    assert len(list(sparse_layers(packed))) == 14
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-5, atol=1e-5)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    folder = save_packed(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "packed" / "model.safetensors")
    packed = load(folder / "packed")
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    assert same(logits(packed), logits(load(folder / "dense")))


def test_is_bit_identical_where_it_multiplies_densely(tmp_path: Path) -> None:
    folder = save_packed(tmp_path)
    assert same(logits(load(folder / "packed")), logits(load(folder / "dense")))


def test_packed_serving_holds_only_packed_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_forms.cpu, "unavailable", lambda: "no compiler")
    model = served(save_packed(tmp_path) / "packed", "packed")
    _, layer = next(iter(sparse_layers(model)))
    assert set(layer.held) == {"values", "meta"}
    held = sum(tensor.nbytes for tensor in layer.held.values())
    assert held == 0.5625 * layer.in_features * layer.out_features * 2


def test_loading_never_makes_a_dense_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_packed(tmp_path)
    monkeypatch.setattr(NMLayout, "unpack", lambda *_: pytest.fail("unpacked"))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            nonlocal largest
            if isinstance(result, torch.Tensor) and result.device.type != "meta" and result.shape[-1:] == (48,):
                largest = max(largest, result.nbytes)
            return result

    with Watch():
        served(folder / "packed", "packed")
    assert largest < 32 * 48 * 2, "down_proj, [32, 48], would be dense with so many bytes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_takes_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_packed(tmp_path)
    dense, packed = load(folder / "dense", dtype=dtype), load(folder / "packed", dtype=dtype)
    assert {layer.dtype for _, layer in sparse_layers(packed)} == {dtype}
    # A CPU's kernels add in another order.
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
def test_takes_the_usual_options(tmp_path: Path, options: dict[str, object]) -> None:
    folder = save_packed(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers on deprecated options
        model = load(folder / "packed", **options)
    assert same(logits(model), logits(load(folder / "dense")))


@pytest.mark.parametrize("how", ["auto", "packed"])
@pytest.mark.parametrize(("layout", "pattern"), CASES)
def test_saves_what_it_loaded(tmp_path: Path, layout: str, pattern: str, how: str) -> None:
    folder = save_packed(tmp_path, layout, pattern, **SIZES)
    model = served(folder / "packed", how)
    model.save_pretrained(tmp_path / "again")
    before, after = tensors(folder / "packed"), tensors(tmp_path / "again")
    assert set(after) == set(before)
    assert all(same(after[key], before[key]) for key in before)
    assert json.loads((tmp_path / "again" / "config.json").read_text())[NOTICE_KEY] == NOTICE
    assert "served" not in (tmp_path / "again" / "config.json").read_text()
    assert same(logits(load(tmp_path / "again")), logits(load(folder / "packed")))


def test_saves_in_shards(tmp_path: Path) -> None:
    folder = save_packed(tmp_path)
    load(folder / "packed").save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert same(logits(load(tmp_path / "shards")), logits(load(folder / "dense")))


def test_pushing_while_saving_is_refused(tmp_path: Path) -> None:
    model = load(save_packed(tmp_path) / "packed")
    with pytest.raises(ModelError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "again", push_to_hub=True)


def test_dequantize_gives_ordinary_layers(tmp_path: Path) -> None:
    folder = save_packed(tmp_path)
    model = load(folder / "packed").dequantize()
    assert not list(sparse_layers(model))
    model.save_pretrained(tmp_path / "dense-again")
    before, after = tensors(folder / "dense"), tensors(tmp_path / "dense-again")
    assert all(same(after[key], before[key] + 0.0) for key in before)
    assert "llmprune" not in (tmp_path / "dense-again" / "config.json").read_text()


def test_generates_and_serves_pipelines(tmp_path: Path) -> None:
    folder = save_packed(tmp_path)
    options = {"max_new_tokens": 5, "do_sample": False}
    dense, packed = (load(folder / name) for name in ("dense", "packed"))
    assert torch.equal(packed.generate(IDS, **options), dense.generate(IDS, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers on generation options
        texts = [
            pipeline("text-generation", model=str(folder / name), tokenizer=tokenizer())("w5 w6", **options)
            for name in ("dense", "packed")
        ]
    assert texts[0] == texts[1]


def test_a_copy_and_a_pickle_keep_working(tmp_path: Path) -> None:
    model = load(save_packed(tmp_path) / "packed")
    assert same(logits(copy.deepcopy(model)), logits(model))


def test_loads_a_state_dict_once_it_has_settled(tmp_path: Path) -> None:
    first, second = (save_packed(tmp_path / name, num_hidden_layers=1 + (name == "b")) for name in "ab")
    model = load(first / "packed")
    other = {key: tensor for key, tensor in load(second / "packed").state_dict().items() if ".layers.1." not in key}
    model.load_state_dict(other)
    assert all(same(tensor, other[key]) for key, tensor in model.state_dict().items())


def test_a_layer_moves_to_another_dtype(tmp_path: Path) -> None:
    _, layer = next(iter(sparse_layers(served(save_packed(tmp_path) / "packed", "packed"))))
    dense = layer.unpack().double()
    x = torch.randn(3, layer.in_features)
    bias = 0.0 if layer.bias is None else layer.bias.double()
    torch.testing.assert_close(layer.double()(x.double()), x.double() @ dense.T + bias)


def test_autocast_gives_its_dtype(tmp_path: Path) -> None:
    model = served(save_packed(tmp_path, dtype=torch.float32) / "packed", "packed")
    _, layer = next(iter(sparse_layers(model)))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, layer.in_features)).dtype == torch.bfloat16


def test_weight_is_there_for_those_who_ask(tmp_path: Path) -> None:
    folder = save_packed(tmp_path)
    model = served(folder / "packed", "packed")
    name, layer = next(iter(sparse_layers(model)))
    assert same(layer.weight, tensors(folder / "dense")[f"{name}.weight"] + 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "imported"),
    [("import llmprune; import transformers", TORCH), ("import transformers; import llmprune", TRANSFORMERS)],
)
def test_importing_llmprune_is_enough(
    tmp_path: Path, run_fresh: FreshProcesses, first: str, imported: tuple[str, ...]
) -> None:
    folder = save_packed(tmp_path) / "packed"
    program = f"{first}; transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    assert run_fresh(program, imported).status == 0


@pytest.mark.slow
def test_without_llmprune_the_error_says_what_to_install(tmp_path: Path, run_fresh: FreshProcesses) -> None:
    folder = save_packed(tmp_path) / "packed"
    program = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    done = run_fresh(program, TRANSFORMERS)
    assert done.status != 0
    assert "install llmprune, and `import llmprune`" in "".join(done.printed.splitlines()[-2:])


def test_damaged_tensors_are_refused(tmp_path: Path) -> None:
    folder = save_packed(tmp_path, "bitmask", "0.5") / "packed"
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.mask"].zero_()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="mask"):
        load(folder)


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    folder = save_packed(tmp_path) / "packed"
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="version 99"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [
        ("model.layers.7.mlp.up_proj", [48, 32], "none"),
        ("model.norm", [32, 32], "Norm"),
        ("lm_head", [8, 8], "128 x 32"),
    ],
)
def test_a_record_of_another_model_is_refused(tmp_path: Path, name: str, shape: list[int], found: str) -> None:
    model = load(save_packed(tmp_path) / "dense")
    with pytest.raises(ModelError, match=found):
        replace_linear(model, name, {"layout": "nm", "shape": shape, "keep": 2, "of": 4})


def test_a_wrong_kernel_is_found_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_packed(tmp_path)

    class Wrong(forms.Unpacked):
        name, tested = "wrong", True

        def multiply(self, *arguments: object) -> torch.Tensor:
            return super().multiply(*arguments) * 1.05  # type: ignore[arg-type]

    monkeypatch.setattr(forms, "FORMS", (Wrong(),))
    with pytest.raises(NumericsError, match=r"q_proj: the wrong matmul of 5 tokens"):
        load(folder / "packed")
    monkeypatch.setenv("LLMPRUNE_SELFTEST", "0")
    load(folder / "packed")


def test_a_right_kernel_passes_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Right(forms.Unpacked):
        name, tested = "right", True

    monkeypatch.setattr(forms, "FORMS", (Right(),))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        folder = save_packed(tmp_path / str(dtype), dtype=dtype)
        assert all(layer.form.name == "right" for _, layer in sparse_layers(load(folder / "packed")))


def test_an_unsettled_layer_multiplies_as_well(tmp_path: Path) -> None:
    folder = save_packed(tmp_path)
    model = served(folder / "packed", "packed")
    _, layer = next(iter(sparse_layers(model)))
    loose = SparseLinear(layer.layout, bias=layer.bias is not None, dtype=layer.dtype, device="cpu")
    loose.load_state_dict(layer.state_dict())
    x = torch.randn(3, layer.in_features).bfloat16()
    assert same(loose(x), layer(x))
    assert loose.choice is None
    settle(torch.nn.ModuleList([loose]), "dense")
    assert loose.form is not None
    assert loose.form.name == "dense"
    assert same(loose(x), layer(x))
