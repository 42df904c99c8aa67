"""The names that `import llmprune` offers."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fresh_processes import TRANSFORMERS, FreshProcesses

import llmprune


@pytest.mark.parametrize("name", sorted(set(llmprune.__all__) - {"__version__"}))
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(llmprune, name)
    assert not isinstance(value, ModuleType)
    assert value is getattr(llmprune, name)


def test_planning_and_measuring_need_no_second_import() -> None:
    assert llmprune.dry_run.__module__ == "llmprune.pruning.forecast.forecast"
    assert llmprune.perplexity.__module__ == "llmprune.measuring.perplexity"
    assert llmprune.TextSpec("self").source == "self"


@pytest.mark.parametrize(("old", "new"), [("evaluate", "perplexity"), ("evaluate_against", "perplexity_against")])
def test_earlier_names_work_and_warn(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"^llmprune\.{old} will be removed .* use llmprune\.{new}$") as caught:
        assert getattr(llmprune, old) is getattr(llmprune, new)
    assert caught[0].filename == __file__
    assert old not in llmprune.__all__


def test_no_module_stands_in_the_place_of_a_name() -> None:
    """Importing `llmprune.x` puts the module x among the package's names, before anything found on demand."""
    modules = {module.name for module in pkgutil.iter_modules(llmprune.__path__)}
    assert not modules & set(llmprune.__all__)
    importlib.import_module("llmprune.pruning.forecast.forecast")
    assert callable(llmprune.dry_run)


def test_only_public_names_are_listed() -> None:
    importlib.import_module("llmprune.pruning.pipeline")
    assert dir(llmprune) == sorted(llmprune.__all__)


def test_importing_waits_for_nothing() -> None:
    code = "import sys, llmprune; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_old_name_of_the_tasks_works_and_warns(run_fresh: FreshProcesses) -> None:
    run = "runpy.run_module('llmprune.evaluation', run_name='__main__')"
    program = f"import runpy, sys; sys.argv[1:] = ['--help']; {run}"
    done = run_fresh(program, TRANSFORMERS)
    assert done.status == 0, done.printed
    assert "llmprune.evaluation is llmprune.measuring.tasks now" in done.printed
    with pytest.warns(FutureWarning, match="goes with 0.2"):
        old = importlib.import_module("llmprune.evaluation")
    assert old.run_tasks is llmprune.run_tasks


def test_a_clone_that_is_not_installed_says_so() -> None:
    """As where an engine starts in its root, with llmprune installed elsewhere."""
    clone = Path(__file__).parents[1]
    code = "import llmprune"  # -S: without site-packages, and so without what an installation has mapped
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=clone, capture_output=True, text=True, check=False)
    assert "a clone that is not installed in this environment" in done.stderr
    assert "fix: start in another folder" in done.stderr
