"""Pruning into packed checkpoints, and reading packed checkpoints as the dense ones that they stand for."""

import json
from pathlib import Path

import pytest
import torch
from folders import same, tensors, weights_and_texts
from packed_models import save_packed
from tiny_models import build, random_ids, recipe, save, tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
from llmprune.errors import ModelError, PatternError, RecipeError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.pruning.pipeline import prune
from llmprune.recipe.recipe import load_recipe
from llmprune.storage.output import OutputFolder

IDS = random_ids(1, 10)
SIZES = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(build("llama", torch.bfloat16, **SIZES), tmp_path / "model")


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def layouts(folder: Path) -> dict[str, str]:
    record = json.loads((folder / "config.json").read_text()).get("quantization_config", {"modules": {}})
    return {name: row["layout"] for name, row in record["modules"].items()}


@pytest.mark.parametrize(
    ("stored_as", "pattern", "layout"),
    [
        ("nm", "2:4", "nm"),
        ("block", "0.5@16x16", "block"),
        ("bitmask", "2:4", "bitmask"),
        ("auto", "2:4", "nm"),
        ("auto", "4:8", "bitmask"),
        ("auto", "0.5@16x16", "block"),
        ("auto", "0.5@16x32", "bitmask"),
        ("auto", "0.7", "bitmask"),
    ],
)
def test_holds_the_same_weights_as_a_dense_checkpoint(
    model: Path, tmp_path: Path, stored_as: str, pattern: str, layout: str
) -> None:
    settings = recipe(method="magnitude", pattern=pattern)
    prune(model, settings, tmp_path / "dense")
    report = prune(model, {**settings, "format": stored_as}, tmp_path / "packed")
    assert set(layouts(tmp_path / "packed").values()) == {layout}
    assert len(layouts(tmp_path / "packed")) == len(report.rows) == 14
    assert same(logits(tmp_path / "packed"), logits(tmp_path / "dense"))
    stored = CheckpointSource(tmp_path / "packed").stored
    assert all(same(stored[key][...], tensor) for key, tensor in tensors(tmp_path / "dense").items())
    size = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    report_size = report.header["size"]
    assert report_size["stored_bytes"] == sum(tensor.nbytes for tensor in tensors(tmp_path / "packed").values())
    assert report_size["dense_bytes"] == sum(tensor.nbytes for tensor in tensors(tmp_path / "dense").values())
    assert size < sum(file.stat().st_size for file in (tmp_path / "dense").glob("*.safetensors"))


def test_leaves_other_patterns_dense(model: Path, tmp_path: Path) -> None:
    rules = [{"match": "*.mlp.*", "pattern": "0.5"}]
    prune(model, recipe(method="magnitude", pattern="2:4", rules=rules, format="nm"), tmp_path / "out")
    assert len(layouts(tmp_path / "out")) == 8
    assert not any("mlp" in name for name in layouts(tmp_path / "out"))
    assert "model.layers.0.mlp.up_proj.weight" in tensors(tmp_path / "out")
    logits(tmp_path / "out")


def test_only_linear_layers_are_packed(tmp_path: Path) -> None:
    folder = save(build("mixtral", torch.bfloat16), tmp_path / "mixtral")
    prune(folder, recipe(method="magnitude", pattern="2:4", format="nm"), tmp_path / "nm")
    prune(folder, recipe(method="magnitude", pattern="2:4"), tmp_path / "dense")
    assert same(logits(tmp_path / "nm"), logits(tmp_path / "dense"))
    assert set(layouts(tmp_path / "nm")) == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo"
    }


def test_a_model_without_linear_layers_is_not_packed(tmp_path: Path) -> None:
    folder = save(build("gpt2"), tmp_path / "gpt2")  # Conv1D
    with pytest.raises(ModelError, match="format is nm, but this checkpoint stores no linear layer"):
        prune(folder, recipe(method="magnitude", pattern="2:4", format="nm"), tmp_path / "out")


