"""A whole model's speed: the time to the first token, tokens a second for several batches, and memory."""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.kernels import workspace
from llmprune.repeats import Timing

# New tokens of a measured run, and how many runs at least.
_NEW_TOKENS = (8, 128)
_RUNS = 3


@dataclass(frozen=True, slots=True)
class Decoding:
    """How fast a model generates.

    Attributes:
        batch: sequences at once.
        prompt_tokens: of each sequence.
        new_tokens: generated for each, in a run.
        first_token: seconds from the call of `generate` to its first token.
        run: seconds of a whole run.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    first_token: Timing
    run: Timing

    @property
    def tokens_per_second(self) -> float:
        """After the first token, all sequences together."""
        return self.batch * (self.new_tokens - 1) / max(self.run.median - self.first_token.median, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        times = {"first_token": self.first_token.to_dict(), "run": self.run.to_dict()}
        return {**asdict(self), **times, "tokens_per_second": round(self.tokens_per_second, 3)}


def measure_decoding(model: PreTrainedModel, batch: int, seconds: float, prompt_tokens: int = 128) -> Decoding:
    """Time greedy generation after random prompts, through `model.generate` as users call it.

    Args:
        model: in evaluation mode; a static cache and CUDA graphs are its own affair.
        batch: number of sequences at once.
        seconds: for all runs; slow models generate fewer tokens, but never fewer than 8.
        prompt_tokens: of each sequence; fewer where the model's positions end.
    """
    device, (fewest, most) = model.device, _NEW_TOKENS
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or prompt_tokens + most
    prompt_tokens = max(1, min(prompt_tokens, positions // 2))
    run = _runner(model, batch, prompt_tokens)
    # Kernels are compiled by the first run, and graphs captured for a length.
    run(fewest)
    token = _seconds(run, fewest, device) / fewest
    count = max(fewest, min(most, positions - prompt_tokens, int(seconds / (_RUNS + 1) / token)))
    run(count)
    first = Timing.of([_seconds(run, 1, device) for _ in range(_RUNS)])
    return Decoding(batch, prompt_tokens, count, first, Timing.of([_seconds(run, count, device) for _ in range(_RUNS)]))


def resident_bytes(model: PreTrainedModel) -> int:
    """What a model holds for good: its parameters and buffers, what they share counted once, and shared scratch."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) + workspace.reserved(model.device)


def collect(device: torch.device) -> None:
    """Give a model's memory back that nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _runner(model: PreTrainedModel, batch: int, prompt_tokens: int) -> Callable[[int], object]:
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(vocabulary, (batch, prompt_tokens), generator=generator).to(model.device)
    mask = torch.ones_like(ids)

    def run(new_tokens: int) -> object:
        # No end of sequence, so that every run is as long as asked for.
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    return run


def _seconds(run: Callable[[int], object], new_tokens: int, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    run(new_tokens)
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
