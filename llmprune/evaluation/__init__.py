"""EleutherAI's evaluation harness, lm-eval, on any checkpoint, and beside the dense model.

from llmprune.evaluation import run_tasks

run_tasks("out/packed", ["hellaswag", "arc_easy"], against="org/model")

`python -m llmprune.evaluation` is lm-eval's own command line with our model class in it, as `--model llmprune`.
"""

from llmprune.evaluation.comparison import ScoreRow
from llmprune.evaluation.errors import EvaluationError
from llmprune.evaluation.harness import OFFLINE_TASKS, run_tasks
from llmprune.evaluation.result import EvaluationResult, HarnessSettings

__all__ = ["OFFLINE_TASKS", "EvaluationError", "EvaluationResult", "HarnessSettings", "ScoreRow", "run_tasks"]
