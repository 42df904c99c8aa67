"""Tiny random models of every kind of architecture: one row a family, and how to save them as the hub would.

Weights are random throughout: norms are not 1, biases not 0, and routers are decided enough to leave experts idle.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from llmprune.models.skeleton import quiet_transformers

VOCABULARY = 128

# Values that any text config may take; a row overrides them, and None drops one.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_TIED = {"tie_word_embeddings": True}
_HEAD_8 = {"head_dim": 8}
_WINDOW = {"sliding_window": 8}
_TWO_KINDS = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 2}
_MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
_MOE = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 24}
_LOCAL_MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
_ROUTED_MOE = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
}
# The last two layers read the keys and values of the first two.
_SHARED_KV = {
    **_TIED, **_WINDOW, **_HEAD_8, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
}  # fmt: skip

# name: (model_type, what differs from _COMMON).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {**_TIED, "num_hidden_layers": 3}),
    "mistral": ("mistral", _WINDOW),
    "qwen2": ("qwen2", {**_TIED, **_WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {**_TIED, "head_dim": 16}),
    "gemma2": ("gemma2", {**_TIED, **_TWO_KINDS, **_HEAD_8, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {**_TIED, **_TWO_KINDS, **_HEAD_8, "query_pre_attn_scalar": 8}),
    "gemma3-vision": (
        "gemma3",
        {**_TIED, "text_config": {**_TWO_KINDS, **_HEAD_8}, "mm_tokens_per_image": 4,
         "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
                           "image_size": 28, "patch_size": 14}},
    ),
    "gemma3n": ("gemma3n_text", {**_SHARED_KV, "laurel_rank": 4}),
    "gemma4": ("gemma4_text", {**_SHARED_KV, "global_head_dim": 16}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", _WINDOW),
    "openai-gpt": ("openai-gpt", {**_GPT, **_TIED}),
    "gpt2": ("gpt2", {**_GPT, **_TIED}),
    "gpt_bigcode": ("gpt_bigcode", {**_GPT, **_TIED}),
    "gpt_neo": (
        "gpt_neo",
        {**_TIED, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "opt": ("opt", {**_TIED, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-350m": ("opt", {**_TIED, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("bloom", {**_TIED, "n_head": 4, "n_layer": 2}),
    "falcon-7b": ("falcon", {**_TIED, "multi_query": True, "parallel_attn": True, "alibi": False}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "mpt": ("mpt", {**_TIED, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2}),
    "olmo": ("olmo", {"clip_qkv": 0.5}),
    "olmo2": ("olmo2", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True, "qk_layernorm": True}),
    "cohere": ("cohere", {**_TIED, "use_qk_norm": True}),
    "cohere2": ("cohere2", {**_TIED, **_TWO_KINDS}),
    "granite": ("granite", {"embedding_multiplier": 2.0, "logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "smollm3": ("smollm3", {**_TIED, "no_rope_layers": [1, 0]}),
    "starcoder2": ("starcoder2", {**_WINDOW, "use_bias": True}),
    "nemotron": ("nemotron", _HEAD_8),
    "glm": ("glm", {**_HEAD_8, "attention_bias": True}),
    "glm4": ("glm4", _HEAD_8),
    "xglm": ("xglm", {**_TIED, "d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2}),
    "mixtral": ("mixtral", _LOCAL_MOE),
    "qwen2_moe": ("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "num_experts": 6, "num_hidden_layers": 3, "mlp_only_layers": [0], **_HEAD_8}),
    "olmoe": ("olmoe", _MOE),
    "deepseek_v3": (
        "deepseek_v3",
        {**_ROUTED_MOE, **_MLA, "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 8,
         "n_group": 2},
    ),
    # Hidden states in four streams; the first projection of the output is block-diagonal.
    "deepseek_v4": (
        "deepseek_v4",
        {**_ROUTED_MOE, "num_key_value_heads": 1, **_HEAD_8, "qk_rope_head_dim": 4, "q_lora_rank": 8,
         "o_lora_rank": 8, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "hc_mult": 2},
    ),
    # The second layer attends to the tokens that the first one has chosen.
    "glm_moe_dsa": (
        "glm_moe_dsa",
        {**_ROUTED_MOE, **_MLA, **_HEAD_8, "first_k_dense_replace": 1, "index_topk": 8, "index_n_heads": 2,
         "index_head_dim": 8, "indexer_types": ["full", "shared"]},
    ),
    "gpt_oss": ("gpt_oss", {**_TWO_KINDS, **_HEAD_8, **_LOCAL_MOE}),
    "granitemoe": ("granitemoe", _LOCAL_MOE),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**_MAMBA2, **_LOCAL_MOE, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"]},
    ),
    "jetmoe": ("jetmoe", {**_LOCAL_MOE, "kv_channels": 8, "num_key_value_heads": 2}),
    "llama4": (
        "llama4_text",
        {**_HEAD_8, **_LOCAL_MOE, "num_experts_per_tok": 1, "intermediate_size_mlp": 40, "attention_chunk_size": 8,
         "interleave_moe_layer_step": 2},
    ),
    "phimoe": ("phimoe", {**_WINDOW, **_LOCAL_MOE}),
    "dbrx": (
        "dbrx",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
         "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10000.0},
         "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 32}},
    ),
    # Each router reads what the router before it has computed.
    "zaya": ("zaya", {**_MOE, **_HEAD_8, "num_experts_per_tok": 1, "router_hidden_size": 16}),
    "mamba": ("mamba", {**_TIED, "state_size": 4}),
    "mamba2": ("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 4}),
    "jamba": (
        "jamba",
        {"num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "bamba": ("bamba", {**_MAMBA2, "attn_layer_indices": [1]}),
    "falcon_h1": ("falcon_h1", {**_MAMBA2, "mamba_d_ssm": 64}),
    "nemotron_h": (
        "nemotron_h",
        {**_ROUTED_MOE, **_HEAD_8, "num_hidden_layers": 4, "moe_shared_expert_intermediate_size": 24,
         "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"], "mamba_num_heads": 4,
         "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8},
    ),
    "rwkv": ("rwkv", {"rescale_every": 0}),
    "qwen3_next": (
        "qwen3_next",
        {**_MOE, **_HEAD_8, **_LINEAR, "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {**_TIED, "lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 8},
    ),
}  # fmt: skip


# One of every kind; `make test` leaves the others out.
_USUAL = {"llama", "llama-tied", "gpt2", "gemma3-vision", "falcon-40b", "mixtral", "deepseek_v3", "jamba", "mamba2"}


def marked(names: Iterable[str]) -> list[Any]:
    """Parameters of a test, "family" or "family:dtype", most of them with the marker `families`."""
    return [pytest.param(name, marks=[] if name in _USUAL else [pytest.mark.families], id=name) for name in names]


every_family = pytest.mark.parametrize("family", marked(FAMILIES))


def known(family: str) -> bool:
    """Whether the installed transformers has this architecture."""
    return FAMILIES[family][0] in CONFIG_MAPPING


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a family, the same at every call."""
    model_type, values = FAMILIES[family]
    settings = _settings({**values, **changes})
    if "text_config" in settings:
        settings["text_config"] = _settings(settings["text_config"])
    config = AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
        randomise(model)
    return model


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    common = {} if "text_config" in values else _COMMON
    return {key: value for key, value in {**common, **values}.items() if value is not None}


def randomise(model: PreTrainedModel) -> None:
    """Make every parameter, and every buffer that is saved, take part in the result."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            # Loading sets the last of the balancing biases to -1, whatever is stored.
            if tensor.is_floating_point() and not name.endswith("balancing_biases"):
                spread = 1.0 if "router" in name or name.endswith(".gate.weight") else 0.15
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype), alpha=spread)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: w3 is token 3."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Write a checkpoint with its tokenizer; `options` are those of `save_pretrained`."""
    with quiet_transformers():
        model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


def random_ids(samples: int, length: int, seed: int = 0) -> torch.Tensor:
    """Tokens [samples, length] without the special ones."""
    return torch.randint(4, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def recipe(**changes: Any) -> dict[str, Any]:
    """A small recipe for these models."""
    return {
        "pattern": "0.5",
        "method": "sparsegpt",
        "calibration": {"source": "self", "samples": 6, "length": 24},
        "evaluation": None,
        "batch_size": 2,
        "held_back": 1,
        "device": "cpu",
        **changes,
    }
