"""`llmprune eval`."""

import json
from pathlib import Path

import pytest
from command_line import make_plain, run

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)


def test_a_table_and_json(llama: Path, tasks: tuple[str, ...], tmp_path: Path) -> None:
    arguments = ["eval", llama, "--tasks", ",".join(tasks), "--device", "cpu"]
    alone = run(*arguments, "--limit", 0.5)
    assert "tiny_words" in alone.stdout
    assert "delta" not in alone.stdout
    assert f"lm-eval on {llama}" in alone.stderr
    beside = run(*arguments, "--against", llama, "--quiet", "--output", tmp_path / "eval.json", "--json")
    content = json.loads(beside.stdout)
    assert beside.stderr == ""
    assert content == json.loads((tmp_path / "eval.json").read_text())
    assert [row["documents"] for row in content["rows"]] == [8, 12, 4]
    shown = run(*arguments, "--against", llama, "--quiet").stdout
    assert f"{content['rows'][0]['value']:.4f}" in shown or f"{content['rows'][0]['value']:,.1f}" in shown
    assert "within error" in shown
    assert "paired by document" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_our_tasks_are_the_default(tmp_path: Path) -> None:
    content = json.loads(run("eval", "testbed", "--limit", 2, "--device", "cpu", "--quiet", "--json").stdout)
    assert {row["task"] for row in content["rows"]} == {"llmprune_words", "llmprune_choice", "llmprune_continue"}


def test_an_unknown_task(llama: Path) -> None:
    result = run("eval", llama, "--tasks", "llmprune_word", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["kind"] == "EvaluationError"
    assert "similar: llmprune_words" in result.stderr


@pytest.mark.parametrize(
    "option", [("--limit", "0"), ("--limit", "2.5"), ("--batch-size", "0"), ("--batch-size", "many")]
)
def test_wrong_usage(option: tuple[str, str], llama: Path) -> None:
    result = run("eval", llama, *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr
