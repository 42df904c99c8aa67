"""`llmprune sweep`: what it shows, what it refuses, and how it goes on."""

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from command_line import make_plain, run
from folders import contents
from front_door import unchanged
from sweeps import on_text, states, stop_at, write_text

from llmprune.cli.console import Display
from llmprune.progress import Progress
from llmprune.storage.report import load_report


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with unchanged(tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))) as folder:
        yield folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_text(write_text(tmp_path_factory.mktemp("text")))


@pytest.fixture
def arguments(model: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    make_plain(monkeypatch)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return ["sweep", model, "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "grid"]


def test_the_command_compares_the_runs(arguments: list[Any], tmp_path: Path) -> None:
    result = run(*arguments, "--set", "pattern=0.5,2:4", "--set", "exclude=['*.q_proj', '*.k_proj'],[]")
    assert result.exit_code == 0
    report = load_report(tmp_path / "grid" / "pattern-2of4_exclude-empty")
    assert f"{report.pruned_perplexity:.2f}" in result.stdout
    assert "4 of 4 runs finished, in " in result.stdout
    assert "run 4 of 4: pattern-2of4_exclude-empty\n" in result.stderr
    assert "4/4 pruning: layer 2 of 2 in " in result.stderr


def test_json_is_the_sweep_and_quiet_is_quiet(arguments: list[Any]) -> None:
    result = run(*arguments, "--set", "pattern=0.5,2:4", "--json", "--quiet")
    assert result.stderr == ""
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ["pattern-0.5", "pattern-2of4"]
    again = run(*arguments, "--set", "pattern=0.5,2:4", "--json", "--quiet", "--resume")
    assert again.stdout == result.stdout


def test_a_failed_run_is_shown_with_its_reason(arguments: list[Any]) -> None:
    options = ["--set", "pattern=0.5,3:7"]
    result = run(*arguments, *options)
    assert result.exit_code == 1
    shown = " ".join(result.stdout.split())
    assert "pattern-3of7 failed error model.layers.0.self_attn.q_proj: pattern 3:7" in shown
    assert "1 of 2 runs finished" in shown
    last = result.stderr.splitlines()[-1]
    assert last.startswith("1 of 2 runs failed; retry them with: llmprune sweep ")
    assert shlex.split(last.partition("with: ")[2])[1:] == [*map(str, arguments), *options, "--resume"]
    as_json = json.loads(run(*arguments, *options, "--json", "--resume").stdout)
    assert as_json["rows"][1]["error"]["kind"] == "PatternError"


def test_bad_combinations_are_explained(arguments: list[Any], tmp_path: Path) -> None:
    for option in ([], ["--dry-run"]):
        result = run(*arguments, "--set", "pattern=0.5,1.5,a:b", *option, "--json")
        assert result.exit_code == 1
        assert "Error: 2 of 3 combinations cannot be run:" in result.stderr
        assert json.loads(result.stdout)["error"]["kind"] == "RecipeError"
    assert not (tmp_path / "grid").exists()


def pressing_at(stage: str) -> Callable[..., None]:
    """A display that presses Ctrl-C."""
    original = Display.__call__

    def call(self: Display, progress: Progress) -> None:
        original(self, progress)
        stop_at(stage, progress.layer)(progress)

    return call


def test_an_interrupted_command_says_how_to_go_on(
    arguments: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--set", "exclude=['*.q_proj'],[]", "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr(Display, "__call__", pressing_at("2/2 pruning"))
        result = run(*arguments, *options)
    assert result.exit_code == 130
    last = result.stderr.splitlines()[-1]
    assert last.startswith("interrupted (2/2 pruning, layer 1 of 2); continue with: llmprune sweep ")
    command = shlex.split(last.partition("continue with: ")[2])
    assert command[1:] == [*map(str, arguments), *options, "--resume"]
    assert run(*command[1:]).exit_code == 0
    assert set(states(tmp_path / "grid").values()) == {"finished"}


def test_a_dry_run_lists_the_runs_and_writes_nothing(arguments: list[Any], tmp_path: Path) -> None:
    before = contents(tmp_path)
    options = ["--set", "pattern=0.5,2:4", "--dry-run"]
    result = run(*arguments, *options)
    assert result.exit_code == 0
    for words in ("pattern-0.5", "pattern-2of4", "2 runs", "seconds (estimate)", "peak memory", "disk"):
        assert words in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    content = json.loads(run(*arguments[:4], *options, "--json").stdout)
    assert [row["name"] for row in content["rows"]] == ["pattern-0.5", "pattern-2of4"]
    assert content["peak_bytes"] > 0
    assert contents(tmp_path) == before


@pytest.mark.parametrize("options", [[], ["--output", "out", "--resume", "--overwrite"]], ids=str)
def test_wrong_usage_exits_with_2(options: list[str]) -> None:
    result = run("sweep", "x", "--recipe", "demo", *options)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


def test_help_states_how_values_are_split() -> None:
    shown = " ".join(run("sweep", "--help").stdout.replace("│", " ").split())
    assert "split at commas outside [], {} and quotes" in shown
    assert "Exit codes: 0 success; 1 " in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--jobs", "2"], "jobs are SLURM's"),
        (["--slurm", "time=10"], "needs --jobs"),
        (["--shard", "1/2", "--overwrite"], "leave --overwrite out"),
    ],
)
def test_options_of_shards_that_contradict_each_other_are_refused(
    arguments: list[Any], options: list[str], said: str
) -> None:
    result = run(*arguments, *options)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())


def test_torchrun_cannot_make_every_run_several_times(
    arguments: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(*arguments, "--set", "pattern=0.5,2:4")
    assert result.exit_code == 2
    assert "torchrun has started 2 processes" in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "grid").exists()


def test_a_dry_run_of_a_shard_lists_its_own_runs(arguments: list[Any]) -> None:
    options = ["--set", "pattern=0.5,2:4,0.6", "--json", "--dry-run"]
    content = json.loads(run(*arguments[:4], *options, "--shard", "2/2").stdout)
    assert [row["name"] for row in content["rows"]] == ["pattern-2of4"]
    assert "1 run " in run(*arguments[:4], *(option for option in options if option != "--json"), "--shard=2/2").stdout
    wrong = run(*arguments[:4], *options, "--shard", "3/2")
    assert wrong.exit_code == 1
    assert "i from 1 to n" in wrong.stderr
    folder = arguments[-1]
    folder.mkdir()
    (folder / "sweep.json").write_text("{}")
    continued = run(*arguments, *options, "--shard", "2/2")
    assert "damaged" in continued.stderr or "format" in continued.stderr, "as the run does, it reads the sweep"


def test_a_missing_package_is_said_before_the_model_is_read(
    arguments: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprune.pruning.sweep.cluster.find_spec", lambda name: None)
    monkeypatch.setattr("llmprune.pruning.sweep.sweep.resolve_model", None)
    result = run(*arguments, "--slurm", "time=10", "--jobs", "2")
    assert result.exit_code == 1
    assert "needs the package submitit" in result.stderr
