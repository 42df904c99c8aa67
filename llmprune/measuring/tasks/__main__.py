"""lm-eval's own command line with our model class: `python -m llmprune.measuring.tasks run --model llmprune`."""

from llmprune.measuring.tasks.errors import require_harness


def main() -> None:
    """Run lm-eval on the arguments of this process."""
    require_harness()
    from lm_eval.__main__ import cli_evaluate

    from llmprune.measuring.tasks.model import register

    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
