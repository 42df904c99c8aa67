"""Self-generated text: calibration that needs no data set, from the distribution that pruning must preserve."""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from llmprune.errors import NumericsError
from llmprune.patterns import highest
from llmprune.storage.files import write_text
from llmprune.text.decoding import grouped_attention, with_room
from llmprune.text.openings import Tokenizer, spelled_out
from llmprune.text.scripts import UNSCRIPTED, Script
from llmprune.text.tokens import TextSpec

# Sequences that are generated together: either text of a run on a CPU by default.
SAMPLING_BATCH = 96

# Tokens among which the most likely ones are looked for first.
_LIKELY = 512


@torch.no_grad()
def generate_text(
    model: nn.Module,
    spec: TextSpec,
    scripts: Sequence[Script] = (UNSCRIPTED,),
    *,
    batch: int = SAMPLING_BATCH,
    watch: Callable[[int], None] = lambda tokens: None,
) -> Int64[Tensor, "samples length"]:
    """Sample text from a causal LM, token by token from its own distribution.

    A sequence does not stop at an end-of-sequence token (of the model's generation config): its script goes on. The
    draws come from a separate seeded CPU generator, one for each position of each sequence, so they depend on neither
    the batch, the device nor the global random state, and leave that state unchanged. The model samples in evaluation
    mode.

    Args:
        model: a transformers causal LM, in memory.
        spec: samples, length (at most the model's positions), seed, temperature and top_p are used.
        scripts: how sequences begin and go on, dealt out to them in turn; see `scripts.scripts_of`.
        batch: sequences that are generated together; bounds the memory of the key-value cache. The default takes each
            text of a CPU's default run in one go.
        watch: called with the number of tokens so far, after every position of a batch.

    Returns:
        [samples, length] on the CPU.

    Raises:
        NumericsError: the logits are not finite; names the weight that is not, if there is one.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    draws = torch.rand(spec.sequences, spec.tokens, generator=generator, dtype=torch.float64)
    training = model.training
    model.eval()
    parts: list[Tensor] = []
    try:
        for part in draws.split(batch):
            first = sum(map(len, parts))
            own = [scripts[(first + row) % len(scripts)] for row in range(len(part))]
            with grouped_attention():
                parts.append(_sample(model, part, own, spec, _after(watch, first * spec.tokens)))
    except NumericsError as error:
        raise _located(error, model) from error
    finally:
        model.train(training)
    return torch.cat(parts)


def write_samples(path: Path, ids: Int64[Tensor, "samples length"], tokenizer: Tokenizer) -> None:
    """Keep self-generated text as a JSON-lines file, which `calibration.source` reads: one sequence a line, as text.

    Args:
        path: the file, replaced atomically.
        ids: the sequences.
        tokenizer: spells them out.

    Raises:
        CheckpointError: it cannot be written.
    """
    lines = [json.dumps({"text": spelled_out(tokenizer, row)}, ensure_ascii=False) for row in ids.tolist()]
    write_text(path, "\n".join([*lines, ""]))


def _after(watch: Callable[[int], None], before: int) -> Callable[[int], None]:
    return lambda tokens: watch(before + tokens)


def _located(error: NumericsError, model: nn.Module) -> NumericsError:
    """The error, with the first weight that is not finite if there is one."""
    damaged = next((name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()), None)
    if damaged is None:
        return error
    return NumericsError(
        f"{damaged} contains NaN or infinity: {error.what}",
        expected="finite weights",
        fix="check the source checkpoint, or download it again",
    )


def _sample(
    model: nn.Module,
    draws: Float[Tensor, "samples length"],
    scripts: Sequence[Script],
    spec: TextSpec,
    watch: Callable[[int], None],
) -> Int64[Tensor, "samples length"]:
    """Turn uniform draws in [0, 1) into tokens, one draw per position, whether it is sampled or scripted."""
    config: Any = model.config
    device: Any = model.device
    draws = draws.to(device)
    vocabulary, ends = config.get_text_config().vocab_size, end_tokens(model)
    players = [_Player(script, ends) for script in scripts]
    ids = torch.empty(draws.shape, dtype=torch.int64)
    cache: dict[str, Any] = {}
    for position in range(draws.shape[1]):
        # Before the first forward pass there is no distribution yet.
        drawn = (draws[:, 0] * vocabulary).long() if position == 0 else _next(model, ids, position, cache, draws, spec)
        played = [player.play(token) for player, token in zip(players, drawn.tolist(), strict=True)]
        ids[:, position] = torch.tensor(played)
        watch((position + 1) * len(players))
    return ids


def _next(
    model: nn.Module,
    ids: Int64[Tensor, "samples length"],
    position: int,
    cache: dict[str, Any],
    draws: Float[Tensor, "samples length"],
    spec: TextSpec,
) -> Int64[Tensor, " samples"]:
    """Draw the tokens at a position, given those before it; `cache` is brought up to date."""
    device: Any = model.device
    # A model that returns no cache reads its whole prefix again: slow, but the same distribution.
    unread = ids[:, position - 1 : position] if cache else ids[:, :position]
    output = model(input_ids=unread.to(device), use_cache=True, **cache)
    state = getattr(output, "past_key_values", None)
    cache.clear()
    cache.update({} if state is None else {"past_key_values": with_room(state, ids.shape[1])})
    return draw(output.logits[:, -1], draws[:, position], spec.temperature, spec.top_p)


class _Player:
    """Follows one sequence's script."""

    def __init__(self, script: Script, ends: set[int]) -> None:
        self._segments, self._ends = script.segments, ends
        self._turn = 0
        self._waiting = list(script.segments[0])

    def play(self, drawn: int) -> int:
        """The token that the script puts here, or the one that was drawn."""
        if self._waiting:
            return self._waiting.pop(0)
        if drawn in self._ends:
            self._turn = (self._turn + 1) % len(self._segments)
            waiting = list(self._segments[self._turn])
            self._waiting = waiting[1:] if waiting[:1] == [drawn] else waiting
        return drawn


