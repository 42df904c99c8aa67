"""The commands that measure and list: perplexity, inspect, recipes."""

import json
import math
import os
from pathlib import Path

import pytest
import tiny_models
import torch
from command_line import SMALL, make_plain, run, spawn
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llmprune.recipe.bundled import bundled_recipes
from llmprune.recipe.recipe import load_recipe
from llmprune.training.recipe import load_train_recipe

TESTBED = Path(__file__).parents[2] / "eval" / "testbed"


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


def reference_perplexity(folder: Path, length: int, words: list[int]) -> float:
    """exp of the mean negative log-likelihood in float64, by a stock model that is loaded whole."""
    chunks = torch.tensor(words)[: len(words) // length * length].view(-1, length)
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


def test_the_length_is_fitted_to_the_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{number % 90 + 4}" for number in range(300)))
    arguments = ["perplexity", model, "--text", tmp_path / "text.txt", "--samples", 2, "--device", "cpu", "--json"]
    assert json.loads(run(*arguments).stdout)["length"] == 64  # its positions, which are fewer than 512


def test_perplexity_against_the_dense_model_is_the_reports(model: Path, pruned: Path) -> None:
    arguments = ["perplexity", pruned, "--against", model, "--text", "self", "--length", 24, "--samples", 2]
    content = json.loads(run(*arguments, "--batch-size", 2, "--json").stdout)
    reported = json.loads((pruned / "report.json").read_text())["evaluation"]
    assert {key: content[key] for key in reported} == reported
    assert content["kl_divergence"] > 0
    assert content["against"] == str(model)
    table = run(*arguments).stdout
    assert f"{reported['dense']['perplexity']:.2f} -> {reported['pruned']['perplexity']:.2f} (x" in table
    assert "KL divergence" in table


def test_models_of_other_vocabularies_are_not_compared(model: Path, tmp_path: Path) -> None:
    other = tiny_models.save(tiny_models.build("llama", vocab_size=200), tmp_path / "other")
    result = run("perplexity", other, "--against", model, "--text", "self", "--length", 24, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["kind"] == "ModelError"
    assert "has a vocabulary of 200 tokens" in result.stderr


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
        (["--text", "TEXT", "--length", "8"], "3 tokens in 1 documents"),
        (["--text", "TEXT", "--length", "8", "--split", "test"], "split 'test' for a single file"),
        (["--text", "self", "--length", "8", "--column", "content"], "column 'content' for self-generated text"),
        (["--text", "TEXT", "--length", "2", "--samples", "1", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_mistakes_about_the_text_are_explained(model: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    text = tmp_path / "short.txt"
    text.write_text("w5 w6 w7")
    result = run("perplexity", model, *[argument.replace("TEXT", str(text)) for argument in arguments])
    assert result.exit_code == 1
    assert said in result.stderr


def test_inspect_folds_layers_that_say_the_same(pruned: Path) -> None:
    result = run("inspect", pruned)
    assert "model.layers.0-1" in result.stdout
    (row,) = (line for line in result.stdout.splitlines() if "mlp.down_proj" in line)
    # The size is that of both layers.
    assert row.split() == ["mlp.down_proj", "32", "x", "48", "float32", "50.00%", "0.5", "12.3", "kB"]
    assert "50.00% in the matrices of the layers" in result.stdout


def test_inspect_lists_every_matrix_if_all_is_given() -> None:
    folded = run("inspect", TESTBED).stdout
    assert "model.layers.0-7" in folded
    assert folded.count("self_attn.q_proj ") == 1
    listed = run("inspect", "testbed", "--all").stdout
    assert listed.count("self_attn.q_proj ") == 8
    assert all(len(line) <= 80 for line in (folded + listed).splitlines() if str(TESTBED) not in line)


def test_inspect_sums_up_layers_where_all_are_different(tmp_path: Path) -> None:
    tensors = {f"h.{layer}.m{number}": torch.ones(64, 64) for layer in range(9) for number in range(4)}
    for layer in range(9):
        for number in range(4):
            tensors[f"h.{layer}.m{number}"][: layer + 1, : number + 1] = 0
    save_file(tensors, tmp_path / "model.safetensors")
    row = next(line for line in run("inspect", tmp_path).stdout.splitlines() if "h.8" in line)
    assert row.split()[:4] == ["h.8", "4", "matrices", "float32"]


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
    lines = run("inspect", tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines if line.split()[:1] and line.split()[0][0] in "hm"] == [
        "h.0-8", "m0", "m1", "m2", "m3",
    ]  # fmt: skip
    assert "dense" in next(line for line in lines if line.split()[:1] == ["m2"])


def test_inspect_mistakes_are_explained(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00")
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert str(tmp_path / "model.safetensors") in result.stderr
    assert run("inspect", tmp_path / "nothing").exit_code == 1


def test_recipes_are_listed_with_a_line_each() -> None:
    shown = " ".join(run("recipes").stdout.split())
    content = json.loads(run("recipes", "--json").stdout)
    listed = [(*one, command) for command in ("prune", "train") for one in bundled_recipes(command)]
    assert content == [{"name": name, "description": line, "command": command} for name, line, command in listed]
    for name, line, _ in listed:
        assert f"{name} {line}" in shown


def test_a_recipe_is_printed_with_every_default() -> None:
    assert load_recipe(run("recipes", "wanda-50").stdout) == load_recipe("wanda-50")
    assert load_recipe(json.loads(run("recipes", "wanda-50", "--json").stdout)) == load_recipe("wanda-50")
    assert load_train_recipe(run("recipes", "rigl-80").stdout) == load_train_recipe("rigl-80")
    assert load_train_recipe(json.loads(run("recipes", "rigl-80", "--json").stdout)) == load_train_recipe("rigl-80")
    result = run("recipes", "wnda-50")
    assert result.exit_code == 1
    assert "did you mean 'wanda-50'?" in result.stderr


def test_a_reader_that_leaves_causes_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = spawn("inspect", "testbed", "--json", stdout=writing)
    os.close(writing)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, "")
