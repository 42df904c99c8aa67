"""Whole engines of vLLM, and what transformers says about the same tokens."""

import gc
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: `make test-vllm` runs this"
)

# vLLM reads them when it is imported.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

TOKENS = 64
PROMPTS = (
    "The", "Once upon a time", "In the", "def main():", "import os", "This document describes", "# Installation",
    "How to", "A list of", "The quick brown fox", "for i in range(10):", "To install the package,", "class Model:",
    "We", "It is", "Copyright (c)", "When the server starts", "The following example", "If you want to", "1. First",
)  # fmt: skip


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """An engine with the checkpoint of a folder; afterwards, another one may be started."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 32}
    llm = None
    try:
        llm = LLM(str(folder), **{**usual, **options})
        yield llm
    finally:  # one that was refused has groups of processes, too
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def prompt_ids(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def generated(folder: Path, **options: Any) -> tuple[list[list[int]], list[Tensor]]:
    """What vLLM appends to each prompt, greedily, and the log-probabilities of each prompt's tokens."""
    from vllm import SamplingParams

    # As in transformers, the end of the text is never chosen.
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, prompt_logprobs=0)
    prompts = prompt_ids(folder)
    with engine(folder, **options) as llm:
        results = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        tokens = [list(result.outputs[0].token_ids) for result in results]
        logs = [
            torch.tensor([row[token].logprob for row, token in zip(result.prompt_logprobs[1:], ids[1:], strict=True)])
            for result, ids in zip(results, prompts, strict=True)
        ]
    return tokens, logs


@torch.inference_mode()
def judged(folder: Path, tokens: list[list[int]]) -> tuple[float, list[Tensor]]:
    """What transformers says about the tokens that were appended to each prompt.

    Each token is chosen from those before it, so one forward pass shows whether transformers would have chosen every
    one of them.

    Returns:
        By how many nats the worst of them is below the best one, 0.0 if all are the best; and the log-probabilities of
        each prompt's tokens.
    """
    from transformers import AutoModelForCausalLM

    import llmprune  # noqa: F401 # loads packed checkpoints

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    worst, logs = 0.0, []
    for ids, answer in zip(prompt_ids(folder), tokens, strict=True):
        assert len(answer) == TOKENS
        inputs = torch.tensor([ids + answer])
        shares = model(inputs).logits[0].log_softmax(-1)
        logs.append(shares[: len(ids) - 1].gather(1, inputs[0, 1 : len(ids), None])[:, 0])
        choices = shares[len(ids) - 1 : -1].clone()
        choices[:, model.config.eos_token_id] = -torch.inf
        chosen = choices.gather(1, torch.tensor(answer)[:, None])[:, 0]
        worst = max(worst, float((choices.amax(1) - chosen).max()))
    return worst, logs
