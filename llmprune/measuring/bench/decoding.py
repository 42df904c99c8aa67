"""The speed of whole models: time to first token (TTFT), tokens/s for several batch sizes, and memory.

Models that are compared run alternately, so that other load on the machine affects all of them.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from llmprune.devices import PeakWatch, return_freed_memory
from llmprune.kernels import workspace
from llmprune.serving.placement import input_device
from llmprune.text.loading import model_positions
from llmprune.timing import Timing

# Least and most new tokens of a timed run, and least and most runs.
_NEW_TOKENS = (8, 128)
_RUNS = (3, 15)


@dataclass(frozen=True, slots=True)
class Decoding:
    """How fast a model generates.

    Attributes:
        batch: number of sequences.
        prompt_tokens: length of each sequence's prompt.
        new_tokens: generated per sequence in a run.
        first_token: time to first token: seconds from the call of `generate` to its first token.
        later_token: seconds per token after the first, the mean of a run.
        working_bytes: peak memory that a run adds to what was allocated before; on a CPU as far as the system shows it.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    first_token: Timing
    later_token: Timing
    working_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens/s of all sequences together, after the first token."""
        return self.batch / self.later_token.median

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        times = {"first_token": self.first_token.to_dict(), "later_token": self.later_token.to_dict()}
        return {**asdict(self), **times, "tokens_per_second": round(self.tokens_per_second, 3)}


def measure_decoding(
    models: Sequence[PreTrainedModel], batch: int, seconds: float, prompt_tokens: int = 128
) -> list[Decoding]:
    """Time greedy generation from random prompts by `model.generate`, alternating between one or more models.

    Args:
        models: in evaluation mode, on one device; each uses a static cache and CUDA graphs as it is set up to.
        batch: number of sequences.
        seconds: for all runs of one model; slow models generate fewer tokens, but at least 8.
        prompt_tokens: length of each sequence's prompt; shortened to fit the models' positions.
    """
    fewest, most = _NEW_TOKENS
    positions = min(model_positions(model.config) or prompt_tokens + most for model in models)
    prompt_tokens = max(1, min(prompt_tokens, positions // 2))
    runs = [Generation(model, batch, prompt_tokens) for model in models]
    # The first run compiles kernels, and captures graphs for a length.
    for run in runs:
        run(fewest)
    token = max(sum(run(fewest)) for run in runs) / fewest
    count = max(fewest, min(most, positions - prompt_tokens, int(seconds / (_RUNS[0] + 1) / token)))
    working = [_working_bytes(run, count) for run in runs]
    rounds = max(_RUNS[0], min(_RUNS[1], int(seconds / (token * count))))
    times = take_turns(runs, count, rounds)
    return [
        Decoding(
            batch,
            prompt_tokens,
            count,
            Timing.of([first for first, _ in own]),
            Timing.of([later / (count - 1) for _, later in own]),
            nbytes,
        )
        for own, nbytes in zip(times, working, strict=True)
    ]


def take_turns(
    runs: Sequence[Callable[[int], tuple[float, float]]], new_tokens: int, rounds: int
) -> list[list[tuple[float, float]]]:
    """Call each in every round, every other round in reverse order, so that none always comes first.

    Args:
        runs: new tokens -> seconds to the first, and of all others.
        new_tokens: for each call.
        rounds: how often each is called.

    Returns:
        For each what it has returned.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in runs]
    for number in range(rounds):
        for own, run in list(zip(times, runs, strict=True))[:: -1 if number % 2 else 1]:
            own.append(run(new_tokens))
    return times


class Generation:
    """Generates from random prompts; a call returns the seconds to the first token and those for all others.

    Args:
        model: as in `measure_decoding`.
        batch: number of sequences.
        prompt_tokens: of each.
    """

    def __init__(self, model: PreTrainedModel, batch: int, prompt_tokens: int) -> None:
        self.model = model
        vocabulary = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(batch)
        self._ids = torch.randint(vocabulary, (batch, prompt_tokens), generator=generator).to(input_device(model))
        self._mask = torch.ones_like(self._ids)

    def __call__(self, new_tokens: int) -> tuple[float, float]:
        clock = _Clock()
        _wait(input_device(self.model))
        started = time.perf_counter()
        # No EOS token, so that every run generates as many tokens as requested.
        self.model.generate(
            self._ids, attention_mask=self._mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
            pad_token_id=0, streamer=clock,
        )  # fmt: skip
        _prompt, first, *later = clock.times
        return first - started, (later[-1] if later else first) - first


class _Clock(BaseStreamer):  # type: ignore[misc] # transformers leaves it untyped
    """Records when tokens arrive on the host: first those of the prompt, then those of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _working_bytes(run: Generation, new_tokens: int) -> int:
    return_freed_memory()
    with PeakWatch(input_device(run.model)) as memory:
        run(new_tokens)
    return memory.peak - memory.baseline


def resident_bytes(model: PreTrainedModel) -> int:
    """A model's permanent memory: parameters and buffers, with shared storage counted once, and shared scratch."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) + workspace.reserved(input_device(model))


def collect(device: torch.device) -> None:
    """Free the memory of a model that is no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
