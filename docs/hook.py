"""Fill in the generated parts of the documentation; mkdocs calls this for every page.

A page requests a part with a comment on a line of its own, followed by the part's arguments:

    <!-- generated: fields llmprune.storage.report.MatrixRow -->

Tables of keys, options and figures therefore come from the code, the recipes and the result files, and cannot become
outdated. A part that does not exist, or finds nothing, stops the build.
"""

import re
from collections.abc import Callable
from typing import Any

from site_parts import commands, docstrings, figures, recipes

_SOURCES: tuple[dict[str, Any], ...] = (commands.PARTS, docstrings.PARTS, figures.PARTS, recipes.PARTS)
PARTS: dict[str, Callable[..., str]] = {name: part for parts in _SOURCES for name, part in parts.items()}

_MARK = re.compile(r"^<!-- generated: (\S+)((?: \S+)*) -->$", re.MULTILINE)


def expand(markdown: str) -> str:
    """Replace every mark with the part that it requests.

    Raises:
        KeyError: there is no such part.
    """
    return _MARK.sub(lambda mark: PARTS[mark[1]](*mark[2].split()), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the source of each page."""
    return expand(markdown)
