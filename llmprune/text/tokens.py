"""Text in, token ids out: what calibration and evaluation read, seeded and hashed.

A `TextSpec` names the text and how it is cut into sequences of equal length:

    pack       documents are concatenated and cut into sequences; each document and each sequence begins with what the
               tokenizer itself puts in front of a text (see `openings`), which replaces the sequence's first tokens
    truncate   the first tokens of each document that is long enough, one sequence per document
    pack-bare  the earlier way of packing: a BOS token in front of each document, whether the tokenizer would put
               one there or not, and nothing in front of sequences that begin within a document

Every text becomes `Tokens`, whose digest identifies the exact ids, so that two runs can be checked to have read the
same.

Which tokens these are depends on the text, the tokenizer and the seed, never on how much is encoded at a time or on how
many sequences a forward pass takes. Batches follow from the memory of a machine: a run elsewhere, or one that is
resumed, must be calibrated and measured on the same ids, or their figures could not be compared.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from llmprune.errors import CalibrationError
from llmprune.text.chats import rendered
from llmprune.text.documents import has_columns, is_single_file, read_documents
from llmprune.text.openings import Tokenizer, encoded, named, opening_of, spelled_out
from llmprune.units import quantity

SampleLayout = Literal["pack", "truncate", "pack-bare"]
Order = Literal["text", "shuffled"]

# How much text is used where nothing says so: (sequences, sequence length). Generating and reading 128 x 2,048 tokens
# takes seconds on a GPU; on a CPU it takes over an hour even for a model of 135 million parameters.
_DEFAULTS = {"cuda": (128, 2048), "cpu": (32, 512)}

# Options without effect: on self-generated text, and on text that is read.
_UNUSED_BY_SELF = ("config", "split", "column", "layout", "order")
_UNUSED_BY_TEXT = ("temperature", "top_p", "continues")

# How many self-generated sequences a report shows, and how many letters of each.
_EXCERPTS, _EXCERPT = 3, 600

# One call of the tokenizer encodes about this much text: enough to occupy its threads, little enough to be in memory
# both as text and as ids.
_BATCH_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class TextSpec:
    """Which text, and how it is cut into sequences.

    Attributes:
        source: "self" (sampled from the dense model), a local .txt (one document), .jsonl or .parquet file, a folder of
            data files, or a dataset id of the Hugging Face hub.
        config: configuration name of the dataset, if it has several.
        split: split of the dataset; may be a slice such as "train[:10%]".
        column: the field or column that holds the text; or conversations, usually "messages" or "conversations", which
            the model's chat template turns into text.
        samples: number of sequences, at least 1. None: 128 on a GPU, 32 on a CPU.
        length: sequence length in tokens, including BOS tokens, at least 2. None: 2,048 on a GPU, 512 on a CPU, or
            the model's positions if there are fewer.
        layout: "pack", "truncate" or "pack-bare", see the module.
        order: "text" takes the first sequences and reads no document beyond them; "shuffled" draws sequences without
            replacement, from all windows of the packed text or from all documents.
        seed: seed of the draw or of the sampling, in [0, 2^63).
        temperature: of the sampling, above 0; only for "self".
        top_p: sample from the most likely tokens only, as many as have this probability together, in (0, 1]; only for
            "self".
        continues: a text of many documents, like `source`; each sequence begins with the beginning of one of them, of a
            quarter of its length at most, and the model goes on from there; only for "self", which then reads
            `config`, `split` and `column` of it. None: sequences begin with nothing of anyone's.

    Raises:
        CalibrationError: a value is out of range, or an option has no effect on this kind of source.
    """

    source: str = "self"
    config: str | None = None
    split: str = "train"
    column: str = "text"
    samples: int | None = None
    length: int | None = None
    layout: SampleLayout = "pack"
    order: Order = "shuffled"
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 0.95
    continues: str | None = None

    def __post_init__(self) -> None:
        checks = (
            ("source", bool(self.source), '"self", a file, a folder or a dataset id'),
            ("samples", self.samples is None or self.samples >= 1, "at least 1"),
            ("length", self.length is None or self.length >= 2, "at least 2 tokens: one to read and one to predict"),
            ("layout", self.layout in get_args(SampleLayout), " or ".join(get_args(SampleLayout))),
            ("order", self.order in get_args(Order), " or ".join(get_args(Order))),
            ("seed", 0 <= self.seed < 2**63, "an integer from 0 to 2^63 - 1"),
            ("temperature", 0 < self.temperature < math.inf, "a finite number above 0"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("continues", self.continues not in ("", "self"), "a file, a folder or a dataset id: texts to continue"),
        )
        for name, valid, expected in checks:
            if not valid:
                raise CalibrationError(f"{name} {getattr(self, name)!r}", expected=expected)
        kind, unused = self._ignored()
        for field in fields(self):
            if field.name in unused and getattr(self, field.name) != field.default:
                raise CalibrationError(
                    f"{field.name} {getattr(self, field.name)!r} for {kind} ({self.source})",
                    expected=f"no {field.name}: it has no effect there",
                    fix=f"remove {field.name}, or set another source",
                )

    @property
    def tokens(self) -> int:
        """The sequence length, or the default of GPUs."""
        return _DEFAULTS["cuda"][1] if self.length is None else self.length

    @property
    def sequences(self) -> int:
        """The number of sequences, or the default of GPUs."""
        return _DEFAULTS["cuda"][0] if self.samples is None else self.samples

    def fitted(self, positions: int | None, device: str) -> "TextSpec":
        """The spec with what it leaves open filled in.

        Args:
            positions: how many the model has; None: no limit.
            device: where it is computed, "cpu" or "cuda".
        """
        samples, length = _DEFAULTS.get(device, _DEFAULTS["cuda"])
        return replace(
            self,
            samples=samples if self.samples is None else self.samples,
            length=min(length, positions or length) if self.length is None else self.length,
        )

    @property
    def parts(self) -> tuple["TextSpec"]:
        """Itself; a `TextMix` has several."""
        return (self,)

    def with_held_back(self, count: int) -> "TextSpec":
        """The spec with so many sequences more, which come last."""
        return replace(self, samples=self.sequences + count)

    @property
    def origin(self) -> str:
        """Where the text comes from, in words."""
        if self.source != "self":
            return f"from {self.source}"
        return "generated by the dense model" + (f", continuing {self.continues}" if self.continues else "")

    @property
    def summary(self) -> str:
        """What is read or generated, in words."""
        return f"{quantity(self.sequences, 'sequence')} of {self.tokens:,} tokens, {self.origin}"

    def _ignored(self) -> tuple[str, tuple[str, ...]]:
        """What kind of source this is, and the options that have no effect on it."""
        if self.source == "self" and self.continues is None:
            return "self-generated text", _UNUSED_BY_SELF
        read: str = self.source
        unused: tuple[str, ...] = _UNUSED_BY_TEXT
        if self.continues is not None and self.source == "self":
            read, unused = self.continues, ("layout", "order")
        if not is_single_file(read):
            return "text that is read", unused
        return "a single file", (*unused, "config", "split", *([] if has_columns(read) else ["column"]))


# What both models are asked after a run: facts, a list, and arithmetic, in a few words.
PROMPTS = ("The capital of France is", "Three animals that live in the sea are", "Seven plus five equals")


@dataclass(frozen=True, slots=True)
class EvaluationSpec(TextSpec):
    """The text on which both models are evaluated, and what else is asked of them.

    Attributes:
        prompts: answered greedily by both models and shown in the report, where the whole model fits into memory; an
            empty list asks nothing.
    """

    prompts: tuple[str, ...] = PROMPTS


@dataclass(frozen=True, slots=True)
class Tokens:
    """Sequences of equal length, and their origin.

    Attributes:
        ids: [samples, length], int64, on the CPU.
        digest: sha256 in hex over the shape and the ids, row by row, all as little-endian int64.
        description: the source, how it was read and what was skipped; JSON-ready.
        opening: tokens that only open a sequence or a document, such as BOS: they are read, never scored.
        sources: for each sequence of a mix, the number of the text in it; empty for a single text.
    """

    ids: Int64[Tensor, "samples length"]
    digest: str
    description: dict[str, object]
    opening: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()

    @property
    def predicted(self) -> int:
        """How many tokens are scored: those that follow another one in their sequence and open nothing."""
        return int(self.scored(self.ids).sum())

    def scored(self, ids: Int64[Tensor, "batch length"]) -> Bool[Tensor, "batch positions"]:
        """For each position but the last of some of the sequences: whether the token that follows it is scored."""
        opening = torch.tensor(self.opening, dtype=ids.dtype, device=ids.device)
        return ~torch.isin(ids[:, 1:], opening)


def load_tokens(spec: TextSpec, tokenizer: Tokenizer, generate: Callable[[TextSpec], Tensor] | None = None) -> Tokens:
    """Read or generate the text that a spec names, as tokens.

    Each document begins with what the tokenizer puts in front of a text, once. Blank documents are skipped and counted.

    Args:
        spec: which text.
        tokenizer: the model's tokenizer.
        generate: samples [samples, length] token ids from the dense model; needed for the source "self".

    Raises:
        CalibrationError: the text cannot be found or read, or has too few tokens.

    Example:
        >>> load_tokens(TextSpec("notes.txt", samples=4, length=256), tokenizer).ids.shape
        torch.Size([4, 256])
    """
    if spec.source == "self":
        return _generated(spec, tokenizer, generate)
    texts = rendered(read_documents(spec.source, spec.config, spec.split, spec.column), tokenizer)
    if spec.layout == "truncate" and spec.order == "shuffled":
        texts = _shuffled(texts, spec.seed)
    reader = _Reader(texts, tokenizer, spec)
    ids = (_truncate if spec.layout == "truncate" else _pack)(reader, spec)
    description = _describe(spec, *_UNUSED_BY_TEXT) | {"opening": named(tokenizer, reader.opening)} | reader.counts
    return Tokens(ids, digest_of(ids), description, () if spec.layout == "pack-bare" else reader.opening)


def _generated(spec: TextSpec, tokenizer: Tokenizer, generate: Callable[[TextSpec], Tensor] | None) -> Tokens:
    if generate is None:
        raise CalibrationError(
            'source "self" without a model to sample from',
            fix="name a text file or a dataset, or pass a generator to load_tokens",
        )
    ids = generate(spec).to("cpu", torch.int64).contiguous()
    assert ids.shape == (spec.sequences, spec.tokens), f"generated {tuple(ids.shape)}"
    opening = opening_of(tokenizer)
    excerpts = [spelled_out(tokenizer, row)[:_EXCERPT] for row in ids[:_EXCERPTS].tolist()]
    unused = (*_UNUSED_BY_SELF, "continues") if spec.continues is None else ("layout", "order")
    description = _describe(spec, *unused) | {"opening": named(tokenizer, opening), "excerpts": excerpts}
    return Tokens(ids, digest_of(ids), description, opening)


class _Reader:
    """Encodes documents a batch at a time and counts what it read."""

    def __init__(self, texts: Iterator[str], tokenizer: Tokenizer, spec: TextSpec) -> None:
        self._texts, self._tokenizer, self._source = texts, tokenizer, spec.source
        bos = tokenizer.bos_token_id
        bare = () if bos is None else (bos,)
        self.opening = bare if spec.layout == "pack-bare" else opening_of(tokenizer)
        self.documents = self.empty = self.short = self.tokens = 0

    @property
    def counts(self) -> dict[str, object]:
        return {
            "documents_read": self.documents,
            "documents_empty": self.empty,
            "documents_short": self.short,
            "tokens_available": self.tokens,
        }

    def encode(self, *, tokens: int = sys.maxsize, documents: int = sys.maxsize) -> list[list[int]]:
        """Encode the next documents, but none beyond those that are certainly needed; empty at the end of the text.

        What is read must not depend on how documents fall into batches: the counts go into the report, and `order:
        text` promises to read no document beyond the last one used. So a batch never takes more documents than those
        that are needed whatever their ids turn out to be, and the caller asks again with what is still missing.

        Args:
            tokens: number of tokens still wanted.
            documents: number of documents still wanted.
        """
        while texts := self._take(tokens, documents):
            batch = [self._opened(ids) for ids in encoded(self._tokenizer, texts) if ids]
            self.empty += len(texts) - len(batch)
            self.tokens += sum(map(len, batch))
            if batch:
                return batch
        return []

    def _take(self, tokens: int, documents: int) -> list[str]:
        """The next documents that are not blank; none is taken if those before it might already be enough.

        A document yields at most its opening and one token per byte: this bounds how many documents may be needed.
        """
        texts: list[str] = []
        room = min(tokens, _BATCH_BYTES)
        while room > 0 and len(texts) < documents and (text := next(self._texts, None)) is not None:
            self.documents += 1
            if not text.strip():
                self.empty += 1
                continue
            try:
                room -= len(self.opening) + len(text.encode())
            except UnicodeEncodeError as error:
                raise CalibrationError(
                    f"document {self.documents} of {self._source} is not text: {error}",
                    expected="text that UTF-8 can encode",
                    fix="fix or remove the document",
                ) from None
            texts.append(text)
        return texts

    def _opened(self, ids: list[int]) -> list[int]:
        """A document after its opening, which text rendered by a chat template already has."""
        opening = list(self.opening)
        return ids if ids[: len(opening)] == opening else [*opening, *ids]


def _pack(reader: _Reader, spec: TextSpec) -> Int64[Tensor, "samples length"]:
    needed = spec.sequences * spec.tokens
    wanted = needed if spec.order == "text" else sys.maxsize
    parts: list[Tensor] = []
    while reader.tokens < wanted and (batch := reader.encode(tokens=wanted - reader.tokens)):
        # int32 is enough for every vocabulary and halves the memory: a shuffled text is held completely.
        parts.append(torch.tensor([token for ids in batch for token in ids], dtype=torch.int32))
    if reader.tokens < needed:
        raise _too_little(reader, spec, reader.tokens // spec.tokens, f"at least {needed} tokens")
    # One draw over all windows, once their number is known: each is as likely as any other, however much was encoded at
    # a time.
    windows = reader.tokens // spec.tokens
    chosen = torch.arange(windows) if spec.order == "text" else _permutation(windows, spec.seed)
    packed = torch.cat(parts)[: windows * spec.tokens].view(windows, spec.tokens)[chosen[: spec.sequences]].long()
    if spec.layout == "pack":
        # In place of tokens, not in addition: windows stay where they are, and one that begins with a document is not
        # opened twice.
        packed[:, : len(reader.opening)] = torch.tensor(reader.opening, dtype=packed.dtype)
    return packed


def _truncate(reader: _Reader, spec: TextSpec) -> Int64[Tensor, "samples length"]:
    rows: list[list[int]] = []
    while len(rows) < spec.sequences and (batch := reader.encode(documents=spec.sequences - len(rows))):
        long = [ids[: spec.tokens] for ids in batch if len(ids) >= spec.tokens]
        reader.short += len(batch) - len(long)
        rows += long
    if len(rows) < spec.sequences:
        expected = f"at least {spec.sequences} documents of {spec.tokens} tokens or more"
        raise _too_little(reader, spec, len(rows), expected)
    return torch.tensor(rows, dtype=torch.int64)


def _too_little(reader: _Reader, spec: TextSpec, possible: int, expected: str) -> CalibrationError:
    ways = [f"set samples to {possible} or fewer"] if possible else []
    ways += ["set a shorter length", *["the layout pack"] * (spec.layout == "truncate")]
    return CalibrationError(
        f"{spec.source}: {reader.tokens} tokens in {reader.documents} documents ({reader.empty} of them empty) give "
        f"{possible} of {spec.sequences} sequences of {spec.tokens} tokens",
        expected=f"{expected} for the layout {spec.layout}",
        fix=", or ".join(["add text", *ways]),
    )


def _shuffled(texts: Iterator[str], seed: int) -> Iterator[str]:
    known = list(texts)
    return (known[index] for index in _permutation(len(known), seed).tolist())


def _permutation(count: int, seed: int) -> Int64[Tensor, " count"]:
    # A generator of its own, on the CPU: no other draw in the program, and no other device, changes the samples.
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def digest_of(ids: Int[Tensor, "samples length"]) -> str:
    """sha256, in hex, of sequences: the `digest` of `Tokens`."""
    digest = hashlib.sha256()
    for part in (torch.tensor(ids.shape), ids):
        digest.update(part.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _describe(spec: TextSpec, *unused: str) -> dict[str, object]:
    return {field.name: getattr(spec, field.name) for field in fields(TextSpec) if field.name not in unused}
