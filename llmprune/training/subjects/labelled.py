"""Labelled texts from files: one example a line of a .jsonl, or a row of a .csv file with a header."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.errors import CalibrationError
from llmprune.paths import user_path

_FORM = (
    'a .jsonl file with {"text": ..., "label": ...} on each line, or a .csv file with these columns; "text_pair" too'
)


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text.

    Attributes:
        text: the text, or the first of two.
        pair: the second; empty if there is none.
        label: its class, at least 0.
    """

    text: str
    pair: str
    label: int


def read_examples(source: str, classes: Mapping[str, int]) -> list[Example]:
    """Read all examples of a file.

    Args:
        source: the file.
        classes: the names of the labels and their numbers; a label may be given by either.

    Raises:
        CalibrationError: it cannot be read, is empty, or a line has no text or no known label.
    """
    path = user_path(source, CalibrationError, expected=_FORM)
    try:
        rows = _jsonl(path) if path.suffix == ".jsonl" else _csv(path) if path.suffix == ".csv" else None
        if rows is None:
            raise CalibrationError(f"{source} is no file of labelled texts", expected=_FORM)
        examples = [_example(row, classes, f"{path}:{line}") for line, row in rows]
    except (OSError, UnicodeError, csv.Error) as error:
        raise CalibrationError(f"{path} cannot be read: {error}", expected=_FORM, fix="check the path") from error
    if not examples:
        raise CalibrationError(f"{path} is empty", expected=_FORM)
    return examples


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                yield line, json.loads(text)
            except ValueError as error:
                raise CalibrationError(f"{path}:{line} is not JSON: {error}", expected=_FORM) from error


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield reader.line_num, row


def _example(row: Any, classes: Mapping[str, int], place: str) -> Example:
    text = row.get("text") if isinstance(row, dict) else None
    pair = (row.get("text_pair") or "") if isinstance(row, dict) else ""
    if not isinstance(text, str) or not isinstance(pair, str):
        raise CalibrationError(f"{place} has no text", expected=_FORM)
    if "label" not in row:
        raise CalibrationError(f"{place} has no label", expected=_FORM)
    label = row["label"]
    known = {**{str(number): number for number in classes.values()}, **classes}
    if isinstance(label, bool) or str(label) not in known:
        raise CalibrationError(
            f"{place} has the label {label!r}",
            expected=f"one of {', '.join(classes)}, or its number",
            fix="correct the file, or id2label in the model's config.json",
        )
    return Example(text, pair, known[str(label)])
