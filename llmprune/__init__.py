"""Prune large language models one decoder layer at a time, keep the quality, and prove it."""

from typing import TYPE_CHECKING, Any

from llmprune.registration import register_with_transformers
from llmprune.version import __version__

if TYPE_CHECKING:
    from llmprune.calibration import TextSpec
    from llmprune.errors import LlmpruneError
    from llmprune.evaluation import run_tasks
    from llmprune.forecast import dry_run
    from llmprune.inspection import inspect_checkpoint
    from llmprune.methods import METHODS
    from llmprune.packing import pack, unpack
    from llmprune.patterns import NM, Block, Unstructured, parse
    from llmprune.perplexity import evaluate, evaluate_against
    from llmprune.pipeline import prune
    from llmprune.recipe import Recipe, load_recipe
    from llmprune.report import Report
    from llmprune.serving import load
    from llmprune.stream import Stream
    from llmprune.visual import compare, write_report

# Resolved on first use, so that `import llmprune` and `llmprune --help` do not wait for torch. No module may be called
# like one of these: once it is imported, it would stand in the name's place.
_HOMES = {
    "TextSpec": "calibration",
    "LlmpruneError": "errors",
    "dry_run": "forecast",
    "run_tasks": "evaluation",
    "inspect_checkpoint": "inspection",
    "METHODS": "methods",
    "pack": "packing",
    "unpack": "packing",
    "NM": "patterns",
    "Block": "patterns",
    "Unstructured": "patterns",
    "parse": "patterns",
    "evaluate": "perplexity",
    "evaluate_against": "perplexity",
    "prune": "pipeline",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Report": "report",
    "load": "serving",
    "Stream": "stream",
    "compare": "visual",
    "write_report": "visual",
}

__all__ = [
    "METHODS", "NM", "Block", "LlmpruneError", "Recipe", "Report", "Stream", "TextSpec", "Unstructured", "__version__",
    "compare", "dry_run", "evaluate", "evaluate_against", "inspect_checkpoint", "load", "load_recipe", "pack", "parse",
    "prune", "run_tasks", "unpack", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmprune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"llmprune.{_HOMES[name]}"), name)


register_with_transformers()
