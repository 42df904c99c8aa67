"""What `llmprune compare` shows: a table for each text that runs were evaluated on."""

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from llmprune.cli.console import new_table

if TYPE_CHECKING:
    from llmprune.pages.comparison import Comparison

# The columns of a comparison that fit a width of 80; the page and the JSON have all.
_SHOWN = ("run", "recipe", "sparsity", "checkpoint size", "perplexity", "KL", "decode speed-up", "tasks")

# Words of recipes up to this length stay whole.
_LONGEST = 12


def comparison_tables(comparison: "Comparison") -> list[RenderableType]:
    """One table for each group of comparable runs, then notes on what cannot be compared."""
    parts: list[RenderableType] = []
    for text in comparison.groups:
        found = comparison.table(text)
        places = [found.columns.index(name) for name in _SHOWN if name in found.columns]
        shown = new_table(*(found.columns[place].replace(" ", "\n") for place in places), left=(0, 1))
        for column in shown.columns:
            column.no_wrap = column.justify != "left"  # numbers stay whole; names and recipes may be long
        shown.columns[1].min_width = min(max(len(word) for row in found.rows for word in row[1].split()), _LONGEST)
        for row in found.rows:
            shown.add_row(*(row[place] for place in places))
        parts += [Text(f"On {found.caption}" if text else "Without an evaluation", "bold"), shown]
    return [*parts, *(Text(note) for note in comparison.notes)]
