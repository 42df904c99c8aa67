"""Mixes of texts: exact counts, validation sequences last, and sequences that alternate."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tokenizer

from llmprune.errors import CalibrationError
from llmprune.text.continuations import continuations
from llmprune.text.loading import load_tokens
from llmprune.text.mix import MixPart, TextMix, apportion, by_source, joined
from llmprune.text.tokens import TextSpec


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [
        (10, [0.5, 0.25, 0.25], [5, 3, 2]),
        (8, [1, 1, 1], [3, 3, 2]),
        (3, [0.1, 0.2, 0.7], [0, 1, 2]),
        (0, [1], [0]),
    ],
)
def test_counts_are_those_of_largest_remainders(total: int, shares: list[float], counts: list[int]) -> None:
    assert apportion(total, shares) == counts


def written(folder: Path, name: str, word: int) -> str:
    """A file of documents that repeat one word."""
    lines = [json.dumps({"text": f"w{word} " * 30})] * 12
    (folder / name).write_text("\n".join(lines))
    return str(folder / name)


def test_sequences_alternate_and_validation_sequences_come_last(tmp_path: Path) -> None:
    parts = (MixPart(written(tmp_path, "a.jsonl", 50), share=3), MixPart(written(tmp_path, "b.jsonl", 60), share=1))
    mix = TextMix(parts, samples=8, length=10).with_held_back(2)
    assert mix.counts == ([6, 2], [2, 0])
    loaded = [load_tokens(part, tokenizer()) for part in mix.parts]
    tokens = joined(mix, loaded)
    assert tokens.sources == (0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
    assert tokens.ids.shape == (10, 10)
    for (rows, part), whole in zip(by_source(tokens), loaded, strict=True):
        assert torch.equal(tokens.ids[rows], whole.ids)
        assert part.digest == whole.digest
    described = tokens.description["mix"]
    assert isinstance(described, list)
    assert [(part["share"], part["samples"]) for part in described] == [(0.75, 8), (0.25, 2)]


def test_what_makes_no_mix_is_refused() -> None:
    one = MixPart("a.jsonl")
    for parts, samples, message in (
        ((), 4, "mix is empty"),
        ((one, MixPart("a.jsonl", share=2)), 4, "same text twice"),
        ((one, MixPart(share=9)), 2, r"the text from a\.jsonl gets none"),
    ):
        with pytest.raises(CalibrationError, match=message):
            TextMix(parts, samples=samples)
    with pytest.raises(CalibrationError, match="share 0"):
        MixPart(share=0)


def test_sequences_begin_with_a_quarter_of_a_document(tmp_path: Path) -> None:
    lines = [json.dumps({"text": " ".join(f"w{word}" for word in range(start, start + 30))}) for start in (10, 50, 90)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    spec = TextSpec(continues=str(tmp_path / "text.jsonl"), samples=4, length=32)
    scripts = continuations(spec, tokenizer())
    whole = {tuple(tokenizer()([json.loads(line)["text"]])["input_ids"][0][:8]) for line in lines}
    assert len(scripts) == 4
    assert {segment for script in scripts for segment in script.segments} == whole
    assert len({script.segments[0] for script in scripts}) == 3
    assert scripts == continuations(spec, tokenizer())


def test_one_document_cannot_be_continued(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w1")
    with pytest.raises(CalibrationError, match="is one document"):
        continuations(TextSpec(continues=str(tmp_path / "text.txt")), tokenizer())
    with pytest.raises(CalibrationError, match=r"continues 'b\.jsonl' for a single file"):
        TextSpec("a.jsonl", continues="b.jsonl")
