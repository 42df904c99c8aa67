"""The old name of `llmprune.measuring.tasks`, until 0.2: also as `python -m llmprune.evaluation`."""

import runpy
import warnings

from llmprune.measuring.tasks import OFFLINE_TASKS, EvaluationError, EvaluationResult, HarnessSettings, run_tasks

__all__ = ["OFFLINE_TASKS", "EvaluationError", "EvaluationResult", "HarnessSettings", "run_tasks"]

# FutureWarning, because users of the command line see it.
warnings.warn("llmprune.evaluation is llmprune.measuring.tasks now, and goes with 0.2", FutureWarning, stacklevel=2)

if __name__ == "__main__":
    runpy.run_module("llmprune.measuring.tasks", run_name="__main__", alter_sys=True)
