"""Supported checkpoints are accepted whatever names stand in config.json, and what would be ignored is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from folders import same, tensors
from tiny_models import VOCABULARY, build, random_ids, randomise, recipe, save, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from llmprune import TextSpec, perplexity, prune
from llmprune.errors import CheckpointError, ModelError
from llmprune.models.skeleton import read_config
from llmprune.pruning.forecast.forecast import dry_run
from llmprune.pruning.packing import pack
from llmprune.serving.loader import load

IDS = random_ids(2, 16)
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
    "spatial_merge_size": 1, "num_position_embeddings": 16, "temporal_patch_size": 1, "deepstack_visual_indexes": [0],
}  # fmt: skip
# AutoModelForCausalLM loads the first two, one of them as its text model alone, and does not know the third.
WRAPPERS: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "text_config": {**TEXT, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "vision_config": VISION,
    },
    "llama4": {
        "text_config": {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 40,
                        "attention_chunk_size": 8, "interleave_moe_layer_step": 2},
        "vision_config": {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "image_size": 28,
                          "num_attention_heads": 4, "patch_size": 14, "vision_output_dim": 32,
                          "projector_input_dim": 32, "projector_output_dim": 32, "pixel_shuffle_ratio": 1.0},
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2],
                                                    "rope_theta": 10000.0}},
        "vision_config": VISION,
    },
}  # fmt: skip


def wrapper(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **WRAPPERS[family])).eval()
    randomise(model)
    return model


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("family", WRAPPERS)
def test_wrappers_are_pruned_on_disk_and_in_memory_alike(family: str, tmp_path: Path) -> None:
    model = wrapper(family)
    folder = save(model, tmp_path / "source")
    report = prune(folder, recipe(), tmp_path / "streamed")
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    prune(model, recipe(), tmp_path / "in-memory", tokenizer=tokenizer())
    streamed = AutoModelForImageTextToText.from_pretrained(tmp_path / "streamed")
    assert torch.equal(logits(streamed), logits(model))
    assert torch.equal(logits(load(tmp_path / "in-memory", dtype="float32")), logits(model))
    assert perplexity(tmp_path / "in-memory", TextSpec(samples=1, length=16)).samples == 1
    before, after = tensors(folder), tensors(tmp_path / "streamed")
    assert before.keys() == after.keys()
    assert all(same(before[key], after[key]) for key in before if ".layers." not in key or "vis" in key)


@pytest.mark.parametrize("names", [["LLaMAForCausalLM"], ["RWForCausalLM"], None, []])
def test_names_that_transformers_does_not_know_are_no_reason_to_refuse(names: object, tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path)
    edit(folder, architectures=names)
    assert read_config(folder).model_type == "llama"


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["LlamaModel"]},
        {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
    ],
)
def test_models_that_do_not_write_text_alone_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **changes}))
    with pytest.raises(ModelError, match="not a causal LM"):
        read_config(folder)


SPARSE_ONLY = {
    "config_groups": {}, "format": "dense", "quant_method": "compressed-tensors", "quantization_status": "frozen",
    "sparsity_config": {"format": "dense", "global_sparsity": 0.45, "sparsity_structure": "2:4"},
}  # fmt: skip


@pytest.mark.parametrize("record", [SPARSE_ONLY, {}], ids=["sparsity", "empty"])
def test_records_by_which_nothing_is_quantised_are_accepted(record: dict[str, Any], tmp_path: Path) -> None:
    folder = save(build("llama", torch.bfloat16, hidden_size=64, intermediate_size=96), tmp_path / "dense")
    prune(folder, recipe(pattern="2:4", method="magnitude"), tmp_path / "sparse")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32))
    edit(tmp_path / "sparse", quantization_config=record)
    assert torch.equal(logits(load(tmp_path / "sparse", dtype="float32")), expected)
    assert perplexity(tmp_path / "sparse", TextSpec(samples=1, length=16)).samples == 1
    pack(tmp_path / "sparse", tmp_path / "packed")
    torch.testing.assert_close(logits(load(tmp_path / "packed", dtype="float32")), expected, rtol=1e-5, atol=1e-5)
    prune(tmp_path / "sparse", recipe(), tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.parametrize(
    "record",
    [
        {**SPARSE_ONLY, "format": "pack-quantized"},
        {**SPARSE_ONLY, "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
        {"load_in_8bit": True},
        "fp8",
    ],
)
def test_records_of_quantised_weights_are_refused(record: Any, tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "dense")
    edit(folder, quantization_config=record)
    with pytest.raises(CheckpointError, match="already quantised"):
        prune(folder, recipe(), tmp_path / "out")


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "dense")
    (folder / "adapter_config.json").write_text("{}")
    for use in (lambda: prune(folder, recipe(), tmp_path / "out"), lambda: load(folder)):
        with pytest.raises(CheckpointError, match="adapter beside its weights") as caught:
            use()
        assert "merge it first" in caught.value.fix


@pytest.mark.parametrize("form", ["nm", "auto", "bitmask"])
def test_a_format_that_would_pack_nothing_is_refused_before_the_first_layer(form: str, tmp_path: Path) -> None:
    folder = save(build("gemma3-vision"), tmp_path / "dense")
    settings = recipe(pattern="2:4", method="magnitude", format=form)
    for use in (lambda: dry_run(folder, settings), lambda: prune(folder, settings, tmp_path / "out")):
        with pytest.raises(ModelError, match=f"format is {form}.*no linear layer under the name"):
            use()
    assert not (tmp_path / "out").exists()
    (tmp_path / "recipe.yaml").write_text(json.dumps({**settings, "format": "dense"}))
    command = ["prune", folder, "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "out", "--format", form]
    assert "format is" in run(*command, "--dry-run").stderr
    assert run(*command[:-2]).exit_code == 0
