"""One self-contained HTML file with tables and interactive charts, which opens offline.

Every chart has a table of its numbers below it, for readers who cannot use the chart. The plotting library is embedded
compressed, at less than half of its size; browsers since 2023 decompress it, and older ones show the tables. It is
plotly's basic bundle, because parsing the full one takes a browser longer than everything else on the page.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any, Protocol, TypeGuard

from llmprune.pages.charts import constant

_FAILURE = "The charts need JavaScript and a browser from 2023 or later. Their numbers are in the tables."

# Table cells with more characters than this may wrap.
_LONG = 24


class Part(Protocol):
    """A part of a section."""

    def html(self) -> str:
        """Render as HTML, escaping all text."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table that scrolls if it is too wide.

    Attributes:
        columns: the column headers.
        rows: formatted cells.
        text: indices of the columns that hold text; the others hold numbers.
        caption: what the table shows; empty if a heading says so.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: tuple[int, ...] = (0,)
    caption: str = ""

    def html(self) -> str:
        head = "".join(self._cell("th", index, name) for index, name in enumerate(self.columns))
        body = "".join(
            f"<tr>{''.join(self._cell('td', index, cell) for index, cell in enumerate(row))}</tr>\n"
            for row in self.rows
        )
        caption = f"<h3>{escape(self.caption)}</h3>" if self.caption else ""
        label = escape(self.caption or f"Table by {self.columns[0]}")
        return (
            f'<div class="card">{caption}<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
            f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div></div>"
        )

    def _cell(self, tag: str, index: int, content: str) -> str:
        attributes = ' scope="col"' if tag == "th" else ""
        if index in self.text:
            attributes += ' class="text long"' if len(content) > _LONG else ' class="text"'
        return f"<{tag}{attributes}>{escape(content)}</{tag}>"


@dataclass(frozen=True, slots=True)
class Facts:
    """A list of names and values."""

    pairs: tuple[tuple[str, str], ...]

    def html(self) -> str:
        lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in self.pairs)
        return f'<dl class="card">{lines}</dl>'


@dataclass(frozen=True, slots=True)
class Tiles:
    """The key figures: (name, value, remark)."""

    tiles: tuple[tuple[str, str, str], ...]

    def html(self) -> str:
        tiles = "".join(
            f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
            f"<small>{escape(remark)}</small></div>\n"
            for name, value, remark in self.tiles
        )
        return f'<div class="tiles">{tiles}</div>'


@dataclass(frozen=True, slots=True)
class Listing:
    """Preformatted text in a collapsible block."""

    title: str
    text: str

    def html(self) -> str:
        return f'<details class="card"><summary>{escape(self.title)}</summary><pre>{escape(self.text)}</pre></details>'


@dataclass(frozen=True, slots=True)
class Lead:
    """The sentence on top."""

    text: str

    def html(self) -> str:
        return f'<p class="lead">{escape(self.text)}</p>'


@dataclass(frozen=True, slots=True)
class Note:
    """A short paragraph."""

    text: str

    def html(self) -> str:
        return f'<p class="note">{escape(self.text)}</p>'


@dataclass(frozen=True, slots=True)
class Chart:
    """An interactive chart, with its numbers in a collapsible table.

    Attributes:
        name: unique on the page; letters and hyphens.
        title: what the chart shows.
        figure: data and layout, in plotly's JSON schema.
        table: the same numbers.
        note: how to read it; may be empty.
    """

    name: str
    title: str
    figure: dict[str, Any]
    table: Table
    note: str = ""

    @property
    def drawn(self) -> bool:
        """Whether there is anything to see: a chart whose values are all equal is one sentence instead."""
        return constant(self.figure) is None

    def html(self) -> str:
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        numbers = f"<details><summary>Numbers: {escape(self.title)}</summary>{self.table.html()}</details>"
        if (value := constant(self.figure)) is not None:
            said = f"<p>{escape(value)} everywhere.</p>"
            return f'<div class="card"><h3>{escape(self.title)}</h3>{said}{numbers}</div>'
        height = int(self.figure["layout"]["height"])
        return (
            f"<figure><figcaption><h3>{escape(self.title)}</h3>{note}</figcaption>"
            f'<div class="plot" id="{self.name}" style="min-height:{height}px" role="img" '
            f'aria-label="{escape(self.title)}; the table below has its numbers"></div>'
            f"{numbers}</figure>"
        )


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and the parts below it.

    Attributes:
        name: unique on the page; letters and hyphens.
        title: the heading.
        parts: in order; a section without parts is left out.
    """

    name: str
    title: str
    parts: Sequence[Part] = field(default_factory=tuple)

    def html(self) -> str:
        parts = "\n".join(part.html() for part in self.parts)
        return f'<section id="{self.name}"><h2>{escape(self.title)}</h2>\n{parts}\n</section>'


def render(title: str, subtitle: str, sections: Iterable[Section]) -> str:
    """Render a page.

    Args:
        title: the page's title.
        subtitle: the line below the title.
        sections: in order; those without parts are left out.
    """
    shown = [section for section in sections if section.parts]
    figures = {part.name: part.figure for section in shown for part in section.parts if _is_drawn(part)}
    links = "\n".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in shown)
    body = "\n".join(section.html() for section in shown)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="llmprune">
<title>{escape(title)}</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
<header><div><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></div>
<button id="theme" type="button">Dark</button></header>
<nav aria-label="Sections">
{links}
</nav>
<main>
<p id="failure" role="alert" hidden>{_FAILURE}</p>
<noscript><p>{_FAILURE}</p></noscript>
{body}
</main>
<script type="application/json" id="figures">{_embedded(figures)}</script>
<script type="text/plain" id="plotly">{_bundle() if figures else ""}</script>
<script>
{_asset("page.js")}</script>
</body>
</html>
"""


def _is_drawn(part: Part) -> TypeGuard[Chart]:
    return isinstance(part, Chart) and part.drawn


def _embedded(content: Any) -> str:
    """JSON that cannot end its script element early, whatever names it contains."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _bundle() -> str:
    """The plotting library, compressed, in base64."""
    return base64.b64encode(files(__package__).joinpath("plotly", "plotly-basic.min.js.gz").read_bytes()).decode()


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
