"""Perplexity and KL divergence by one fixed protocol, streamed layer by layer.

Text is tokenised, packed and cut into sequences of `length` tokens, each of which begins with what the tokenizer itself
puts in front of a text (BOS, or nothing: see `text.openings`); the stride is the length, so no token is scored twice.
Each token but the first is predicted from its own sequence, and tokens that only open a text, such as BOS, are never
scored. Negative log-likelihoods are summed in float64, from log-softmax in float32.

The standard error treats sequences as independent draws; see `measuring.scoring`, which also has the expected
calibration error (ECE).
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.errors import ModelError, NumericsError
from llmprune.measuring.scoring import Differences, Scores
from llmprune.models.checkpoint_source import open_checkpoint
from llmprune.models.source import Source
from llmprune.precision import dtype_name
from llmprune.progress import Progress, Watcher, ignore
from llmprune.storage.hub import resolve_model
from llmprune.stream.guard import MemoryGuard, sampling_needs, scoring_needs
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.stream.windows import Window
from llmprune.text.loading import load_texts, model_positions, tokenizer_for
from llmprune.text.mix import Text, by_source
from llmprune.text.tokens import Tokens

_LARGEST_NATS = math.log(sys.float_info.max)


@dataclass(frozen=True, slots=True)
class Perplexity:
    """One measurement.

    Attributes:
        perplexity: exp(nats); infinite if that exceeds float64 (above 709 nats).
        nats: mean negative log-likelihood per predicted token.
        predicted_tokens: number of tokens scored.
        samples: number of sequences.
        length: sequence length in tokens, which is also the stride.
        tokens_digest: sha256 of the sequences.
        text: their origin.
        calibration_error: expected calibration error (ECE) of the most likely next token, in [0, 1], lower is better;
            None in measurements from before it was recorded.
        compute_dtype: of the forward pass, as torch names it; None in measurements from before it was recorded.
        nats_stderr: standard error of `nats`, by sequences; None with a single sequence, and in measurements from
            before it was recorded.
        sources: the same for each text of a mix; empty for a single text.
    """

    perplexity: float
    nats: float
    predicted_tokens: int
    samples: int
    length: int
    tokens_digest: str
    text: dict[str, object]
    calibration_error: float | None = None
    compute_dtype: str | None = None
    nats_stderr: float | None = None
    sources: tuple["Perplexity", ...] = ()

    @property
    def stderr(self) -> float | None:
        """Standard error of the perplexity, by sequences: perplexity * nats_stderr (delta method); None if unknown."""
        return None if self.nats_stderr is None else self.perplexity * self.nats_stderr

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON, which has no infinity: an infinite perplexity is null, with its nats given."""
        stderr = None if self.stderr is None else finite(self.stderr)
        content = {**asdict(self), "perplexity": finite(self.perplexity), "stderr": stderr, "stride": self.length}
        del content["sources"]
        return {**content, **({"sources": [part.to_dict() for part in self.sources]} if self.sources else {})}


