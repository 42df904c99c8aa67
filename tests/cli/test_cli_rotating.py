"""`llmprune rotate` as users call it."""

import json
import re
from pathlib import Path

import pytest
from command_line import make_plain, run
from tiny_models import build, save

TEXT = ("--samples", 4, "--length", 24, "--device", "cpu")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama-tied"), tmp_path_factory.mktemp("tied") / "model")


def test_rotate_shows_what_it_did(tied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("rotate", tied, "--output", out, "--steps", 2, "--untie", *TEXT)
    assert result.exit_code == 0, result.output
    for shown in ("32 hidden channels and values in 3 of 3 layers, learned in 2 steps", "nats/token", "16.4 kB more"):
        assert shown in result.stdout
    assert re.search(r"time +[0-9.]+ s ", result.stdout)
    assert "rotation: step 2 of 2" in result.stderr
    again = run("rotate", tied, "--output", out, "--steps", 2, "--untie", "--resume", "--json", "--quiet", *TEXT)
    assert json.loads(again.stdout)["loss"][1] < json.loads(again.stdout)["loss"][0]
    refused = run("rotate", tied, "--output", out, "--untie", *TEXT)
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr


def test_a_refusal_says_how_to_go_on(tied: Path, tmp_path: Path) -> None:
    result = run("rotate", tied, "--output", tmp_path / "out", "--json", *TEXT)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["kind"] == "ModelError"
    assert "--untie" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_needs_no_output(tied: Path) -> None:
    result = run("rotate", tied, "--dry-run", "--untie", *TEXT)
    assert result.exit_code == 0, result.output
    for shown in ("read per step", " s for all steps at least", "96 tokens", "disk"):
        assert shown in result.stdout
    plan = json.loads(run("rotate", tied, "--dry-run", "--untie", "--json", *TEXT).stdout)
    assert plan["rotated_values"] == 3


def test_options_that_contradict_each_other(tied: Path, tmp_path: Path) -> None:
    assert run("rotate", tied).exit_code == 2
    assert run("rotate", tied, "--output", tmp_path, "--resume", "--overwrite").exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "hadamard", "--steps", 500], "steps has no effect on a rotation of the kind hadamard"),
        (["--seed", 5], "seed has no effect on a rotation of the kind learned"),
        (["--kind", "random", "--seed", 2**63], "seed is 9223372036854775808"),
    ],
    ids=str,
)
def test_options_without_effect_and_out_of_range(tied: Path, options: list[object], message: str) -> None:
    refused = run("rotate", tied, "--dry-run", "--untie", *options, *TEXT)
    assert refused.exit_code == 1
    assert message in refused.stderr
    assert "pydantic" not in refused.stderr
    assert "type=" not in refused.stderr
