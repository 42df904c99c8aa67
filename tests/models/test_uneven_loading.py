"""Checkpoints whose decoder layers differ in size load, run and save as any other, once llmprune is imported."""

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import same, tensors
from fresh_processes import TRANSFORMERS, FreshProcesses
from packed_models import prune_by_magnitude
from tiny_models import VOCABULARY, build, random_ids, recipe, save, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, pipeline
from uneven_models import IDS, describe, save_uneven

import llmprune
from llmprune.errors import ModelError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.decoder import Decoder
from llmprune.models.uneven import REMOVED, read_per_layer, with_per_layer
from llmprune.patterns import parse
from llmprune.pruning.packing import pack, unpack
from llmprune.serving.quantizer import sparse_layers
from llmprune.storage.files import read_json
from llmprune.storage.packed_config import (
    NOTICE,
    NOTICE_KEY,
    is_uneven,
    packing_record,
    with_packing_record,
    without_packing_record,
)
from llmprune.structures.find.discovery import find_structures

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found - wanted).abs().max()) < 2e-6 * float(wanted.abs().max())


def ffn_widths(model: PreTrainedModel) -> list[int]:
    return [layer.mlp.up_proj.weight.shape[0] for layer in model.model.layers]


# GPT-J has buffers in its layers, Phi-3 fused matrices, Mixtral experts of its own config, Gemma 3 a config inside one.
@pytest.mark.parametrize(
    "family", ["llama", "phi3", "mixtral", "gptj", "gpt2", "gemma3-vision", "llama-tied", "cohere"]
)
def test_computes_what_the_masked_model_does(family: str, tmp_path: Path) -> None:
    wanted = save_uneven(tmp_path, family, heads=family not in ("gptj", "gpt2"))
    assert close(logits(load(tmp_path)), wanted)


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}])
def test_takes_the_usual_options(tmp_path: Path, options: dict[str, Any]) -> None:
    wanted = save_uneven(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers on deprecated options
        assert close(logits(load(tmp_path, **options)), wanted)


def test_takes_another_dtype(tmp_path: Path) -> None:
    wanted = save_uneven(tmp_path, dtype=torch.bfloat16)
    model = load(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    wide = load(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert float((logits(wide) - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_is_an_ordinary_model_then(tmp_path: Path) -> None:
    save_uneven(tmp_path)
    model = load(tmp_path)
    assert ffn_widths(model) == [44, 28]
    assert not model.is_quantized
    assert not hasattr(model.config, "quantization_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad.shape == (28, 32)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same(tmp_path: Path, change: Any) -> None:
    save_uneven(tmp_path)
    model = load(tmp_path)
    assert same(logits(change(model)), logits(model))


def test_saves_what_it_loaded(tmp_path: Path) -> None:
    wanted = save_uneven(tmp_path / "a")
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    load(tmp_path / "b").save_pretrained(tmp_path / "c", max_shard_size="20KB")
    assert close(logits(load(tmp_path / "c")), wanted)
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "c")
    assert set(before) == set(after)
    assert all(same(tensor, after[key]) for key, tensor in before.items())
    first, last = (read_json(tmp_path / name / "config.json") for name in "ac")
    assert {key for key in first | last if first.get(key) != last.get(key)} == set()


@pytest.mark.parametrize("first", ["eager", "sdpa"])
def test_all_layers_follow_the_choice_of_attention(tmp_path: Path, first: str) -> None:
    """Masks are made for what the model's config says: a layer that attends otherwise would see the future."""
    wanted = save_uneven(tmp_path)
    model = load(tmp_path, attn_implementation=first)
    for choice in (first, "eager", "sdpa"):
        model.set_attn_implementation(choice)
        assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {choice}
        assert close(logits(model), wanted)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generates_what_the_logits_say(tmp_path: Path, options: dict[str, Any]) -> None:
    """The layers' caches have different numbers of heads."""
    save_uneven(tmp_path)
    model = load(tmp_path)
    wanted = IDS
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.inference_mode():
            following = model(wanted, use_cache=False).logits[:, -1].argmax(-1)
        wanted = torch.cat([wanted, following[:, None]], 1)
    model.generation_config.eos_token_id = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers on generation options
        found = model.generate(IDS, disable_compile=True, **GREEDY, **options)
    assert torch.equal(found, wanted)


def test_serves_pipelines(tmp_path: Path) -> None:
    save_uneven(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers on generation options
        texts = [
            pipeline("text-generation", model=model, tokenizer=tokenizer(), **GREEDY)("w5 w6")
            for model in (str(tmp_path), load(tmp_path))
        ]
    assert texts[0] == texts[1]


def test_a_layer_without_attention(tmp_path: Path) -> None:
    """Its weights are not in the checkpoint, and are not missed."""
    model = build("qwen3")
    for child in (model.model.layers[0].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        torch.nn.init.zeros_(child.weight)
    removed = {"0": {REMOVED: {"self_attn": 2}}, "1": {REMOVED: {"mlp": 1}}}
    save(model, tmp_path)
    describe(tmp_path, with_per_layer(model.config, removed))
    loaded = load(tmp_path)
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    assert close(logits(loaded), logits(model))


@pytest.mark.parametrize(("pattern", "layout"), [("2:4", "nm"), ("0.7", "bitmask")])
def test_packed_layers_of_different_sizes(tmp_path: Path, pattern: str, layout: str) -> None:
    save_uneven(tmp_path / "dense", dtype=torch.bfloat16)
    prune_by_magnitude(tmp_path / "dense", parse(pattern))
    assert pack(tmp_path / "dense", tmp_path / "packed").packed_bytes
    dense, packed = load(tmp_path / "dense"), load(tmp_path / "packed")
    shapes = {name: layer.layout.shape for name, layer in sparse_layers(packed)}
    assert {layer.layout.name for _, layer in sparse_layers(packed)} == {layout}
    assert shapes["model.layers.1.mlp.up_proj"] == (28, 32)
    assert shapes["model.layers.1.self_attn.o_proj"] == (32, 16)
    assert same(logits(packed), logits(dense))
    packed.save_pretrained(tmp_path / "again")
    assert same(logits(load(tmp_path / "again")), logits(dense))
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert read_json(tmp_path / "unpacked" / "config.json") == read_json(tmp_path / "dense" / "config.json")
    assert same(logits(load(tmp_path / "unpacked")), logits(dense))
    packed.dequantize().save_pretrained(tmp_path / "dequantised")
    assert same(logits(load(tmp_path / "dequantised")), logits(dense))


@pytest.mark.slow
def test_without_llmprune_the_error_says_what_to_install(tmp_path: Path, run_fresh: FreshProcesses) -> None:
    save_uneven(tmp_path / "a")
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in "ab":
        assert "`import llmprune` before from_pretrained" in stock_error(tmp_path / name, run_fresh)


def stock_error(folder: Path, run_fresh: FreshProcesses) -> str:
    """What transformers says without llmprune."""
    program = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    done = run_fresh(program, TRANSFORMERS)
    assert done.status != 0
    return "".join(done.printed.splitlines()[-2:])


@pytest.mark.slow
def test_the_text_model_of_a_larger_one(tmp_path: Path, run_fresh: FreshProcesses) -> None:
    """AutoModelForCausalLM takes the inner config of Llama 4, which must hold the notice as well."""
    wanted = save_uneven(tmp_path, "llama4", moe_layers=[])
    described = read_json(tmp_path / "config.json")
    inner = {key: value for key, value in described.items() if key not in (*packing_record({}), "architectures")}
    outer = {"model_type": "llama4", "architectures": described["architectures"], "text_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(with_packing_record(outer, {})))
    assert close(logits(load(tmp_path)), wanted)
    assert "`import llmprune` before from_pretrained" in stock_error(tmp_path, run_fresh)
    config = CheckpointSource(tmp_path).config
    assert NOTICE not in (getattr(part, NOTICE_KEY, None) for part in (config, config.get_text_config(decoder=True)))


@pytest.mark.slow
@pytest.mark.parametrize("module", ["llmprune.models.skeleton", "llmprune.models.uneven", "llmprune.models.source"])
def test_any_module_may_be_what_imports_transformers(module: str, run_fresh: FreshProcesses) -> None:
    assert run_fresh(f"import {module}") == (0, "")


def test_is_read_layer_by_layer(tmp_path: Path) -> None:
    wanted = save_uneven(tmp_path)
    source = CheckpointSource(tmp_path)
    assert not hasattr(source.config, "quantization_config")
    assert not hasattr(source.config, NOTICE_KEY)
    assert read_per_layer(source.config).keys() == {0, 1}
    for index in range(2):
        source.load_layer(index, torch.device("cpu"))
    source.load_ends(torch.device("cpu"))
    assert close(logits(source.model), wanted)
    written = source.checkpoint_tensors(1)
    assert all(same(tensor, tensors(tmp_path)[key]) for key, tensor in written.items())


def test_its_structures_are_found(tmp_path: Path) -> None:
    """Heads are told by the softmax of plain attention, in layers of their own size too."""
    save_uneven(tmp_path)
    for model in (CheckpointSource(tmp_path).model, load(tmp_path)):
        found = [[(s.kind, s.groups) for s in structures] for structures in find_structures(Decoder.find(model))]
        # Where one key and value is left, its query heads go one by one.
        assert found == [[("heads", 2), ("ffn", 44)], [("heads", 2), ("ffn", 28)]]


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_is_pruned_again(tmp_path: Path, where: str) -> None:
    save_uneven(tmp_path / "model")
    texts = tmp_path / "texts.jsonl"
    ids = random_ids(8, 40)
    texts.write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n" for row in ids.tolist()))
    model = str(tmp_path / "model") if where == "folder" else load(tmp_path / "model")
    calibration = {"source": str(texts), "samples": 4, "length": 24}
    plan = recipe(pattern="2:4", format="auto", calibration=calibration)
    report = llmprune.prune(model, plan, tmp_path / "out", tokenizer=None if where == "folder" else tokenizer())
    assert len(report.rows) == 14
    after = load(tmp_path / "out")
    shapes = {name: layer.layout.shape for name, layer in sparse_layers(after)}
    assert shapes["model.layers.0.mlp.down_proj"] == (32, 44)
    assert shapes["model.layers.1.mlp.down_proj"] == (32, 28)
    assert logits(after).shape == (2, 12, VOCABULARY)


def test_is_measured_inspected_and_served(tmp_path: Path) -> None:
    save_uneven(tmp_path)
    assert llmprune.inspect_checkpoint(tmp_path).parameters == sum(t.numel() for t in tensors(tmp_path).values())
    model = llmprune.load(tmp_path, device="cpu")
    assert ffn_widths(model) == [44, 28]
    with pytest.raises(ModelError, match="not packed"):
        llmprune.load(tmp_path, device="cpu", served="packed")


def test_the_record() -> None:
    """Only what stock transformers would load wrongly has one."""
    plain: dict[str, Any] = {"hidden_size": 8}
    assert with_packing_record(plain, {}) == plain
    own = {"per_layer_config": {"1": {"head_dim": 16}}}  # Gemma 4 describes its layers so
    assert with_packing_record(own, {}) == own
    uneven = {**own, "allow_global_per_layer_attribute_access": True}
    assert is_uneven(uneven)
    recorded = with_packing_record(uneven, {})
    assert recorded == {**uneven, **packing_record({})}
    assert without_packing_record(recorded) == recorded
    assert without_packing_record({**plain, **packing_record({})}) == plain


def test_the_record_of_a_text_model_inside_another() -> None:
    inner = {"per_layer_config": {"1": {"head_dim": 16}}, "allow_global_per_layer_attribute_access": True}
    recorded = with_packing_record({"text_config": inner, "vision_config": {"hidden_size": 8}}, {})
    assert recorded["text_config"] == {**inner, NOTICE_KEY: NOTICE}
    assert recorded["vision_config"] == {"hidden_size": 8}
    assert recorded[NOTICE_KEY] == NOTICE
    back = without_packing_record({**recorded, "text_config": {NOTICE_KEY: NOTICE}})
    assert back == {"text_config": {}, "vision_config": {"hidden_size": 8}}


def test_the_config_that_was_given_stays(tmp_path: Path) -> None:
    wanted = save_uneven(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    before = config.to_dict()
    for _ in range(2):
        assert close(logits(load(tmp_path, config=config)), wanted)
    assert config.to_dict() == before
