"""lm-eval's command line, with our model class registered: `python -m llmprune.evaluation run --model llmprune`."""

from llmprune.evaluation.errors import require_harness


def main() -> None:
    """Run lm-eval on the arguments of this process."""
    require_harness()
    from lm_eval.__main__ import cli_evaluate

    from llmprune.evaluation.model import register

    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
