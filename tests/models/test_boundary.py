"""What transformers reads of a checkpoint: its code never runs, its tokenizer is a real one, every failure is ours."""

import ast
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SMALL, run
from fresh_processes import FreshProcesses
from tiny_models import build, recipe, save
from transformers import AutoTokenizer

import llmprune
from llmprune import TextSpec, perplexity, prune
from llmprune.errors import CheckpointError, LlmpruneError, MissingTokenizerError, ModelError
from llmprune.models import boundary
from llmprune.models.boundary import load_tokenizer, read_stock_config
from llmprune.models.checkpoint_source import CheckpointSource, find_contradiction
from llmprune.pruning.forecast.forecast import dry_run
from llmprune.serving.loader import load

PACKAGE = Path(llmprune.__file__).parent
# Calls of transformers that read a checkpoint, and by default run code that lies in it.
READERS = {"from_pretrained", "from_config", "pipeline", "get_class_from_dynamic_module"}

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(build("llama"), tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{number % 100}" for number in range(2000)))
    return str(file)


def readers(source: str) -> list[ast.Call]:
    """The calls that read a checkpoint: not those that read a record of the caller's own, or an adapter's values."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [(call, ast.unparse(call.func)) for call in calls]
    harmless = ("AutoHfQuantizer.from_config", "LoraConfig.from_pretrained")
    return [call for call, name in names if name.split(".")[-1] in READERS and name not in harmless]


def refuses_code(call: ast.Call) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    return ast.unparse(given.get("trust_remote_code", ast.Constant(None))) == "False"


def test_every_call_that_could_run_a_checkpoints_code_forbids_it() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if "eval" not in path.relative_to(PACKAGE).parts]
    assert len(files) > 150
    for path in files:
        calls = readers(path.read_text(encoding="utf-8"))
        assert not calls or path == Path(boundary.__file__), f"{path} reads a checkpoint past models.boundary"
        assert all(map(refuses_code, calls)), path
    assert len(readers(Path(boundary.__file__).read_text(encoding="utf-8"))) >= 4


@pytest.mark.parametrize(
    ("call", "safe"),
    [
        ("A.from_pretrained(f, trust_remote_code=False)", True),
        ("A.from_pretrained(f)", False),
        ("transformers.pipeline('text-generation', trust_remote_code=True)", False),
        ("A.from_config(c, **options)", False),
    ],
)
def test_unsafe_calls_are_recognised(call: str, safe: bool) -> None:
    assert [refuses_code(found) for found in readers(call)] == [safe]


def with_own_model(folder: Path) -> None:
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=auto_map)


def with_own_tokenizer(folder: Path) -> None:
    auto_map = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)


@pytest.mark.parametrize("own", [with_own_model, with_own_tokenizer])
def test_code_of_a_checkpoint_does_not_run_whatever_stdin_says(
    own: Callable[[Path], None], llama: Path, text: str, tmp_path: Path, run_fresh: FreshProcesses
) -> None:
    own(llama)
    marker, modules = tmp_path / "marker", tmp_path / "modules"
    (llama / "own.py").write_text(CODE.format(marker=str(marker)))
    options = ["--set", f"calibration.source={text}", "--set", "evaluation=null", *SMALL[:4]]
    commands = [
        ["prune", llama, "--recipe", "demo", "--output", tmp_path / "out", *options, "--set", "held_back=1"],
        ["generate", llama, "--prompt", "-"],
        ["perplexity", llama, "--text", text, "--length", 16],
    ]
    program = f"""
import io, os, sys
os.environ["HF_MODULES_CACHE"] = {str(modules)!r}
answers, answering = os.pipe()
os.write(answering, b"y\\n" * 9)
os.dup2(answers, 0)
os.close(answering)
from typer.testing import CliRunner
from llmprune.cli import app
for command in {[[str(part) for part in command] for command in commands]!r}:
    sys.stdin = io.StringIO("y\\n")
    result = CliRunner().invoke(app, command, input="y\\n")
    print(result.exit_code, "llmprune never runs" in result.output, "Do you wish" in result.output)
"""
    done = run_fresh(program)
    assert not marker.exists()
    assert done.status == 0, done.printed
    assert done.printed.split("\n")[:3] == ["1 True False"] * 3, done.printed


def test_a_known_architecture_is_read_by_transformers_even_if_its_code_lies_beside(llama: Path, tmp_path: Path) -> None:
    edit(llama / "config.json", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    (llama / "own.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    assert type(load(llama)).__module__.startswith("transformers.")
    assert prune(llama, recipe(), tmp_path / "out").sparsity == pytest.approx(0.5, abs=0.01)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("family", ["gemma2", "xglm", "openai-gpt", "qwen3", "gpt2", "gpt_neox", "llama", "bloom"])
def test_a_tokenizer_that_transformers_makes_up_is_refused(family: str, text: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build(family).save_pretrained(folder)
    for settings in ({}, {"tokenizer_config.json": "{}"}):
        for name, content in settings.items():
            (folder / name).write_text(content)
        with pytest.raises(ModelError, match="no tokenizer"):
            load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(MissingTokenizerError, match=f"no tokenizer files in {folder}"):
        load_tokenizer(folder)


def test_every_command_that_needs_a_tokenizer_says_that_there_is_none(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("gemma2").save_pretrained(folder)
    wanted = recipe(calibration={"source": text, "samples": 2, "length": 16})
    uses: list[Callable[[], Any]] = [
        lambda: prune(folder, wanted, tmp_path / "out"),
        lambda: dry_run(folder, wanted),
        lambda: perplexity(folder, TextSpec(text, samples=1, length=16)),
    ]
    for use in uses:
        with pytest.raises(MissingTokenizerError, match="no tokenizer files in"):
            use()
    assert not (tmp_path / "out").exists()
    result = run("generate", folder, "--prompt", "Once")
    assert result.exit_code == 1
    assert "no tokenizer files in" in " ".join(result.stderr.split())
    assert prune(folder, recipe(), tmp_path / "own-text").sparsity == pytest.approx(0.5, abs=0.01)


def test_a_tokenizer_with_words_is_not_taken_for_one_that_was_made_up(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(llama).get_vocab()


def test_a_tekken_tokenizer_names_the_package_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "is_mistral_common_available", lambda: False)
    folder = tmp_path / "model"
    build("mistral").save_pretrained(folder)
    (folder / "tekken.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tekken\.json, which needs the package mistral-common"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("GPTSw3Tokenizer requires the SentencePiece library"), "SentencePiece"),
        (RecursionError("maximum recursion depth exceeded"), "recursion"),
        (AttributeError("'int' object has no attribute 'get'"), "attribute 'get'"),
    ],
)
def test_whatever_reading_a_tokenizer_raises_is_named(
    llama: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(llama)
    assert "install the package that the message names" in caught.value.fix
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3-vision"])
def test_no_value_of_config_json_leads_to_a_foreign_error(family: str, tmp_path: Path) -> None:
    folder = save(build(family), tmp_path)
    good = json.loads((folder / "config.json").read_text())
    for key in good:
        for value in (0, -1, "x", [], {}, 1.5, True):
            (folder / "config.json").write_text(json.dumps({**good, key: value}))
            with contextlib.suppress(LlmpruneError):  # some values are harmless
                CheckpointSource(folder)


def test_a_value_that_no_model_can_be_built_from_is_named(llama: Path) -> None:
    edit(llama / "config.json", hidden_size="x")
    for use in (CheckpointSource, load, lambda folder: dry_run(folder, recipe())):
        with pytest.raises(ModelError, match="hidden_size"):
            use(llama)
    edit(llama / "config.json", hidden_size=0)
    problem = find_contradiction(llama)
    assert problem is not None
    assert str(llama) not in problem


def test_json_that_is_nested_without_end(llama: Path) -> None:
    (llama / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointSource(llama)


@pytest.mark.parametrize(("family", "key"), [("llama", "num_hidden_layers"), ("gemma3-vision", "vision_config")])
def test_far_more_layers_than_tensors_are_refused_at_once(family: str, key: str, tmp_path: Path) -> None:
    folder = save(build(family), tmp_path)
    count = json.loads((folder / "config.json").read_text())
    value = {**count[key], "num_hidden_layers": 1_000_000} if key == "vision_config" else 1_000_000
    edit(folder / "config.json", **{key: value})
    for use in (CheckpointSource, load, lambda folder: dry_run(folder, recipe())):
        begun = time.perf_counter()
        with pytest.raises(CheckpointError, match=r"over \d+ parameters, and the files hold \d+ tensors"):
            use(folder)
        assert time.perf_counter() - begun < 20


def test_running_out_of_memory_is_no_fault_of_the_files() -> None:
    for error in (MemoryError(), torch.OutOfMemoryError()):
        with pytest.raises(type(error)), boundary.explained("it failed", expected="", fix=""):
            raise error


def test_an_architecture_without_a_class_is_refused(llama: Path) -> None:
    edit(llama / "config.json", architectures=5)
    with pytest.raises(ModelError, match="architectures is 5"):
        read_stock_config(llama)
