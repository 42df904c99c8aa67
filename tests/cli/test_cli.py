"""The command line: what it shows, what it refuses, and how an interrupted run goes on."""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
from command_line import SMALL, make_plain, run, spawn
from folders import contents, weights_and_texts

from llmprune.cli import app
from llmprune.cli.console import Display
from llmprune.progress import Progress


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, hidden size 32, with a tokenizer of the words w0 to w127."""
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def pruned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pruned") / "out"
    assert run("prune", model, "--recipe", "demo", "--output", output, *SMALL).exit_code == 0
    return output


def test_prune_shows_what_it_cost(model: Path, tmp_path: Path) -> None:
    result = run("prune", model, "--recipe", "demo", "--output", tmp_path / "out", *SMALL)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    shown = " ".join(result.stdout.split())
    evaluation = report["evaluation"]
    assert f"{evaluation['dense']['perplexity']:.2f} -> {evaluation['pruned']['perplexity']:.2f} (x" in shown
    assert f"KL divergence {evaluation['kl_divergence']:.4f} nats/token" in shown
    assert "sparsity 50.00% in 14 matrices" in shown
    assert f"relative output error {report['summary']['mean_error']:.4f} (mean)" in shown
    assert "dampening increased" not in shown
    assert "too few tokens" not in shown
    assert "predicted" in shown
    assert "measured" in shown
    assert str(tmp_path / "out" / "report.json") in "".join(result.stdout.split())
    assert "Error" not in result.stderr


def test_prune_counts_raised_dampings_and_expert_priors(tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.build("mixtral"), tmp_path / "source")
    # Fewer tokens than inputs and no damping: the Grams of the attention are singular. The experts get priors.
    settings = ["calibration.samples=1", "calibration.length=8", "evaluation=null", "method.sparsegpt.damping=0"]
    arguments = ["prune", source, "--recipe", "demo", "--output", tmp_path / "out"]
    arguments += [part for setting in settings for part in ("--set", setting)]
    rows = json.loads(run(*arguments, "--json").stdout)["rows"]
    climbed = sum(len(row["damping_tried"]) > 1 for row in rows)
    assert climbed > 0
    shown = " ".join(run(*arguments, "--resume").stdout.split())
    assert f"dampening increased for {climbed} matrices" in shown
    assert f"too few tokens for {2 * 4 * 2} matrices of experts" in shown
    assert "perplexity not measured" in shown


def test_home_is_expanded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["prune", model, "--recipe", "demo", "--output=~/out", *SMALL, "--quiet"]
    shown = run(*arguments).stdout
    assert str(tmp_path / "out" / "report.json") in "".join(shown.split())
    assert (tmp_path / "out" / "report.json").exists()
    assert "is not empty" in run(*arguments, "--dry-run").stderr


def test_json_is_exactly_the_report(model: Path, tmp_path: Path) -> None:
    result = run("prune", model, "--recipe", "demo", "--output", tmp_path / "out", *SMALL, "--json")
    assert result.stdout == (tmp_path / "out" / "report.json").read_text()


def test_set_and_device_reach_the_recipe(model: Path, tmp_path: Path) -> None:
    arguments = ["--set", "pattern=2:4", "--device", "cpu", "--json", "--quiet"]
    result = run("prune", model, "-r", "demo", "-o", tmp_path / "out", *SMALL, *arguments)
    recipe = json.loads(result.stdout)["recipe"]
    assert (recipe["pattern"], recipe["device"], recipe["calibration"]["samples"]) == ("2:4", "cpu", 6)


def test_progress_is_one_line_a_layer_on_stderr(model: Path, tmp_path: Path) -> None:
    result = run("prune", model, "--recipe", "demo", "--output", tmp_path / "out", *SMALL)
    stages = [line.partition(": layer ")[0] for line in result.stderr.splitlines() if ": layer " in line]
    assert stages == ["dense perplexity"] * 2 + ["pruning"] * 2 + ["pruned perplexity"] * 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("pruning")]
    assert lines[0].startswith("pruning: layer 1 of 2 in ")
    assert ", mean relative output error 0." in lines[0]
    # Of the whole run: the pruned model is yet to be measured when the last layer is pruned.
    assert all(", ETA 0:0" in line for line in lines)
    assert "calibration text" in result.stderr
    assert "\x1b" not in result.stderr + result.stdout


def test_quiet_leaves_stderr_empty(model: Path, tmp_path: Path) -> None:
    result = run("prune", model, "--recipe", "demo", "--output", tmp_path / "out", *SMALL, "--quiet")
    assert result.stderr == ""
    assert "perplexity" in result.stdout


def test_overwrite_and_resume(model: Path, tmp_path: Path) -> None:
    arguments = ["prune", model, "--recipe", "demo", "--output", tmp_path / "out", *SMALL, "--quiet"]
    first = run(*arguments, "--json")
    resumed = run(*arguments, "--resume", "--json")
    assert resumed.stdout == first.stdout
    replaced = run(*arguments, "--overwrite", "--json")
    assert replaced.exit_code == 0
    assert json.loads(replaced.stdout)["finished"] >= json.loads(first.stdout)["finished"]


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["no/such/folder", "--recipe", "demo"], "ModelError", ["no folder no/such/folder"]),
        (["MODEL", "--recipe", "dmo"], "RecipeError", ["no recipe 'dmo'", "did you mean 'demo'?"]),
        (["MODEL", "--recipe", "demo", "--set", "patern=0.5"], "RecipeError", ["'patern'", "did you mean 'pattern'?"]),
        (["MODEL", "--recipe", "demo", "--set", "pattern=1.5"], "RecipeError", ["sparsity 1.5", "write 0.5 or 50%"]),
        (["MODEL", "--recipe", "demo", "--set", "pattern=a:b"], "RecipeError", ["pattern 'a:b' cannot be read"]),
        (["MODEL", "--recipe", "demo", "--set", "pattern"], "RecipeError", ["--set pattern cannot be read"]),
        (["MODEL", "--recipe", "demo", "--device", "cuda:99"], "DeviceError", ["'cuda:99'", "set device: auto or cpu"]),
        (["MODEL", "--recipe", "demo", "--device", "tpu"], "RecipeError", ["--set device=tpu", "cuda:1"]),
        (
            ["MODEL", "--recipe", "demo", "--set", "pattern=3:7"],
            "PatternError",
            ["model.layers.0.self_attn.q_proj", "32 x 32", "multiple of 7", "exclude it"],
        ),
        (["MODEL", "--recipe", "demo", "--set", "exclude=['*.gate']"], "RecipeError", ["'*.gate' matches none"]),
        (
            ["MODEL", "--recipe", "demo", "--set", "calibration.source=TEXT"],
            "CalibrationError",
            ["3 tokens in 1 documents", "at least"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_are_explained(model: Path, tmp_path: Path, arguments: list[str], kind: str, said: list[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("w5 w6 w7")
    arguments = [argument.replace("MODEL", str(model)).replace("TEXT", str(text)) for argument in arguments]
    result = run("prune", *arguments, "--output", tmp_path / "out", *SMALL, "--json", "--quiet")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert list(error) == ["kind", "what", "expected", "fix"]
    assert error["kind"] == kind
    for words in said:
        assert words in result.stderr
        assert words in "\n".join(error.values())
    assert result.stderr.startswith(f"Error: {error['what']}")
    assert ("expected: " in result.stderr, "fix: " in result.stderr) == (bool(error["expected"]), bool(error["fix"]))
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_json_stdout_stays_empty_after_a_mistake(model: Path, tmp_path: Path) -> None:
    result = run("prune", model, "--recipe", "dmo", "--output", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[0] == "Error: no recipe 'dmo'; did you mean 'demo'?"


def test_a_folder_that_is_not_empty_is_refused(model: Path, pruned: Path) -> None:
    before = contents(pruned)
    for more in ([], ["--dry-run"]):
        result = run("prune", model, "--recipe", "demo", "--output", pruned, *SMALL, *more)
        assert result.exit_code == 1
        assert "is not empty" in result.stderr
        assert "continue the run with --resume, or replace it with --overwrite" in result.stderr
    assert contents(pruned) == before


def test_errors_are_red_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = run("prune", "x", "--recipe", "dmo", "--output", "out")
    assert "\x1b[1;31mError: no recipe 'dmo'" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "MODEL", "--recipe", "demo"],
        ["prune", "MODEL", "--recipe", "demo", "--output", "out", "--resume", "--overwrite"],
        ["prune", "MODEL", "--recipe", "demo", "--output", "out", "--sparsty", "0.5"],
        ["prune"],
        ["perplexity", "MODEL", "--text", "self", "--length", "1"],
        ["perplexity", "MODEL", "--text", "self", "--length", "8", "--compute-dtype", "int8"],
        ["quantize"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert result.stdout == ""
    assert contents(tmp_path) == {}


def test_unexpected_errors_keep_their_traceback(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr("llmprune.pruning.pipeline.prune", broken)
    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        run("prune", model, "--recipe", "demo", "--output", tmp_path / "out")


def interrupting(at: Callable[[Progress], bool]) -> Callable[..., None]:
    """A display that presses Ctrl-C when a step comes."""
    original = Display.__call__

    def call(self: Display, progress: Progress) -> None:
        original(self, progress)
        if at(progress):
            raise KeyboardInterrupt

    return call


def test_interrupted_runs_say_how_to_resume(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out put"
    arguments = ["prune", model, "--recipe", "demo", "--output", output, *SMALL, "--set", "exclude=['*.k_proj']"]
    with monkeypatch.context() as patched:
        patched.setattr(Display, "__call__", interrupting(lambda p: (p.stage, p.layer) == ("pruning", 1)))
        result = run(*arguments, "--overwrite", "--device", "cpu", "--json")
    assert result.exit_code == 130
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("interrupted (pruning, layer 2 of 2); continue with: llmprune prune ")
    assert "Traceback" not in result.stderr
    command = shlex.split(last.partition("continue with: ")[2])
    assert command[1:] == [*map(str, arguments), "--device", "cpu", "--json", "--resume"]
    resumed = run(*command[1:])
    assert resumed.exit_code == 0
    assert "pruning: layer 1 of 2 kept from the earlier run" in resumed.stderr
    straight = run(*arguments[:4], "--output", tmp_path / "straight", *arguments[6:], "--device", "cpu")
    assert straight.exit_code == 0
    assert weights_and_texts(output).keys() == weights_and_texts(tmp_path / "straight").keys()
    same = {name: content for name, content in weights_and_texts(output).items() if name != "README.md"}
    assert same.items() <= weights_and_texts(tmp_path / "straight").items()


@pytest.mark.parametrize(("option", "expected"), [([], ""), (["--overwrite"], " --overwrite")])
def test_interrupted_before_the_output_was_opened(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str], expected: str
) -> None:
    monkeypatch.setattr(Display, "__call__", interrupting(lambda p: p.stage == "calibration text"))
    arguments = ["prune", model, "--recipe", "demo", "--output", tmp_path / "out", "--set", "description=a [b] c"]
    result = run(*arguments, *option)
    command = f"llmprune prune {model} --recipe demo --output {tmp_path / 'out'} --set 'description=a [b] c'{expected}"
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == (
        f"interrupted (calibration text); nothing was written yet; start again with: {command}"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_sigint_exits_with_130_and_the_run_goes_on_by_the_command_it_names(tmp_path: Path) -> None:
    small = ["--set", "calibration.samples=8", "--set", "calibration.length=64", "--set", "evaluation=null"]
    process = spawn("prune", "testbed", "--recipe", "demo", "--output", tmp_path / "out", *small)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("pruning: layer 2 of 8"):
            process.send_signal(signal.SIGINT)
            break
    stdout, rest = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stdout == ""
    last = rest.splitlines()[-1]
    assert "continue with: llmprune prune testbed" in last
    assert last.endswith(" --resume")
    assert "Traceback" not in "".join(lines) + rest
    assert "\x1b" not in "".join(lines) + rest
    resumed = run(*shlex.split(last.partition("continue with: llmprune ")[2]))
    assert resumed.exit_code == 0
    assert "pruning: layer 2 of 8 kept from the earlier run" in resumed.stderr
    assert "pruning: layer 8 of 8 in " in resumed.stderr


def test_dry_run_shows_the_plan_and_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["prune", model, "--recipe", "demo", *SMALL, "--dry-run"]
    result = run(*arguments, "--output", "out")
    assert result.exit_code == 0
    assert contents(tmp_path) == {}
    for words in (
        "model.layers.0-1",
        "self_attn.q_proj",
        "sparsegpt",
        "predicted peak",
        "two forward passes",
        "does not read",
    ):
        assert words in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if str(model) not in line)
    assert run(*arguments).stdout.splitlines()[0] == result.stdout.splitlines()[0]


def test_dry_run_as_json(model: Path) -> None:
    length = ["--set", "calibration.length=64"]
    content = json.loads(run("prune", model, "--recipe", "wanda-2of4", *length, "--dry-run", "--json").stdout)
    assert content["sparsity"] == 0.5
    assert content["tokens"] == (32 + 4) * 64
    assert {matrix["pattern"] for matrix in content["layers"][0]["matrices"]} == {"2:4"}


def test_dry_run_refuses_what_a_run_would_refuse(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("prune", model, "--recipe", "demo", *SMALL, "--set", "pattern=3:7", "--dry-run")
    assert result.exit_code == 1
    assert "model.layers.0.self_attn.q_proj: pattern 3:7" in result.stderr
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    result = run("prune", model, "--recipe", "demo", *SMALL, "--dry-run", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "MB for the pruned checkpoint, its tokenizer and its report" in result.stderr


def test_version() -> None:
    from llmprune import __version__

    assert run("--version").stdout == f"llmprune {__version__}\n"


# In their groups: Prune, Measure, Deploy.
COMMANDS = (
    "prune", "recipes", "rotate", "sweep", "train", "recover", "sensitivity", "perplexity", "bench", "eval", "report",
    "compare", "inspect", "explain", "pack", "unpack", "archive", "extract", "export", "import", "generate", "serve",
)  # fmt: skip


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_names_the_exit_codes(command: list[str]) -> None:
    shown = " ".join(run(*command, "--help").stdout.split())
    assert "Exit codes: 0 success; 1 an error " in shown
    assert "2 usage error; 130 Ctrl-C" in shown


def test_every_option_has_help() -> None:
    from typer.main import get_command

    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert tuple(commands) == COMMANDS
    for command in commands.values():
        for parameter in command.params:
            assert parameter.help, f"{command.name} {parameter.name}"


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom llmprune.cli import app\n"
        "try:\n    app(['prune', '--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="pages of 2 MB are asked for on Linux")
def test_large_tensors_get_large_pages() -> None:
    program = (
        "import llmprune.cli as cli; cli.app = lambda **_: None; cli.main(); import torch; "
        "print(torch.empty(4 << 20).data_ptr() % 4096)"  # torch aligns to pages what is to have large ones
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "0\n"
