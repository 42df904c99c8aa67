"""Checkpoints as they are found: renamed, sharded, of mixed dtypes, with strangers, damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import contents, same, tensors, zeros
from safetensors.torch import load_file, save_file
from tiny_models import build, random_ids, recipe, save
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmprune import prune
from llmprune.errors import CheckpointError, ModelError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.source import ModelSource
from llmprune.stream.stream import Stream, StreamSettings

CPU = torch.device("cpu")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(build("llama"), tmp_path / "source")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Change the tensors of a checkpoint in one file."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def final_states(folder: Path) -> list[Tensor]:
    stream = Stream(CheckpointSource(folder), random_ids(3, 16), StreamSettings(batch_size=2, outputs=True))
    for _ in stream:
        pass
    return [batch for _, (batch,) in stream.logits(stream.hidden)]


def test_one_layer_or_the_ends_are_in_memory(llama: Path) -> None:
    source = CheckpointSource(llama)

    def loaded() -> set[str]:
        return {name for name, parameter in source.model.named_parameters() if not parameter.is_meta}

    assert loaded() == set()
    source.load_layer(1, CPU)
    assert loaded() == {f"model.layers.1.{name}" for name, _ in source.layers[1].named_parameters()}
    source.free_layer(1)
    source.load_ends(CPU)
    assert loaded() == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    source.free_ends()
    assert loaded() == set()


def test_a_layer_is_read_as_it_is_stored(llama: Path) -> None:
    source, stored = CheckpointSource(llama), tensors(llama)
    source.load_layer(0, CPU)
    assert all(same(p, stored[f"model.layers.0.{name}"]) for name, p in source.layers[0].named_parameters())
    assert all(same(tensor, stored[key]) for key, tensor in source.checkpoint_tensors(0).items())


def test_layer_keys_and_end_keys_are_all_keys(llama: Path) -> None:
    source = CheckpointSource(llama)
    parts = [source.layer_keys(0), source.layer_keys(1), source.end_keys()]
    assert sorted(key for part in parts for key in part) == sorted(tensors(llama))


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named_before_anything_is_read(llama: Path, key: str) -> None:
    rewrite(llama, lambda stored: {name: tensor for name, tensor in stored.items() if name != key})
    with pytest.raises(CheckpointError, match=f"no values for '{key}'"):
        CheckpointSource(llama)


def test_a_missing_expert_is_noticed(tmp_path: Path) -> None:
    folder = save(build("mixtral"), tmp_path)
    gone = next(key for key in tensors(folder) if ".experts.3." in key)
    rewrite(folder, lambda stored: {name: tensor for name, tensor in stored.items() if name != gone})
    with pytest.raises(CheckpointError, match=r"7 tensors with 10,752 values.* requires 4 x 96 x 32 \(12,288\)"):
        CheckpointSource(folder)


def test_a_shape_that_differs_is_named(llama: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    rewrite(llama, lambda stored: {**stored, key: stored[key][:-1].clone()})
    with pytest.raises(CheckpointError, match=f"'{key}' holds 47 x 32, and config.json requires 48 x 32"):
        CheckpointSource(llama)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_in_codes_are_refused(llama: Path, dtype: torch.dtype) -> None:
    """Their scales are elsewhere: pruned as numbers, they would be nonsense."""
    rewrite(llama, lambda stored: {k: t.to(dtype) if k.endswith("q_proj.weight") else t for k, t in stored.items()})
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=f"0.self_attn.q_proj.weight' and 1 more are stored as {name}"):
        CheckpointSource(llama)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path, max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        CheckpointSource(folder)


def test_shards_read_like_one_file(tmp_path: Path) -> None:
    whole = save(build("llama"), tmp_path / "whole")
    sharded = save(build("llama"), tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert (sharded / "model.safetensors.index.json").exists()
    assert all(torch.equal(*pair) for pair in zip(final_states(whole), final_states(sharded), strict=True))


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
def test_checkpoints_of_the_bare_model_load(family: str, tmp_path: Path) -> None:
    """Old checkpoints lack the prefix of the base model; the output spells its keys as the source does."""
    folder = save(build(family), tmp_path / "source")
    expected = final_states(folder)
    rewrite(folder, lambda stored: {key.partition(".")[2]: tensor for key, tensor in stored.items()})
    assert all(torch.equal(*pair) for pair in zip(final_states(folder), expected, strict=True))
    prune(folder, recipe(), tmp_path / "output")
    assert set(tensors(tmp_path / "output")) == set(tensors(folder))


def test_tensors_that_the_model_does_not_know_are_carried_over(tmp_path: Path) -> None:
    """A multi-token-prediction layer behind the last one, and buffers that older versions saved."""
    folder = save(build("deepseek_v3"), tmp_path / "source")
    strangers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
        "model.layers.3.eh_proj.weight": torch.rand(32, 64),
        "model.layers.3.mlp.experts.0.gate_proj.weight": torch.rand(24, 32, dtype=torch.float64),
        "model.layers.3.mlp.experts.0.up_proj.weight": torch.rand(24, 32).bfloat16(),
        "something.else": torch.arange(5),
    }
    rewrite(folder, lambda stored: {**stored, **strangers})
    prune(folder, recipe(), tmp_path / "output")
    output = tensors(tmp_path / "output")
    assert set(output) == set(tensors(folder))
    assert all(same(output[key], tensor) for key, tensor in strangers.items())


def test_a_tensor_may_become_several_parameters(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "hrm_text", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, num_layers_per_stack=2,
    )  # fmt: skip
    save(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tmp_path)
    key = "model.L_module.layers.0.mlp.gate_up_proj.weight"
    rewrite(tmp_path, lambda stored: {name: t.float() if name == key else t for name, t in stored.items()})
    source = CheckpointSource(tmp_path, decoder_layers="model.L_module.layers")
    source.load_layer(0, CPU)
    assert source.stored_dtype(0, "mlp.up_proj.weight") == torch.float32
    source.layers[0].get_parameter("mlp.up_proj.weight").data.zero_()
    assert zeros(source.checkpoint_tensors(0)[key]) == 0
    gate, up = source.checkpoint_tensors(0, {"mlp.up_proj.weight"})[key].chunk(2)
    assert torch.equal(gate, tensors(tmp_path)[key].chunk(2)[0])
    assert zeros(up) == up.numel()


def test_a_buffer_that_the_checkpoint_lacks_stays_out(tmp_path: Path) -> None:
    folder = save(build("deepseek_v3"), tmp_path / "source")
    rewrite(folder, lambda stored: {k: t for k, t in stored.items() if not k.endswith("e_score_correction_bias")})
    prune(folder, recipe(), tmp_path / "output")
    assert set(tensors(tmp_path / "output")) == set(tensors(folder))


def test_every_tensor_keeps_its_dtype_and_its_bits(tmp_path: Path) -> None:
    """Some float32 tensors in a bfloat16 checkpoint, one of which is pruned."""
    folder = save(build("llama", torch.bfloat16), tmp_path / "source")
    wide = ("layers.0.input_layernorm.weight", "layers.1.self_attn.q_proj.weight", "layers.1.mlp.up_proj.bias")

    def widen(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t.float() + 1e-6 * torch.rand(t.shape) if k.endswith(wide) else t for k, t in stored.items()}

    rewrite(folder, widen)
    report = prune(folder, recipe(exclude=["*.mlp.*"]), tmp_path / "output")
    before, after = tensors(folder), tensors(tmp_path / "output")
    pruned = {f"{row.name}.weight" for row in report.rows}
    assert "model.layers.1.self_attn.q_proj.weight" in pruned
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert zeros(after[key]) == tensor.numel() // 2 if key in pruned else same(after[key], tensor), key


def test_a_wider_compute_dtype_rounds_only_what_is_stored(tmp_path: Path) -> None:
    folder = save(build("llama", torch.bfloat16), tmp_path)
    source = CheckpointSource(folder, torch.float32)
    source.load_layer(0, CPU)
    assert source.layers[0].get_parameter("mlp.up_proj.weight").dtype == torch.float32
    assert source.stored_dtype(0, "mlp.up_proj.weight") == torch.bfloat16
    stored = tensors(folder)
    assert all(same(tensor, stored[key]) for key, tensor in source.checkpoint_tensors(0).items())


def test_reading_leaves_the_folder_alone(llama: Path) -> None:
    before = contents(llama)
    final_states(llama)
    assert contents(llama) == before


def test_tied_weights_are_read_once(tmp_path: Path) -> None:
    source = CheckpointSource(save(build("llama-tied"), tmp_path))
    source.load_ends(CPU)
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
    source.free_ends()
    assert source.model.lm_head.weight.is_meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no_such_model"}, "cannot be read"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "not a causal LM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal LM"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantised"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused(llama: Path, change: dict[str, object], message: str) -> None:
    file = llama / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        CheckpointSource(llama)


def test_layers_that_share_a_block_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "zamba", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, attention_head_dim=16, attention_hidden_size=64, mamba_dt_rank=4, mamba_d_state=4,
        layers_block_type=["hybrid", "linear_attention", "hybrid", "linear_attention"],
    )  # fmt: skip
    save(AutoModelForCausalLM.from_config(config), tmp_path)
    with pytest.raises(ModelError, match=r"layers\.0 and model\.layers\.2 share the parameter shared_transf"):
        CheckpointSource(tmp_path)


def test_offloaded_models_are_refused() -> None:
    with pytest.raises(ModelError, match="not in memory"):
        ModelSource(build("llama").to("meta"))


def test_a_model_in_memory_returns_to_where_it_was() -> None:
    model = build("llama")
    source = ModelSource(model)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    source.load_ends(CPU)
    source.free_ends()
    source.load_layer(0, CPU)
    source.free_layer(0)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_a_model_in_memory_visits_in_a_wider_dtype_and_returns_as_it_was() -> None:
    model = build("llama", torch.bfloat16, tie_word_embeddings=True)
    model.model.layers[0].input_layernorm.weight.data = torch.rand(32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = ModelSource(model, compute_dtype=torch.float32)
    source.load_layer(0, CPU)
    source.load_ends(CPU)
    assert source.dtype == torch.float32
    visitors = {name for name, tensor in model.named_parameters() if tensor.dtype == torch.float32}
    assert visitors == {name for name in before if not name.startswith("model.layers.1.")} - {"lm_head.weight"}
    assert source.stored_dtype(0, "mlp.up_proj.weight") == torch.bfloat16
    assert source.stored_dtype(0, "input_layernorm.weight") == torch.float32
    source.free_ends()
    source.free_layer(0)
    assert all(same(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