def end_tokens(model: nn.Module) -> set[int]:
    """The end-of-sequence tokens of a model's generation config."""
    settings: Any = model.generation_config
    ends = settings.eos_token_id if settings.eos_token_id is not None else []
    return {ends} if isinstance(ends, int) else set(ends)


def draw(
    logits: Float[Tensor, "samples vocabulary"], draws: Float[Tensor, " samples"], temperature: float, top_p: float
) -> Int64[Tensor, " samples"]:
    """Draw tokens from logits, given numbers in [0, 1).

    Inverts the cumulative distribution in float64, so that the tail of a large vocabulary keeps its probability.

    Raises:
        NumericsError: a logit is not finite.
    """
    shares = torch.softmax(logits.double() / temperature, dim=-1)
    finite = torch.isfinite(shares.sum(-1))
    if not bool(finite.all()):
        raise NumericsError(
            f"the logits of {int((~finite).sum())} of {len(finite)} sequences are not finite",
            fix="check the model's weights and dtype, or raise the temperature",
        )
    if top_p < 1:
        shares = torch.where(shares >= _least_likely(shares, top_p), shares, 0)
    cumulative = shares.cumsum(-1)
    return torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True).squeeze(1)


def _least_likely(shares: Float[Tensor, "samples vocabulary"], top_p: float) -> Float[Tensor, "samples 1"]:
    """For each row, the lowest of the highest shares that are `top_p` together; equal ones are all counted in."""
    # Sorting a whole vocabulary takes longer than the rest of a draw, and hundreds of tokens are usually enough.
    found = torch.zeros_like(shares[:, :1])
    rows, count = torch.arange(len(shares), device=shares.device), min(_LIKELY, shares.shape[1])
    while len(rows):
        high = highest(shares[rows], count)
        sums = high.cumsum(-1)
        kept = (sums - high < top_p).sum(-1, keepdim=True).clamp_min(1)
        found[rows] = high.gather(-1, kept - 1)
        rows = rows[sums[:, -1] < top_p] if count < shares.shape[1] else rows[:0]
        count = min(8 * count, shares.shape[1])
    return found
