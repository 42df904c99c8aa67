"""What the GPU bench measures, and a miniature of it for a rehearsal on a CPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llmprune.timing import Effort

# name: (out, in). Fused: q, k and v; gate and up.
SHAPES = {
    "llama-3-8b qkv": (6144, 4096), "llama-3-8b o": (4096, 4096),
    "llama-3-8b gate_up": (28672, 4096), "llama-3-8b down": (4096, 14336),
    "llama-3-70b qkv": (10240, 8192), "llama-3-70b o": (8192, 8192),
    "llama-3-70b gate_up": (57344, 8192), "llama-3-70b down": (8192, 28672),
    "qwen3-8b gate_up": (24576, 4096), "qwen3-8b down": (4096, 12288),
    "qwen2.5-7b qkv": (4608, 3584), "qwen2.5-7b o": (3584, 3584),
    "qwen2.5-7b gate_up": (37888, 3584), "qwen2.5-7b down": (3584, 18944),
    "llama-3.2-1b qkv": (3072, 2048), "llama-3.2-1b o": (2048, 2048),
    "llama-3.2-1b gate_up": (16384, 2048), "llama-3.2-1b down": (2048, 8192),
}  # fmt: skip

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 256,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        device: where.
        shapes: of the 2:4 matmuls: name -> (out, in). Shapes of Qwen3-8B that Llama-3-8B also has are not repeated.
        block_shapes: of the block-sparse matmuls.
        tokens: numbers of tokens for the 2:4 matmuls.
        block_tokens: numbers of tokens for the block-sparse matmuls.
        checked_tokens: numbers of tokens for the correctness checks, some of them odd on purpose.
        blocks: block sizes.
        sparsities: fractions of zero blocks.
        uneven: block size that is also measured with unequal numbers of blocks per block row.
        model: LlamaConfig of the whole model.
        batches: its batch sizes for decode.
        context: tokens in its static cache.
        prompt: tokens of its prefill.
        effort: for each timing.
        tune: search configurations before measuring.
        rehearsal: on a CPU, to check the script itself.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=lambda: SHAPES)
    block_shapes: tuple[str, ...] = ("llama-3-8b o", "llama-3-8b gate_up", "llama-3-8b down", "llama-3-8b qkv")
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 256, 512, 2048, 8192)
    block_tokens: tuple[int, ...] = (1, 16, 64, 512, 2048)
    checked_tokens: tuple[int, ...] = (1, 3, 8, 9, 17, 33, 64, 65, 123)
    blocks: tuple[int, ...] = (64, 128, 32, 16)
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.9)
    uneven: int = 64
    model: Mapping[str, Any] = field(default_factory=lambda: LLAMA_8B)
    batches: tuple[int, ...] = (1, 16, 4)
    context: int = 256
    prompt: int = 2048
    effort: Effort = field(default_factory=lambda: Effort(0.05))
    tune: bool = False
    rehearsal: bool = False


def rehearsal() -> Plan:
    """Every step of the script with tiny shapes, on a CPU."""
    return Plan(
        device=torch.device("cpu"),
        shapes={"small": (128, 256), "odd": (144, 264)},
        block_shapes=("small",),
        tokens=(1, 5, 64),
        block_tokens=(1, 65),
        checked_tokens=(1, 9, 65),
        blocks=(16, 64),
        sparsities=(0.5, 0.9),
        uneven=16,
        model=TINY,
        batches=(1, 2),
        context=32,
        prompt=16,
        effort=Effort(0.001, rotated_bytes=1 << 16),
        rehearsal=True,
    )
