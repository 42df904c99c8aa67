"""Tables and code in Markdown that every renderer shows in the same way."""

import re
from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are Markdown, and their line breaks become spaces.

    Raises:
        ValueError: there are no rows, or a row has the wrong number of cells.
    """
    lines = [columns, ["---"] * len(columns), *rows]
    if len(lines) == 2 or any(len(line) != len(columns) for line in lines):
        raise ValueError(f"a table of {list(columns)} with {len(lines) - 2} rows")
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def code(text: str, language: str = "text") -> str:
    """A fenced block."""
    return f"```{language}\n{text.rstrip()}\n```"


def literal(value: object) -> str:
    """A value as code."""
    return f"`{value}`"


def _cell(text: str) -> str:
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    # Code spans need no escaping.
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return re.sub(r"([|*])", r"\\\1", text).replace("<", "&lt;")
