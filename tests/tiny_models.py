"""Tiny random models of every kind of architecture: one row a family, and how to save them as the hub would.

Weights are random throughout: norms are not 1, biases not 0, and routers are decided enough that some experts stay idle.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 128

# Values that any config may take; a row overrides them, and None drops one.
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
_MHA = {"num_key_value_heads": None}
_TWO_KINDS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 2}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

# name: (model_type, what differs from _COMMON).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {**_TIED, "num_hidden_layers": 3}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {**_TIED, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {**_TIED, "head_dim": 16}),
    "gemma2": ("gemma2", {**_TIED, **_TWO_KINDS, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {**_TIED, **_TWO_KINDS, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {"sliding_window": 8}),
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
    "starcoder2": ("starcoder2", {"use_bias": True, "sliding_window": 8}),
    "nemotron": ("nemotron", {"head_dim": 8}),
    "glm": ("glm", {"head_dim": 8, "attention_bias": True}),
    "glm4": ("glm4", {"head_dim": 8}),
    "gemma3n": ("gemma3n_text", {**_TIED, "head_dim": 8}),
    "xglm": ("xglm", {**_TIED, "d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "num_experts": 6, "head_dim": 16, "num_hidden_layers": 3, "mlp_only_layers": [0]}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "deepseek_v3",
        {**_MOE, **_MLA, **_MHA, "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 8,
         "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "num_nextn_predict_layers": 0},
    ),
    "gpt_oss": ("gpt_oss", {**_TWO_KINDS, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**_MAMBA2, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24,
         "layer_types": ["mamba", "attention"]},
    ),
    "llama4": (
        "llama4_text",
        {"intermediate_size_mlp": 40, "head_dim": 8, "num_local_experts": 4, "attention_chunk_size": 8,
         "interleave_moe_layer_step": 2},
    ),
    "phimoe": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "dbrx": (
        "dbrx",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5},
         "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}},
    ),
    "mamba": ("mamba", {**_TIED, "state_size": 4}),
    "mamba2": ("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 4}),
    "jamba": (
        "jamba",
        {"num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "bamba": ("bamba", {**_MAMBA2, "attn_layer_indices": [1]}),
    "falcon_h1": ("falcon_h1", {**_MAMBA2, "mamba_d_ssm": 64}),
    "nemotron_h": (
        "nemotron_h",
        {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
         "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
         "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "moe_shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1},
    ),
    "rwkv": ("rwkv", {"rescale_every": 0}),
    "qwen3_next": (
        "qwen3_next",
        {**_MOE, "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "layer_types": ["linear_attention", "full_attention"]},
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "recurrent_gemma": (
        "recurrent_gemma", {**_TIED, "lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 8}
    ),
}  # fmt: skip


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a family, the same at every call."""
    model_type, values = FAMILIES[family]
    settings = {key: value for key, value in {**_COMMON, **values, **changes}.items() if value is not None}
    config = AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
        randomise(model)
    return model  # type: ignore[no-any-return]


def randomise(model: PreTrainedModel) -> None:
    """Make every parameter, and every buffer that is saved, take part in the result."""
    saved = model.state_dict()
    with torch.no_grad():
        for name, tensor in saved.items():
            if tensor.is_floating_point():
                spread = 1.0 if "router" in name or name.endswith(".gate.weight") else 0.15
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype), alpha=spread)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: w3 is token 3."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3")


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Write a checkpoint with its tokenizer."""
    model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


def random_ids(samples: int, length: int, seed: int = 0) -> torch.Tensor:
    """Tokens [samples, length] without the special ones."""
    return torch.randint(4, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def recipe(**changes: Any) -> Mapping[str, Any]:
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
