"""Fill in the generated parts of the documentation; mkdocs calls this for every page.

    python docs/hook.py   # fills in those of README.md, which is read without being built

A page requests a part with a comment on a line of its own, followed by the part's arguments:

    <!-- generated: fields llmprune.storage.report.MatrixRow -->

Tables of keys, options and figures therefore come from the code, the recipes and the result files, and cannot become
outdated. A part that does not exist, or finds nothing, stops the build. In README.md, what was generated stands below
its mark, down to a line <!-- end -->.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from site_parts import commands, docstrings, figures, recipes, training_figures

_SOURCES: tuple[dict[str, Any], ...] = tuple(
    room.PARTS for room in (commands, docstrings, figures, recipes, training_figures)
)
PARTS: dict[str, Callable[..., str]] = {name: part for parts in _SOURCES for name, part in parts.items()}

_MARK = re.compile(r"^<!-- generated: (\S+)((?: \S+)*) -->$", re.MULTILINE)

_FILLED = re.compile(r"^(<!-- generated: (\S+)((?: \S+)*) -->\n).*?^(?=<!-- end -->$)", re.MULTILINE | re.DOTALL)


def expand(markdown: str) -> str:
    """Replace every mark with the part that it requests.

    Raises:
        KeyError: there is no such part.
    """
    return _MARK.sub(lambda mark: PARTS[mark[1]](*mark[2].split()), markdown)


def refresh(markdown: str) -> str:
    """Generate the parts between a mark and its end anew, and keep both.

    Raises:
        KeyError: there is no such part.
    """
    return _FILLED.sub(lambda mark: f"{mark[1]}{PARTS[mark[2]](*mark[3].split())}\n", markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the source of each page."""
    return expand(markdown)


if __name__ == "__main__":
    readme = Path(__file__).parents[1] / "README.md"
    readme.write_text(refresh(readme.read_text("utf-8")), "utf-8")
