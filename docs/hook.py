"""Fill the generated parts of the documentation in: what mkdocs calls for every page.

A page asks for a part by a comment on a line of its own, with words that the part understands:

    <!-- generated: fields llmprune.storage.report.MatrixRow -->

So tables of keys, options and figures are read from the code, the recipes and the result files, and cannot grow old. A
part that does not exist, or finds nothing, stops the build.
"""

import re
from collections.abc import Callable
from typing import Any

from site_parts import commands, docstrings, figures, recipes

_SOURCES: tuple[dict[str, Any], ...] = (commands.PARTS, docstrings.PARTS, figures.PARTS, recipes.PARTS)
PARTS: dict[str, Callable[..., str]] = {name: part for parts in _SOURCES for name, part in parts.items()}

_MARK = re.compile(r"^<!-- generated: (\S+)((?: \S+)*) -->$", re.MULTILINE)


def expand(markdown: str) -> str:
    """Replace every mark by the part that it asks for.

    Raises:
        KeyError: there is no such part.
    """
    return _MARK.sub(lambda mark: PARTS[mark[1]](*mark[2].split()), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the source of each page."""
    return expand(markdown)
