import io
import json
import math
import os
import pty
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from folders import contents, weights_and_texts
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llmprune.cli import app
from llmprune.console import Display, Pace, spans
from llmprune.errors import LlmpruneError
from llmprune.progress import Progress
from llmprune.recipe import bundled_recipes, load_recipe

TESTBED = Path(__file__).parents[1] / "eval" / "testbed"
SMALL = [
    part
    for setting in (
        "calibration.samples=6",
        "calibration.length=24",
        "evaluation.samples=2",
        "evaluation.length=24",
        "batch_size=2",
        "held_back=1",
    )
    for part in ("--set", setting)
]
COMMAND = [sys.executable, "-c", "from llmprune.cli import main; main()"]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colours and 80 columns, whatever the tests run in."""
    for name in ("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TERM", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, hidden size 32, with a tokenizer of the words w0 to w127."""
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def pruned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pruned") / "out"
    assert run("prune", model, "--recipe", "demo", "--output", output, *SMALL).exit_code == 0
    return output


def run(*arguments: object) -> Any:
    """Run a command in this process; errors that nobody explains are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def spawn(*arguments: object, **options: Any) -> "subprocess.Popen[str]":
    """Start a command in a process of its own."""
    # As many threads as here: a run goes on only where it would give the same bits.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=environment, **streams)


def test_prune_shows_what_it_cost(model: Path, tmp_path: Path) -> None:
    result = run("prune", model, "--recipe", "demo", "--output", tmp_path / "out", *SMALL)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    shown = " ".join(result.stdout.split())
    evaluation = report["evaluation"]
    assert f"{evaluation['dense']['perplexity']:.4f} dense, {evaluation['pruned']['perplexity']:.4f} pruned" in shown
    assert f"KL divergence {evaluation['kl_divergence']:.4f} nats a token" in shown
    assert "sparsity 50.00% of 14 matrices" in shown
    assert f"mean error {report['summary']['mean_error']:.4f}" in shown
    assert "raised damping 0 matrices" in shown
    assert "expert priors 0 matrices" in shown
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
    assert f"raised damping {climbed} matrices" in shown
    assert f"expert priors {2 * 4 * 2} matrices" in shown
    assert "perplexity not measured" in shown


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
    assert ", mean error 0." in lines[0]
    assert ", ETA 0:0" in lines[0]
    assert "ETA" not in lines[1]
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
            ["4 tokens in 1 documents", "at least"],
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
        ["prune", "MODEL", "--output", "out"],
        ["prune", "MODEL", "--recipe", "demo", "--output", "out", "--resume", "--overwrite"],
        ["prune", "MODEL", "--recipe", "demo", "--output", "out", "--sparsity", "0.5"],
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

    monkeypatch.setattr("llmprune.pipeline.prune", broken)
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
    arguments = ["prune", model, "--recipe", "demo", "--set", "calibration.source=missing.txt", "--dry-run"]
    result = run(*arguments, "--output", "out")
    assert result.exit_code == 0
    assert contents(tmp_path) == {}
    for words in (
        "model.layers.0-1",
        "self_attn.q_proj",
        "sparsegpt",
        "predicted peak",
        "two forwards",
        "not looked at",
    ):
        assert words in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if str(model) not in line)
    assert run(*arguments).stdout.splitlines()[0] == result.stdout.splitlines()[0]


def test_dry_run_as_json(model: Path) -> None:
    content = json.loads(run("prune", model, "--recipe", "wanda-2of4", "--dry-run", "--json").stdout)
    assert content["sparsity"] == 0.5
    assert content["tokens"] == (128 + 4) * 2048
    assert {matrix["pattern"] for matrix in content["layers"][0]["matrices"]} == {"2:4"}


def test_dry_run_refuses_what_a_run_would_refuse(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("prune", model, "--recipe", "demo", "--set", "pattern=3:7", "--dry-run")
    assert result.exit_code == 1
    assert "model.layers.0.self_attn.q_proj: pattern 3:7" in result.stderr
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    result = run("prune", model, "--recipe", "demo", "--dry-run", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "GB for the pruned checkpoint" in result.stderr


def reference_perplexity(folder: Path, length: int, words: list[int]) -> float:
    """exp of the mean negative log-likelihood in float64, by a stock model that is loaded whole."""
    chunks = torch.tensor([1, *words])[: (len(words) + 1) // length * length].view(-1, length)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(chunks).logits.double()
    picked = logits.log_softmax(-1)[:, :-1].gather(-1, chunks[:, 1:, None])
    return math.exp(-float(picked.mean()))


def test_perplexity_of_a_text(model: Path, tmp_path: Path) -> None:
    # Words that begin with a special token, such as w12, would be cut in two.
    words = torch.randint(40, 100, (100,)).tolist()
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{word}" for word in words))
    arguments = ["perplexity", model, "--text", text, "--length", 16, "--samples", 6, "--batch-size", 4]
    content = json.loads(run(*arguments, "--json").stdout)
    assert content["perplexity"] == pytest.approx(reference_perplexity(model, 16, words), rel=1e-5)
    assert (content["samples"], content["length"], content["stride"], content["predicted_tokens"]) == (6, 16, 16, 90)
    assert content["text"]["order"] == "text"
    assert content["version"]["torch"] == torch.__version__
    table = run(*arguments)
    assert f"{content['perplexity']:.4f}" in table.stdout
    assert "perplexity: layer 2 of 2 in " in table.stderr
    rounded = json.loads(run(*arguments, "--compute-dtype", "bfloat16", "--json", "--quiet").stdout)
    assert rounded["perplexity"] != content["perplexity"]
    assert rounded["perplexity"] == pytest.approx(content["perplexity"], rel=0.05)


def test_perplexity_on_its_own_text_is_the_reports(model: Path, pruned: Path) -> None:
    arguments = ["perplexity", model, "--text", "self", "--length", 24, "--samples", 2, "--batch-size", 2]
    content = json.loads(run(*arguments, "--json").stdout)
    dense = json.loads((pruned / "report.json").read_text())["evaluation"]["dense"]
    assert content["tokens_digest"] == dense["tokens_digest"]
    assert content["perplexity"] == dense["perplexity"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", "missing.txt", "--length", "8"], "no such file or folder: missing.txt"),
        (["--text", "TEXT", "--length", "8"], "4 tokens in 1 documents"),
        (["--text", "TEXT", "--length", "8", "--split", "test"], "split 'test' for a single file"),
        (["--text", "self", "--length", "8", "--column", "content"], "column 'content' for text that the model writes"),
        (["--text", "TEXT", "--length", "2", "--samples", "1", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_mistakes_about_the_text_are_explained(model: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    text = tmp_path / "short.txt"
    text.write_text("w5 w6 w7")
    result = run("perplexity", model, *[argument.replace("TEXT", str(text)) for argument in arguments])
    assert result.exit_code == 1
    assert said in result.stderr


def test_inspect_short_checkpoints_matrix_by_matrix(pruned: Path) -> None:
    result = run("inspect", pruned)
    assert "model.layers.1" in result.stdout
    row = next(line for line in result.stdout.splitlines() if "mlp.down_proj.weight" in line)
    assert row.split() == ["mlp.down_proj.weight", "32", "x", "48", "float32", "50.00%", "0.5", "6.1", "kB"]
    assert "50.00% of the matrices in the layers" in result.stdout


def test_inspect_long_checkpoints_layer_by_layer_unless_all_is_given() -> None:
    grouped = run("inspect", TESTBED).stdout
    row = next(line for line in grouped.splitlines() if "model.layers.3" in line)
    assert row.split()[:4] == ["model.layers.3", "7", "matrices", "bfloat16"]
    assert "q_proj" not in grouped
    listed = run("inspect", "testbed", "--all").stdout
    assert listed.count("self_attn.q_proj.weight") == 8
    assert all(len(line) <= 80 for line in (grouped + listed).splitlines() if str(TESTBED) not in line)


def test_inspect_as_json(pruned: Path) -> None:
    content = json.loads(run("inspect", pruned, "--json").stdout)
    assert content["matrix_sparsity"] == pytest.approx(0.5, abs=0.02)
    assert any(row["name"] == "model.layers.0.self_attn.q_proj.weight" for row in content["tensors"])


def test_inspect_needs_no_config_and_counts_negative_zeros(tmp_path: Path) -> None:
    weight = torch.ones(64, 64)
    weight[:, ::2] = -0.0
    save_file({"a.weight": weight, "index": torch.zeros(3, dtype=torch.int64)}, tmp_path / "part.safetensors")
    result = run("inspect", tmp_path)
    assert "0.5 columns" in result.stdout
    assert "zeros stored as -0.0  2,048" in result.stdout
    assert "1 vectors and other tensors: 1 int64" in result.stdout


def test_inspect_mixed_patterns_in_a_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    half = torch.rand(64, 64).where(torch.rand(64, 64) > 0.5, torch.zeros(()))
    tensors = {
        f"h.{layer}.m{number}": half if number % 2 else torch.ones(64, 64) for layer in range(9) for number in range(4)
    }
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    row = next(line for line in run("inspect", tmp_path).stdout.splitlines() if "h.8" in line)
    assert "4 matrices" in row
    assert "2 x dense" in row


def test_inspect_mistakes_are_explained(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00")
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert str(tmp_path / "model.safetensors") in result.stderr
    assert run("inspect", tmp_path / "nothing").exit_code == 1


def test_recipes_are_listed_with_a_line_each() -> None:
    shown = " ".join(run("recipes").stdout.split())
    content = json.loads(run("recipes", "--json").stdout)
    assert content == [{"name": name, "description": line} for name, line in bundled_recipes()]
    for name, line in bundled_recipes():
        assert f"{name} {line}" in shown


def test_a_recipe_is_printed_with_every_default() -> None:
    assert load_recipe(run("recipes", "wanda-50").stdout) == load_recipe("wanda-50")
    assert load_recipe(json.loads(run("recipes", "wanda-50", "--json").stdout)) == load_recipe("wanda-50")
    result = run("recipes", "wnda-50")
    assert result.exit_code == 1
    assert "did you mean 'wanda-50'?" in result.stderr


def test_version() -> None:
    from llmprune import __version__

    assert run("--version").stdout == f"llmprune {__version__}\n"


@pytest.mark.parametrize("command", [[], ["prune"], ["perplexity"], ["inspect"], ["recipes"]], ids=" ".join)
def test_help_names_the_exit_codes(command: list[str]) -> None:
    shown = " ".join(run(*command, "--help").stdout.split())
    assert "Exit codes: 0 done; 1 " in shown
    assert "2 wrong usage; 130 interrupted" in shown


def test_every_option_has_help() -> None:
    from typer.main import get_command

    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == {"prune", "perplexity", "inspect", "recipes"}
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


def test_a_reader_that_leaves_causes_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = spawn("inspect", "testbed", "--json", stdout=writing)
    os.close(writing)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, "")


def test_live_display_on_a_terminal(model: Path, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    process = spawn("prune", model, "-r", "demo", "-o", tmp_path / "out", *SMALL, stderr=terminal)
    os.close(terminal)
    shown = b"".join(_pieces(controller)).decode()
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "layer 2 of 2" in shown
    assert ": layer" not in shown
    # What was live is gone at the end, and the results are plain.
    assert "\x1b[2K" in shown
    assert "sparsity" in stdout
    assert "\x1b" not in stdout


def _pieces(controller: int) -> Iterator[bytes]:
    try:
        while piece := os.read(controller, 65536):
            yield piece
    except OSError:  # how Linux says that the other end was closed
        pass
    finally:
        os.close(controller)


def test_pace_waits_for_a_finished_layer_and_counts_down() -> None:
    pace = Pace()
    assert pace.update(Progress("pruning", 0, 4, "statistics"), 0.0) is None
    assert pace.left(5.0) is None
    assert pace.update(Progress("pruning", 0, 4, "writing"), 9.0) is None
    assert pace.update(Progress("pruning", 1, 4, "statistics"), 10.0) == 10
    assert pace.left(10.0) == 30
    assert pace.left(14.0) == 26
    assert pace.left(99.0) == 0
    assert pace.update(Progress("pruning", 2, 4, "statistics"), 16.0) == 6
    assert pace.left(16.0) == 16
    assert pace.update(Progress("pruning", 4, 4), 20.0) == 4
    assert pace.left(20.0) is None


def test_pace_starts_again_with_every_stage() -> None:
    pace = Pace()
    pace.update(Progress("dense perplexity", 0, 2), 0.0)
    pace.update(Progress("dense perplexity", 1, 2), 1.0)
    pace.update(Progress("pruning", 0, 2), 2.0)
    assert pace.left(2.0) is None


def test_pace_does_not_count_replayed_layers() -> None:
    pace = Pace()
    pace.update(Progress("pruning", 0, 3, "replaying"), 0.0)
    pace.update(Progress("pruning", 0, 3, "advancing"), 0.1)
    pace.update(Progress("pruning", 1, 3, "statistics"), 0.2)
    assert pace.left(0.2) is None
    pace.update(Progress("pruning", 2, 3, "statistics"), 10.2)
    assert pace.left(10.2) == 10


def test_display_shows_step_error_and_eta_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", shown)
    clock = iter([0.0, 60.0, *[60.0] * 100])
    with Display(clock=lambda: next(clock)) as display:
        display(Progress("pruning", 0, 3, "statistics"))
        display(Progress("pruning", 1, 3, "solving mlp.up_proj", 0.125))
    assert "layer 2 of 3" in shown.getvalue()
    assert "ETA 2:00" in shown.getvalue()
    assert "solving mlp.up_proj" in shown.getvalue()
    assert "mean error 0.1250" in shown.getvalue()


def test_spans() -> None:
    assert spans([]) == ""
    assert spans([3]) == "3"
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_markup_in_a_message_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise LlmpruneError("[red]x[/red] [/] in [1, 2]", fix="a " * 100)

    monkeypatch.setattr("llmprune.pipeline.prune", refuse)
    result = run("prune", "m", "--recipe", "demo", "--output", tmp_path / "out")
    assert result.stderr == f"Error: [red]x[/red] [/] in [1, 2]\nfix: {'a ' * 100}\n"
