"""Errors of an evaluation by lm-eval, importable without lm-eval."""

from llmprune.errors import LlmpruneError


class EvaluationError(LlmpruneError):
    """Tasks that do not exist or cannot be loaded, or no lm-eval to run them."""


def require_harness() -> None:
    """Import lm-eval, which is an optional dependency.

    Raises:
        EvaluationError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise EvaluationError(
            "lm-eval is not installed",
            expected="EleutherAI's evaluation harness in the environment of llmprune",
            fix="pip install lm-eval, or llmprune with its extra eval",
        ) from error
