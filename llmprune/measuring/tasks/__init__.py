"""EleutherAI's evaluation harness, lm-eval, on any checkpoint, optionally compared with its dense model.

    from llmprune.measuring.tasks import run_tasks

    run_tasks("out/packed", ["hellaswag", "arc_easy"], against="org/model")

`python -m llmprune.measuring.tasks` is lm-eval's own command line with our model class, as `--model llmprune`.
"""

from llmprune.measuring.tasks.errors import EvaluationError
from llmprune.measuring.tasks.harness import OFFLINE_TASKS, run_tasks
from llmprune.measuring.tasks.result import EvaluationResult, HarnessSettings
from llmprune.measuring.tasks.significance import ScoreRow

__all__ = ["OFFLINE_TASKS", "EvaluationError", "EvaluationResult", "HarnessSettings", "ScoreRow", "run_tasks"]