@dataclass(frozen=True, slots=True)
class PerplexityComparison:
    """A pruned model compared with the dense one, on the same tokens.

    Attributes:
        dense: perplexity of the dense model.
        pruned: perplexity of the pruned model.
        kl_divergence: mean KL(dense || pruned) of the next-token distributions, in nats/token; not finite if the pruned
            model gives probability zero (in float32) to a token for which the dense model does not.
        agreement: top-1 agreement: the fraction of positions whose most likely next token is the same.
        change_stderr: standard error of pruned.nats - dense.nats, paired by sequences, and so that of the logarithm of
            the factor between both perplexities; None with a single sequence, and in measurements from before it was
            recorded.
        sources: the same for each text of a mix; empty for a single text.
    """

    dense: Perplexity
    pruned: Perplexity
    kl_divergence: float
    agreement: float
    change_stderr: float | None = None
    sources: tuple["PerplexityComparison", ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON; a divergence that is not finite is null."""
        return {
            "dense": self.dense.to_dict(),
            "pruned": self.pruned.to_dict(),
            "kl_divergence": finite(self.kl_divergence),
            "agreement": self.agreement,
            "change_stderr": self.change_stderr,
            **({"sources": [part.to_dict() for part in self.sources]} if self.sources else {}),
        }


def perplexity(
    model: str | Path,
    text: Text,
    settings: StreamSettings | None = None,
    compute_dtype: str = "auto",
    watch: Watcher = ignore,
) -> Perplexity:
    """Measure the perplexity of a checkpoint on a text.

    Args:
        model: a hub id, a local checkpoint folder or "testbed".
        text: which text or mix, and how it is cut into sequences; perplexities on self-generated text cannot be
            compared between models.
        settings: device, batch size and memory; default: the CPU, 8 sequences per forward pass.
        compute_dtype: of the forward pass, as torch names it; "auto": the checkpoint's, or float32 on a CPU without
            instructions for it.
        watch: called for each layer.

    Raises:
        LlmpruneError: the model or the text cannot be read, the text is too short, the logits are not finite, or
            memory is insufficient.

    Example:
        >>> perplexity("testbed", TextSpec("self", samples=4, length=256)).samples  # doctest: +SKIP
        4
    """
    settings = settings or StreamSettings()
    with MemoryGuard(settings, watch) as guard:
        folder = resolve_model(model)
        source = open_checkpoint(folder, settings.device, compute_dtype)
        guard(Progress("text"))
        if any(part.source == "self" for part in text.parts):
            guard.expected = lambda: sampling_needs(source)
        tokenizer = tokenizer_for([text], folder, source.config)
        text = text.fitted(model_positions(source.config), settings.device.type)
        tokens = load_texts({"text": text}, source, tokenizer, settings.device, guard)["text"]
        guard.expected = lambda: scoring_needs(source, tokens, settings)
        return measure_perplexity(source, tokens, settings, guard)


def perplexity_against(
    model: str | Path,
    dense: str | Path,
    text: Text,
    settings: StreamSettings | None = None,
    compute_dtype: str = "auto",
    watch: Watcher = ignore,
) -> PerplexityComparison:
    """Compare a checkpoint with the dense model on a text: both perplexities, KL divergence and top-1 agreement.

    Args:
        model: a hub id, a local checkpoint folder or "testbed".
        dense: the model to compare with, likewise; its tokenizer is used, and self-generated text is sampled from it.
        text: which text or mix, and how it is cut into sequences.
        settings: device, batch size and memory; default: the CPU, 8 sequences per forward pass.
        compute_dtype: of both forward passes, as for `perplexity`.
        watch: called for each layer of both.

    Raises:
        LlmpruneError: as for `perplexity`.
        ModelError: the two have vocabularies of different sizes.

    Example:
        >>> perplexity_against("out/demo", "testbed", TextSpec("self", samples=4)).kl_divergence  # doctest: +SKIP
        0.06
    """
    settings = settings or StreamSettings()
    with MemoryGuard(settings, watch) as guard:
        folders = [resolve_model(name) for name in (dense, model)]
        sources = [open_checkpoint(folder, settings.device, compute_dtype) for folder in folders]
        sizes = [source.config.get_text_config().vocab_size for source in sources]
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"{model} has a vocabulary of {sizes[1]} tokens, and {dense} one of {sizes[0]}",
                expected="two models with the same vocabulary",
                fix="compare with the model that this one was pruned from",
            )
        guard(Progress("text"))
        if any(part.source == "self" for part in text.parts):
            guard.expected = lambda: sampling_needs(sources[0])
        tokenizer = tokenizer_for([text], folders[0], sources[0].config)
        text = text.fitted(model_positions(sources[0].config), settings.device.type)
        tokens = load_texts({"text": text}, sources[0], tokenizer, settings.device, guard)["text"]
        guard.expected = lambda: scoring_needs(sources[0], tokens, settings, models=2)
        first, second = (
            run_stream(source, tokens.ids, settings, guard, stage)
            for source, stage in zip(sources, ("dense perplexity", "perplexity"), strict=True)
        )
        return compare_perplexity(first, second, tokens, guard)


def measure_perplexity(source: Source, tokens: Tokens, settings: StreamSettings, watch: Watcher = ignore) -> Perplexity:
    """Measure one model's perplexity with at most one decoder layer in memory.

    Args:
        source: the model.
        tokens: the sequences.
        settings: device, batch size and memory; `outputs` is implied.
        watch: called for each layer.

    Raises:
        NumericsError: the logits are not finite.
    """
    stream = run_stream(source, tokens.ids, settings, watch, "perplexity")
    scores = Scores(len(tokens.ids))
    for window, logits in stream.logits(stream.hidden, watch=_head(watch)):
        (log_probabilities,), targets, sequences = _predictions(tokens, stream, window, logits)
        scores.add(log_probabilities, targets, sequences)
    whole = _summary(scores, tokens, source)
    if not tokens.sources:
        return whole
    return replace(whole, sources=tuple(_summary(scores.over(rows), part, source) for rows, part in by_source(tokens)))


def compare_perplexity(dense: Stream, pruned: Stream, tokens: Tokens, watch: Watcher = ignore) -> PerplexityComparison:
    """Score a pruned model and the dense one on the same tokens.

    Args:
        dense: a finished run of the dense model on the tokens; its source may have become the pruned model's since, if
            only decoder layers have changed.
        pruned: a finished run of the pruned model.
        tokens: the sequences that both models were run on.
        watch: called for each part of the positions.
    """
    differences = Differences(len(tokens.ids))
    scores = (Scores(len(tokens.ids)), Scores(len(tokens.ids)))
    for window, pair in _logits(dense, pruned, _head(watch)):
        (before, after), targets, sequences = _predictions(tokens, dense, window, pair)
        scores[0].add(before, targets, sequences)
        scores[1].add(after, targets, sequences)
        differences.add(before, after, sequences)
    if (ranks := pruned.settings.ranks).size > 1:
        for sums in (*scores, differences):
            sums.collect(ranks)
    models = dense.source, pruned.source
    first, second = (_summary(score, tokens, source) for score, source in zip(scores, models, strict=True))
    count, parts = first.predicted_tokens, []
    for rows, part in by_source(tokens) if tokens.sources else ():
        own = scores[0].over(rows), scores[1].over(rows)
        one, other = (_summary(score, part, source) for score, source in zip(own, models, strict=True))
        divergence, same = (value / part.predicted for value in differences.over(rows))
        parts.append(PerplexityComparison(one, other, divergence, same, own[0].difference_stderr(own[1])))
    divergence, same = differences.divergence / count, differences.same / count
    stderr = scores[0].difference_stderr(scores[1])
    return PerplexityComparison(first, second, divergence, same, stderr, tuple(parts))


def run_stream(source: Source, ids: Tensor, settings: StreamSettings, watch: Watcher, stage: str) -> Stream:
    """Run a model's layers without changing them; the final hidden states remain in the stream."""
    stream = Stream(source, ids, replace(settings, held_back=0, outputs=True))
    layers = len(source.layers)
    watch(Progress(stage, 0, layers, "embeddings"))
    stream.tell = lambda words: watch(Progress(stage, 0, layers, f"embeddings, {words}"))
    for layer in stream:
        watch(Progress(stage, layer.index, layers))
        stream.tell = partial(_tell, watch, stage, layer.index, layers)
    watch(Progress(stage, layers, layers))
    return stream


def _tell(watch: Watcher, stage: str, layer: int, layers: int, words: str) -> None:
    watch(Progress(stage, layer, layers, words))


def finite(value: float) -> float | None:
    """The number, or None if JSON cannot represent it."""
    return value if math.isfinite(value) else None


def _head(watch: Watcher) -> Callable[[int, int], None]:
    return lambda done, total: watch(Progress("perplexity, head", done, total, unit="position"))


def _logits(
    dense: Stream, pruned: Stream, watch: Callable[[int, int], None]
) -> Iterator[tuple[Window, tuple[Tensor, ...]]]:
    """The logits of both, window by window; a shared LM head is loaded once."""
    if dense.source is pruned.source:
        yield from pruned.logits(dense.hidden, pruned.hidden, watch=watch)
    else:
        both = dense.logits(dense.hidden), pruned.logits(pruned.hidden, watch=watch)
        for (window, one), (_, other) in zip(*both, strict=True):
            yield window, one + other


def _predictions(
    tokens: Tokens, stream: Stream, window: Window, logits: tuple[Tensor, ...]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Log-probabilities of each model, float32 [positions, vocabulary], the tokens that follow, and their sequences.

    Args:
        tokens: says which tokens are scored.
        stream: has the batches that the window is a part of.
        window: some positions.
        logits: of each model, [samples, positions, vocabulary] in the window.
    """
    ids, device, place = stream.batches[window.batch], logits[0].device, (window.samples, window.positions)
    # Positions but the last of a sequence, which has no next token.
    targets, scored = ids[:, 1:][place].to(device), tokens.scored(ids)[place].to(device)
    parts = [part[:, : targets.shape[1]][scored].float().log_softmax(-1) for part in logits]
    first = sum(map(len, stream.batches[: window.batch])) + window.samples.start
    return parts, targets[scored], first + scored.nonzero()[:, 0]


def _summary(scores: Scores, tokens: Tokens, source: Source) -> Perplexity:
    samples, length = tokens.ids.shape
    count = tokens.predicted
    mean = scores.nats / count
    if not math.isfinite(mean):
        raise NumericsError(
            f"the mean negative log-likelihood of {count} tokens is {mean}",
            expected="a finite number",
            fix="set compute_dtype: float32 if activations overflow",
        )
    # math.exp raises an OverflowError instead of returning infinity.
    return Perplexity(
        math.exp(mean) if mean < _LARGEST_NATS else math.inf,
        mean,
        count,
        samples,
        length,
        tokens.digest,
        tokens.description,
        scores.calibration_error,
        dtype_name(source.dtype),
        scores.stderr,
    )
