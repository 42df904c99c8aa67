"""Texts of the words that the tokenizer of the tiny models knows."""

from pathlib import Path

from llmprune import TextSpec


def words(file: Path, count: int = 900) -> TextSpec:
    """Write so many words, and name them as a text in sequences of 16 tokens."""
    file.write_text(" ".join(f"w{number * number % 120 + 4}" for number in range(count)))
    return TextSpec(str(file), length=16)
