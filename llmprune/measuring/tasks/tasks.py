"""Which tasks are meant, and loading them once, before any model."""

import importlib.resources
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from lm_eval.tasks import TaskManager

from llmprune.measuring.tasks.errors import EvaluationError

# Reading the thousands of other tasks of the harness takes seconds.
_OURS = "llmprune_"


def offline_folder() -> Path:
    """The folder of our own tasks, for lm-eval's `--include_path`."""
    return Path(str(importlib.resources.files("llmprune.eval.tasks")))


class Tasks(TaskManager):  # type: ignore[misc] # lm-eval is not typed
    """Tasks by their names in lm-eval, ours among them; the same objects for every model.

    Args:
        names: of tasks, groups or tags, with shell wildcards; or YAML files of tasks.

    Attributes:
        names: what they stand for.

    Raises:
        EvaluationError: a name is unknown, the data cannot be had, or a task would run code that a model writes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        known = all(name.startswith(_OURS) or _is_file(name) for name in names)
        super().__init__(include_path=str(offline_folder()), include_defaults=not known)
        self.names = list(dict.fromkeys(match for name in names for match in self._matches(name)))
        self._loaded = self._read()

    def load(self, task_list: Any) -> Any:
        """What lm-eval asks for when the model is there: it was all read before."""
        assert list(task_list) == self.names
        return self._loaded

    def _matches(self, name: str) -> list[str]:
        if _is_file(name):
            return [name]
        found: list[str] = self.match_tasks([name])
        if not found:
            near = get_close_matches(name, self.all_tasks, 5)
            raise EvaluationError(
                f"lm-eval has no task {name!r}" + (f"; near: {', '.join(near)}" if near else ""),
                expected="the name of a task, group or tag, or a YAML file",
                fix="`python -m llmprune.measuring.tasks ls tasks` lists them",
            )
        return found

    def _read(self) -> Any:
        try:
            loaded = super().load(self.names)
        except (OSError, ValueError, TypeError, KeyError, ImportError, DatasetsError) as error:
            raise EvaluationError(
                f"tasks {', '.join(self.names)} cannot be loaded: {type(error).__name__}: {error}",
                fix="pip install what is missing"
                if isinstance(error, ImportError)
                else "check the names; data come from the hub, or from its cache where there is no connection",
            ) from error
        unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
        if unsafe:
            raise EvaluationError(
                f"{', '.join(unsafe)} would run code that the model has written",
                fix="in a sandbox: python -m llmprune.measuring.tasks run --model llmprune --confirm_run_unsafe_code",
            )
        return loaded


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()
