"""Chat templates that cannot be used: said, not silent."""

from io import StringIO
from pathlib import Path

import pytest
import tiny_models
from rich.console import Console
from test_openings import CHATML

from llmprune import prune
from llmprune.cli.tables.pruning import report_table
from llmprune.text.scripts import scripts_of, template_problem


@pytest.mark.parametrize(
    ("template", "reason"),
    [("{{ raise_exception('no roles') }}", "it fails: no roles"), ("always this", "it leaves out the user's words")],
)
def test_a_chat_template_that_cannot_be_used_is_said(tmp_path: Path, template: str, reason: str) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = template
    assert len(scripts_of(tokenizer)) == 1
    problem = f"self-generated text has no conversations, because the chat template cannot be used: {reason}"
    assert template_problem(tokenizer) == problem
    told: list[str] = []
    settings = tiny_models.recipe(evaluation={"samples": 1})
    model = tiny_models.build("llama")
    report = prune(model, settings, tokenizer=tokenizer, watch=lambda progress: told.append(progress.stage))
    assert report.notes == (problem,)
    assert f"note: {problem}" in told
    shown = StringIO()
    Console(file=shown, width=300).print(report_table(report, tmp_path))
    assert f"note: {problem}" in shown.getvalue()


def test_nothing_is_said_of_templates_that_work_and_of_texts_that_are_read(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    assert template_problem(tokenizer) is None
    tokenizer.chat_template = CHATML
    assert template_problem(tokenizer) is None
    tokenizer.chat_template = "always this"
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{number % 90}" for number in range(400)))
    settings = tiny_models.recipe(calibration={"source": str(file), "samples": 2, "length": 16})
    assert prune(tiny_models.build("llama"), settings, tokenizer=tokenizer).notes == ()
