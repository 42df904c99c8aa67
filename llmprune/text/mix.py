"""A mix: sequences of several texts, in given shares.

Each text gets its exact number of sequences by the method of largest remainders: the whole part of its quota, and one
more for those with the largest rest, the earlier ones first, until all are given out. Validation sequences are dealt
out by the same rule and come last. Sequences of different texts alternate, so that every stretch holds them in about
these shares, and always in the same order.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from llmprune.errors import CalibrationError
from llmprune.text.tokens import PROMPTS, TextSpec, Tokens, digest_of
from llmprune.units import quantity

_Mix = TypeVar("_Mix", bound="TextMix")


@dataclass(frozen=True, slots=True)
class MixPart(TextSpec):
    """One text of a mix, whose samples and length are those of the mix.

    Attributes:
        share: of the sequences, above 0, in proportion to the other texts' shares.
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        TextSpec.__post_init__(self)
        if not 0 < self.share < math.inf:
            raise CalibrationError(f"share {self.share!r}", expected="a finite number above 0")

    @property
    def plain(self) -> TextSpec:
        """The text without its share."""
        return TextSpec(**{field.name: getattr(self, field.name) for field in fields(TextSpec)})


@dataclass(frozen=True, slots=True)
class TextMix:
    """Several texts that are read as one.

    Attributes:
        mix: the texts, at least one, none twice.
        samples: number of sequences in all, as in `TextSpec`; each text gets at least one of them.
        length: sequence length in tokens of all texts, as in `TextSpec`.
        held_back: validation sequences in addition, at the end, at least 0.

    Raises:
        CalibrationError: a value is out of range, a text is there twice or gets no sequence.
    """

    mix: tuple[MixPart, ...]
    samples: int | None = None
    length: int | None = None
    held_back: int = 0

    def __post_init__(self) -> None:
        if not self.mix:
            raise CalibrationError("mix is empty", expected="at least one text", fix="name a source, or self")
        assert all(part.samples is part.length is None for part in self.mix), "they are the mix's"
        texts = [part.plain for part in self.mix]
        if twice := next((text for number, text in enumerate(texts) if text in texts[:number]), None):
            raise CalibrationError(
                f"mix has the same text twice, {twice.origin}",
                expected="texts that differ: the same sequences would be read twice",
                fix="raise its share instead; or give one of them another seed",
            )
        if 0 in (counts := apportion(self._size.sequences, [part.share for part in self.mix])):
            left_out = texts[counts.index(0)].origin
            raise CalibrationError(
                f"samples {self._size.sequences} are too few for the mix: the text {left_out} gets none",
                expected="at least one sequence for each text",
                fix="raise samples, or the share of this text",
            )

    @property
    def tokens(self) -> int:
        """The sequence length, or the default of GPUs."""
        return self._size.tokens

    @property
    def sequences(self) -> int:
        """The number of sequences with the validation sequences, or the default of GPUs."""
        return self._size.sequences + self.held_back

    @property
    def counts(self) -> tuple[list[int], list[int]]:
        """For each text, its sequences and its validation sequences."""
        shares = [part.share for part in self.mix]
        return apportion(self._size.sequences, shares), apportion(self.held_back, shares)

    @property
    def parts(self) -> tuple[TextSpec, ...]:
        """The texts with the number and length of their sequences; validation sequences are their last ones."""
        counts = map(sum, zip(*self.counts, strict=True))
        return tuple(
            replace(part.plain, samples=count, length=self.tokens) for part, count in zip(self.mix, counts, strict=True)
        )

    def with_held_back(self: _Mix, count: int) -> _Mix:
        """The mix with so many validation sequences more, which come last."""
        return replace(self, held_back=count)

    def fitted(self: _Mix, positions: int | None, device: str) -> _Mix:
        """The mix with what it leaves open filled in, as `TextSpec.fitted` does."""
        size = self._size.fitted(positions, device)
        return replace(self, samples=size.samples, length=size.length)

    @property
    def summary(self) -> str:
        """What is read and generated, in words."""
        parts = "; ".join(f"{part.sequences} {part.origin}" for part in self.parts)
        return f"{quantity(self.sequences, 'sequence')} of {self.tokens:,} tokens: {parts}"

    @property
    def _size(self) -> TextSpec:
        """A text that has the samples and the length of the mix."""
        return TextSpec(samples=self.samples, length=self.length)


@dataclass(frozen=True, slots=True)
class EvaluationMix(TextMix):
    """The texts on which both models are evaluated, and what else is asked of them; see `EvaluationSpec`."""

    prompts: tuple[str, ...] = PROMPTS


# A text, or several that are read as one.
Text = TextSpec | TextMix


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Divide a whole number by the method of largest remainders.

    Args:
        total: at least 0.
        shares: above 0, in any unit.

    Returns:
        Whole numbers, at least 0, whose sum is the total; of equal remainders, the first go first.

    Example:
        >>> apportion(10, [0.5, 0.25, 0.25])
        [5, 3, 2]
    """
    # As decimal fractions, which is how shares are written: 0.1 is a tenth.
    exact = [Fraction(str(share)) for share in shares]
    quotas = [total * share / sum(exact) for share in exact]
    counts = [math.floor(quota) for quota in quotas]
    first = sorted(range(len(quotas)), key=lambda number: counts[number] - quotas[number])
    for number in first[: total - sum(counts)]:
        counts[number] += 1
    return counts


def joined(spec: Text, parts: Sequence[Tokens]) -> Tokens:
    """The tokens of a text from those of its parts.

    Args:
        spec: one text, or a mix.
        parts: of each of its `parts`.
    """
    if isinstance(spec, TextSpec):
        (tokens,) = parts
        return tokens
    counted, held_back = spec.counts
    order = _alternating([0] * len(parts), counted) + _alternating(counted, held_back)
    ids = torch.stack([parts[number].ids[row] for number, row in order])
    total = sum(part.share for part in spec.mix)
    mix = [
        tokens.description | {"share": part.share / total, "digest": tokens.digest}
        for part, tokens in zip(spec.mix, parts, strict=True)
    ]
    description: dict[str, object] = {"samples": spec.sequences, "length": spec.tokens, "mix": mix}
    openings = [part.description.get("opening") for part in parts]
    if openings[0] is not None and all(opening == openings[0] for opening in openings):
        description["opening"] = openings[0]
    # One tokenizer opens all of them alike; only pack-bare is scored everywhere when it stands alone.
    opening = tuple(dict.fromkeys(token for part in parts for token in part.opening))
    return Tokens(ids, digest_of(ids), description, opening, tuple(number for number, _ in order))


def by_source(tokens: Tokens) -> list[tuple[Int64[Tensor, " sequences"], Tokens]]:
    """The texts of a mix, each with the numbers of its sequences; a single text is its own only one."""
    if not tokens.sources:
        return [(torch.arange(len(tokens.ids)), tokens)]
    sources, found = torch.tensor(tokens.sources), []
    descriptions = tokens.description["mix"]
    assert isinstance(descriptions, list)
    for number, description in enumerate(descriptions):
        rows = (sources == number).nonzero()[:, 0]
        found.append((rows, Tokens(tokens.ids[rows], description["digest"], description, tokens.opening)))
    return found


def _alternating(starts: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (text, sequence), with each text's sequences from its start on spread evenly."""
    places = [
        (Fraction(2 * row + 1, 2 * count), number, row) for number, count in enumerate(counts) for row in range(count)
    ]
    return [(number, starts[number] + row) for _, number, row in sorted(places)]
