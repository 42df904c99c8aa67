"""Odd names, terminals and values: each ends in a message, never in a traceback or without a word."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import run
from tiny_models import build, recipe, save

from llmprune import load_recipe, prune
from llmprune.errors import CheckpointError, LlmpruneError, ModelError, RecipeError, ResumeError
from llmprune.measuring.inspection import inspect_checkpoint
from llmprune.serving.loader import encode, load_tokenizer
from llmprune.storage.files import read_index, write_shard


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama"), tmp_path_factory.mktemp("odd") / "model")


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["x" * 200] * 30), "a\0b"])
def test_names_that_no_file_can_have(source: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ResumeError, match="not a path that this machine can have"):
        prune(source, recipe(), tmp_path / name)
    with pytest.raises(ModelError, match=r"not a path that this machine can have|no folder"):
        prune(str(tmp_path / name), recipe(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_loop_of_links_is_no_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(LlmpruneError):
        prune(source, recipe(), tmp_path / "loop" / "out")
    with pytest.raises(LlmpruneError):
        prune(tmp_path / "loop", recipe(), tmp_path / "out")


@pytest.mark.parametrize("key", ["batch_size", "held_back"])
def test_numbers_beyond_what_torch_can_hold(key: str) -> None:
    with pytest.raises(RecipeError, match=key):
        load_recipe(recipe(**{key: 10**20}))


@pytest.mark.parametrize("pattern", ["0:4", "1.0", "100%", "1/row", "1@16x16"])
def test_a_pattern_that_leaves_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(RecipeError, match="removes every weight"):
        load_recipe(recipe(pattern=pattern))


def test_digits_of_other_scripts_are_no_pattern() -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(recipe(pattern="\u0662:\u0664"))


def test_recipes_that_are_huge_or_nested_without_end_are_refused_at_once() -> None:
    begun = time.process_time()
    with pytest.raises(RecipeError, match="10,000,"):
        load_recipe("pattern: 0.5\nmethod: wanda\ndescription: " + "x" * 10_000_000)
    with pytest.raises(RecipeError, match="nested too deep"):
        load_recipe("pattern: 0.5\nmethod: " + "[" * 5_000)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("template", ["{{ messages.x.y }}", "{% if %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"])
def test_a_chat_template_that_fails_is_named(source: Path, tmp_path: Path, template: str) -> None:
    (tmp_path / "chat.jinja").write_text(template)
    tokenizer = load_tokenizer(source, tmp_path / "chat.jinja")
    with pytest.raises(ModelError, match=r"the chat template of .* fails"):
        encode(tokenizer, "w5", chat=True)


def test_a_pipe_in_place_of_the_weights_does_not_hang(source: Path, tmp_path: Path) -> None:

    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    for read in (inspect_checkpoint, read_index):
        with pytest.raises(CheckpointError):
            read(tmp_path)
    assert run("inspect", tmp_path).exit_code == 1


def test_weights_that_may_not_be_read_are_not_called_damaged(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, *arguments: object) -> object:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="permission denied") as caught:
        read_index(source)
    assert "permissions" in caught.value.fix


def test_shards_have_the_permissions_of_other_files(tmp_path: Path) -> None:

    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            write_shard(tmp_path / "a.safetensors", {})
        finally:
            os.umask(before)
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_names_outside_the_terminal_s_encoding_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "模型").mkdir()
    program = "from llmprune.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", str(tmp_path / "模型"), "--json"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert b"\\u6a21" in done.stderr
    json.loads(done.stdout)


@pytest.mark.parametrize(
    "command",
    [
        ["report", "NAME"],
        ["compare", "NAME"],
        ["compare", ".", "--html", "NAME"],
        ["inspect", "NAME"],
        ["explain", "NAME"],
        ["pack", "NAME"],
        ["perplexity", "testbed", "--text", "NAME.txt"],
        ["prune", "testbed", "--recipe", "NAME", "--output", "out"],
        ["generate", "testbed", "--prompt", "x", "--chat-template", "NAME"],
        ["bench", "MODEL", "--output", "NAME"],
        ["eval", "testbed", "--output", "NAME"],
        ["eval", "testbed", "--include-path", "NAME"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["x" * 300, "~nobody-at-all/x"], ids=["long", "home"])
def test_paths_that_no_file_can_have_end_in_a_message(source: Path, command: list[str], name: str) -> None:
    done = run(*(part.replace("NAME", name).replace("MODEL", str(source)) for part in command))
    assert done.exit_code == 1
    assert "fix:" in done.stderr


def test_a_prompt_beyond_the_positions_is_refused_before_the_model_is_loaded(source: Path) -> None:
    done = run("generate", source, "--prompt", " ".join(["w5"] * 5000))
    assert done.exit_code == 1
    assert "a prompt of 5,000 tokens for a model with" in done.stderr
    assert "loading" not in done.stderr


def test_no_more_is_generated_than_there_are_positions(source: Path) -> None:
    positions = json.loads((source / "config.json").read_text())["max_position_embeddings"]
    prompt = " ".join(["w5"] * (positions - 3))
    done = run("generate", source, "--prompt", prompt, "--max-new-tokens", 50, "--temperature", 0, "--json", "--quiet")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["tokens"] <= 3
