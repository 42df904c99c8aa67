"""The model card: metadata that the hub reads, figures from the report, and a run that can be repeated."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from report_rows import row
from tiny_models import build, recipe, save

from llmprune import Report, load_recipe, pack, prune, unpack
from llmprune.pruning.card import write_card
from llmprune.storage.report import load_report

HEADER: dict[str, Any] = {"version": {"llmprune": "9.9"}, "evaluation": None}
MEASURED = {
    "dense": {"perplexity": 7.25, "predicted_tokens": 510, "length": 256, "text": {"source": "self"}},
    "pruned": {"perplexity": 8.125},
    "kl_divergence": 0.0625,
    "agreement": 0.75,
}


def card(folder: Path, model: str, **header: Any) -> ModelCard:
    report = Report((row(), row(pattern="2:4", method="wanda", zeros=20)), {**HEADER, **header})
    write_card(folder, model, load_recipe(recipe()), report)
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "org/name.with-dots_1"])
def test_a_hub_model_is_the_base_model(tmp_path: Path, model: str) -> None:
    assert card(tmp_path, model).data.base_model == model


@pytest.mark.parametrize("model", ["testbed", "LlamaForCausalLM", "/data/models/llama", "./llama", "../x", "a/b/c"])
def test_anything_else_is_no_base_model(tmp_path: Path, model: str) -> None:
    loaded = card(tmp_path, model)
    assert loaded.data.base_model is None
    assert "base_model" not in loaded.content


def test_a_folder_that_looks_like_a_hub_id_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert card(tmp_path, "org/name").data.base_model is None


def test_the_metadata_is_the_hub_s(tmp_path: Path) -> None:
    data = card(tmp_path, "org/name").data.to_dict()
    assert data == {
        "base_model": "org/name",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmprune", "pruned", "sparse", "sparsegpt", "wanda"],
    }


def test_the_text_says_what_was_done(tmp_path: Path) -> None:
    text = card(tmp_path, "org/name").text
    assert text.strip().startswith("# name, pruned")
    assert "75.0% of the weights of 2 matrices set to zero (0.5 by sparsegpt, 2:4 by wanda)" in text
    assert "llmprune 9.9" in text
    assert "perplexity" not in text


@pytest.mark.parametrize(
    ("source", "words"), [("self", "that the dense model wrote itself"), ("wikitext", "from `wikitext`")]
)
def test_what_was_measured_is_in_the_table(tmp_path: Path, source: str, words: str) -> None:
    measured = {**MEASURED, "dense": {**MEASURED["dense"], "text": {"source": source}}}
    text = card(tmp_path, "org/name", evaluation=measured).text
    assert "| perplexity | 7.250 | 8.125 |" in text
    assert "| KL divergence to the dense model (nats a token) | 0 | 0.0625 |" in text
    assert "| same most likely token | 100 % | 75.0% |" in text
    assert f"On 510 tokens of text {words}, in chunks of 256." in text


def test_the_recipe_and_the_command_repeat_the_run(tmp_path: Path) -> None:
    model = "my models/it's here"
    text = card(tmp_path, model).text
    written = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    command = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    assert written
    assert command
    assert load_recipe(written[1]) == load_recipe(recipe())
    assert shlex.split(command[1]) == ["llmprune", "prune", model, "--recipe", "recipe.yaml", "--output", "pruned"]


def test_a_run_writes_its_card(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    report = prune(source, recipe(evaluation={"samples": 1}), tmp_path / "pruned")
    loaded = ModelCard.load(tmp_path / "pruned" / "README.md")
    assert loaded.data.base_model is None
    assert loaded.data.tags == ["llmprune", "pruned", "sparse", "sparsegpt"]
    assert f"| {report.dense_perplexity:.3f} | {report.pruned_perplexity:.3f} |" in loaded.text


def test_packing_keeps_card_and_report_true(tmp_path: Path) -> None:
    source = save(build("llama", torch.bfloat16, hidden_size=64), tmp_path / "dense")
    pruned, packed, back = (tmp_path / name for name in ("pruned", "packed", "back"))
    prune(source, recipe(pattern="2:4"), pruned)
    report = pack(pruned, packed)
    unpack(packed, back)
    before, middle, after = (ModelCard.load(folder / "README.md").text for folder in (pruned, packed, back))
    assert "from_pretrained`, like the original." in before
    assert "from_pretrained` where llmprune is installed, after `import llmprune`." in middle
    assert middle != before == after
    sizes = [load_report(folder).header["size"] for folder in (pruned, packed, back)]
    assert sizes[1] == {"stored_bytes": report.packed_checkpoint_bytes, "dense_bytes": report.dense_checkpoint_bytes}
    assert sizes[1]["stored_bytes"] < sizes[0]["stored_bytes"] == sizes[2]["stored_bytes"]
    assert (packed / "report.html").is_file()
