"""Prune large language models one decoder layer at a time, keep the quality, and prove it."""

from typing import TYPE_CHECKING, Any

from llmprune.version import __version__

if TYPE_CHECKING:
    from llmprune.errors import LlmpruneError
    from llmprune.inspection import inspect_checkpoint
    from llmprune.methods import METHODS
    from llmprune.patterns import NM, Block, Unstructured, parse
    from llmprune.pipeline import prune
    from llmprune.recipe import Recipe, load_recipe
    from llmprune.report import Report
    from llmprune.stream import Stream

# Resolved on first use, so that `import llmprune` and `llmprune --help` do not wait for torch.
_HOMES = {
    "LlmpruneError": "errors",
    "inspect_checkpoint": "inspection",
    "METHODS": "methods",
    "NM": "patterns",
    "Block": "patterns",
    "Unstructured": "patterns",
    "parse": "patterns",
    "prune": "pipeline",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Report": "report",
    "Stream": "stream",
}

__all__ = [
    "METHODS", "NM", "Block", "LlmpruneError", "Recipe", "Report", "Stream", "Unstructured", "__version__",
    "inspect_checkpoint", "load_recipe", "parse", "prune",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmprune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"llmprune.{_HOMES[name]}"), name)
