"""Prune large language models one decoder layer at a time, keep the quality, and prove it."""

from typing import TYPE_CHECKING, Any

from llmprune.errors import MissingPackageError
from llmprune.serving.registration import register_with_transformers

if TYPE_CHECKING:
    from llmprune.errors import LlmpruneError
    from llmprune.exporting.export import export
    from llmprune.measuring.inspection import inspect_checkpoint
    from llmprune.measuring.perplexity import perplexity, perplexity_against
    from llmprune.measuring.tasks import run_tasks
    from llmprune.methods import METHODS
    from llmprune.pages import compare, write_report
    from llmprune.patterns import NM, Block, Unstructured, parse
    from llmprune.pruning.forecast.forecast import dry_run
    from llmprune.pruning.packing import pack, unpack
    from llmprune.pruning.pipeline import prune
    from llmprune.pruning.rotation.rotate import rotate
    from llmprune.recipe.recipe import Recipe, load_recipe
    from llmprune.recovery.keeping import keep_zeros
    from llmprune.recovery.options import RecoveryOptions
    from llmprune.recovery.recover import plan_recovery, recover
    from llmprune.serving.loader import load
    from llmprune.storage.archives.extracting import extract
    from llmprune.storage.archives.writing import archive
    from llmprune.storage.report import Report
    from llmprune.stream.stream import Stream
    from llmprune.text.tokens import TextSpec
    from llmprune.training.sparsify import sparsify
    from llmprune.training.train import plan_training, train

__version__ = "0.1.0"

# Resolved on first use, so that `import llmprune` and `llmprune --help` do not wait for torch. No module may have one
# of these names: once imported, it would shadow the public name.
_HOMES = {
    "TextSpec": "text.tokens",
    "LlmpruneError": "errors",
    "export": "exporting.export",
    "dry_run": "pruning.forecast.forecast",
    "run_tasks": "measuring.tasks",
    "inspect_checkpoint": "measuring.inspection",
    "METHODS": "methods",
    "pack": "pruning.packing",
    "unpack": "pruning.packing",
    "NM": "patterns",
    "Block": "patterns",
    "Unstructured": "patterns",
    "parse": "patterns",
    "perplexity": "measuring.perplexity",
    "perplexity_against": "measuring.perplexity",
    "prune": "pruning.pipeline",
    "rotate": "pruning.rotation.rotate",
    "keep_zeros": "recovery.keeping",
    "plan_recovery": "recovery.recover",
    "recover": "recovery.recover",
    "RecoveryOptions": "recovery.options",
    "Recipe": "recipe.recipe",
    "load_recipe": "recipe.recipe",
    "archive": "storage.archives.writing",
    "extract": "storage.archives.extracting",
    "Report": "storage.report",
    "load": "serving.loader",
    "sparsify": "training.sparsify",
    "plan_training": "training.train",
    "train": "training.train",
    "Stream": "stream.stream",
    "compare": "pages",
    "write_report": "pages",
}

# Deprecated names, to be removed in 0.2: `llmprune eval` runs lm-eval, whereas these measure perplexity.
_RENAMED = {"evaluate": "perplexity", "evaluate_against": "perplexity_against"}

__all__ = [
    "METHODS", "NM", "Block", "LlmpruneError", "Recipe", "RecoveryOptions", "Report", "Stream", "TextSpec",
    "Unstructured", "__version__", "archive", "compare", "dry_run", "export", "extract", "inspect_checkpoint",
    "keep_zeros", "load", "load_recipe", "pack", "parse", "perplexity", "perplexity_against", "plan_recovery",
    "plan_training", "prune", "recover", "rotate", "run_tasks", "sparsify", "train", "unpack", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        from warnings import warn

        now = _RENAMED[name]
        warn(f"llmprune.{name} will be removed in 0.2; use llmprune.{now}", DeprecationWarning, stacklevel=2)
        name = now
    if name not in _HOMES:
        raise AttributeError(f"module 'llmprune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"llmprune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _require_kernels() -> None:
    """Refuse a clone that is not installed: started in its root, Python finds it before an llmprune that is installed.

    The kernels stand beside this folder in a clone, under another name; installing maps it.
    """
    from importlib.util import find_spec

    if find_spec("llmprune.kernels") is None:
        raise MissingPackageError(
            f"llmprune is imported from {__path__[0]}, a clone that is not installed in this environment",
            expected="an installed llmprune",
            fix="start in another folder if llmprune is installed, or else install the clone (pip install -e .)",
        )


_require_kernels()
register_with_transformers()