def test_resumes_to_the_same_bytes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(method="sparsegpt", pattern="2:4", format="nm")
    prune(model, settings, tmp_path / "whole")
    commit = OutputFolder.commit

    def stop_after_one(self: OutputFolder, *arguments: object) -> Path:
        shard = commit(self, *arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt(shard)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "commit", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            prune(model, settings, tmp_path / "resumed")
    prune(model, settings, tmp_path / "resumed", resume=True)
    assert weights_and_texts(tmp_path / "resumed") == weights_and_texts(tmp_path / "whole")


def test_a_packed_checkpoint_is_pruned_as_the_dense_one(tmp_path: Path) -> None:
    folder = save_packed(tmp_path, **SIZES)
    settings = recipe(method="wanda", pattern="1:4")
    prune(folder / "dense", settings, tmp_path / "from-dense")
    prune(folder / "packed", settings, tmp_path / "from-packed")
    assert layouts(tmp_path / "from-packed") == {}
    one, other = tensors(tmp_path / "from-dense"), tensors(tmp_path / "from-packed")
    assert set(one) == set(other)
    assert all(same(one[key], other[key]) for key in one)
    prune(folder / "packed", {**settings, "format": "nm"}, tmp_path / "repacked")
    assert same(logits(tmp_path / "repacked"), logits(tmp_path / "from-dense"))


def test_a_packed_checkpoint_is_inspected_as_the_dense_one(tmp_path: Path) -> None:
    folder = save_packed(tmp_path, **SIZES)
    dense, packed = (
        {row["name"]: row for row in llmprune.inspect_checkpoint(folder / name).to_dict()["tensors"]}
        for name in ("dense", "packed")
    )
    assert set(dense) == set(packed)
    row = packed["model.layers.0.mlp.up_proj.weight"]
    assert (row["pattern"], row["shape"], row["sparsity"]) == ("2:4", [96, 64], 0.5)
    assert row["bytes"] == 0.5625 * dense["model.layers.0.mlp.up_proj.weight"]["bytes"]


def test_a_model_in_memory_is_saved_packed(model: Path, tmp_path: Path) -> None:
    settings = recipe(method="magnitude", pattern="2:4")
    prune(model, settings, tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    prune(loaded, {**settings, "format": "nm"}, tmp_path / "packed")
    assert len(layouts(tmp_path / "packed")) == 14
    assert same(logits(tmp_path / "packed"), logits(tmp_path / "dense"))


def test_what_would_not_be_smaller_stays_dense(model: Path, tmp_path: Path) -> None:
    settings = recipe(method="magnitude", pattern="0.02", format="auto")
    told: list[str] = []
    for source, name in ((model, "from-folder"), (AutoModelForCausalLM.from_pretrained(model), "from-memory")):
        prune(source, settings, tmp_path / name, watch=lambda progress: told.append(progress.stage))
    assert len([stage for stage in told if stage.startswith("nothing was packed")]) == 2
    assert layouts(tmp_path / "from-folder") == layouts(tmp_path / "from-memory") == {}
    assert same(logits(tmp_path / "from-folder"), logits(tmp_path / "from-memory"))


@pytest.mark.parametrize(("stored_as", "pattern"), [("nm", "0.5"), ("block", "2:4"), ("block", "0.5@8x8")])
def test_a_format_that_stores_no_pattern_is_refused(stored_as: str, pattern: str) -> None:
    with pytest.raises(RecipeError, match=f"format is {stored_as}"):
        load_recipe(recipe(pattern=pattern, format=stored_as))


def in_memory(family: str) -> PreTrainedModel:
    model = build(family, torch.bfloat16)
    model.config._name_or_path = ""
    return model


@pytest.mark.parametrize("family", ["gemma3-vision", "gpt2"])
def test_a_model_in_memory_of_which_nothing_can_be_packed_is_refused_before_the_run(
    family: str, tmp_path: Path
) -> None:
    """By the names that `save_pretrained` would give its tensors."""
    settings = recipe(method="magnitude", pattern="2:4", format="nm")
    model = in_memory(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match="format is nm, but this checkpoint stores no linear layer"):
        prune(model, settings, tmp_path / "out", tokenizer=tokenizer())
    assert all(same(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "out").exists()
    save(model, tmp_path / "dense")
    with pytest.raises(ModelError, match="format is nm, but this checkpoint stores no linear layer"):
        prune(tmp_path / "dense", settings, tmp_path / "out")


def test_a_format_that_fits_only_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    folder = save(build("mixtral", torch.bfloat16), tmp_path / "mixtral")
    rules = [{"match": "*.experts.*", "pattern": "2:4"}]
    settings = recipe(method="magnitude", pattern="0.5", rules=rules, format="nm")
    with pytest.raises(PatternError, match=r"format is nm, but it fits none of the patterns 0\.5"):
        prune(folder, settings, tmp_path / "out")
