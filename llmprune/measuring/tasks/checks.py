"""What can be wrong with the settings of an evaluation, found before any weights are loaded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmprune.measuring.tasks.errors import EvaluationError
from llmprune.measuring.tasks.result import HarnessSettings
from llmprune.models.boundary import load_tokenizer
from llmprune.paths import user_path


def require_settings(settings: HarnessSettings, output: Path | None) -> None:
    """Refuse settings that cannot be applied, or that would be without effect.

    Raises:
        EvaluationError: samples have no place to go, there is no such folder of tasks, or gen_kwargs cannot be read.
    """
    if settings.log_samples and output is None:
        raise EvaluationError(
            "log_samples without an output file", expected="a place for the samples", fix="add --output FILE"
        )
    if settings.include_path is not None and not user_path(settings.include_path, EvaluationError).is_dir():
        raise EvaluationError(
            f"no folder {settings.include_path}",
            expected="the folder that holds the YAML files of further tasks",
            fix="check the spelling; a single YAML file may be given as a task",
        )
    generation_options(settings.gen_kwargs)


def require_templates(names: Sequence[str], folders: Sequence[Path]) -> None:
    """Refuse models whose tokenizers have no chat template.

    Raises:
        EvaluationError: one has none.
    """
    for name, folder in zip(names, folders, strict=True):
        if load_tokenizer(folder).chat_template is None:
            raise EvaluationError(
                f"{name} has no chat template",
                expected="a model trained for chat, with its template next to the tokenizer",
                fix="evaluate it without --apply-chat-template",
            )


def generation_options(text: str | None) -> dict[str, Any] | None:
    """Read the arguments of generation as lm-eval reads them.

    Raises:
        EvaluationError: they are neither NAME=VALUE,... nor a JSON object.
    """
    if text is None:
        return None
    from lm_eval.utils import simple_parse_args_string

    try:
        options = json.loads(text) if text.lstrip().startswith("{") else simple_parse_args_string(text)
    except (ValueError, AttributeError, IndexError) as error:
        raise _unreadable(text) from error
    if not isinstance(options, dict) or not options or "" in (*options, *map(str, options.values())):
        raise _unreadable(text)
    return options


def _unreadable(text: str) -> EvaluationError:
    return EvaluationError(
        f"gen_kwargs {text!r} cannot be read",
        expected="arguments of generate such as temperature=0.7,do_sample=True, or a JSON object",
        fix="write NAME=VALUE for each, with commas between them",
    )
