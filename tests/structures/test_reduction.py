"""Structures removed by a recipe, from text to a smaller checkpoint that stock transformers loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, recipe, save, tokenizer
from transformers import AutoModelForCausalLM

from llmprune.errors import ModelError, RecipeError, ResumeError
from llmprune.pruning.pipeline import prune
from llmprune.pruning.writing import Writer
from llmprune.recipe.recipe import load_recipe
from llmprune.storage.files import read_index
from llmprune.storage.report import load_report
from llmprune.structures.decisions import Decisions, aligned
from llmprune.structures.reduction import _renumbered


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama", num_hidden_layers=3), tmp_path_factory.mktemp("model"))


def structured(**structures: Any) -> dict[str, Any]:
    settings = recipe()
    return {k: v for k, v in settings.items() if k not in ("pattern", "method")} | {"structures": structures}


def test_ffn_channels_and_heads_go_and_stock_transformers_loads_the_rest(llama: Path, tmp_path: Path) -> None:
    text = {"evaluation": {"samples": 2, "length": 16, "prompts": []}}
    report = prune(llama, structured(ffn={"remove": 0.5}, heads={"remove": 1}) | text, tmp_path / "out")
    seconds = dict(report.header["seconds"])
    assert seconds.pop("total") > sum(seconds.values()) > seconds["speed"] > 0
    assert all(row.peak_bytes >= report.header["memory"]["baseline_bytes"] for row in report.structures)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.intermediate_size, model.config.num_key_value_heads) == (24, 1)
    assert [(row.kind, row.groups, row.kept) for row in report.structures[:2]] == [("heads", 2, 1), ("ffn", 48, 24)]
    assert report.rows == ()
    assert report.pruned_perplexity is not None
    assert load_report(tmp_path / "out").structures == report.structures
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(1, 12)[None]).logits).all()


def test_weights_are_pruned_in_what_stays(llama: Path, tmp_path: Path) -> None:
    settings = structured(ffn={"remove": 0.5}) | {"pattern": "2:4", "method": "sparsegpt", "format": "nm"}
    report = prune(llama, settings, tmp_path / "out")
    down = next(row for row in report.rows if row.name.endswith("layers.0.mlp.down_proj"))
    assert (down.shape, down.sparsity) == ((32, 24), 0.5)
    size = report.header["size"]
    assert size["stored_bytes"] < size["dense_bytes"]


def test_a_model_in_memory_becomes_smaller_itself(llama: Path, tmp_path: Path) -> None:
    settings = structured(ffn={"remove": 0.5}, heads={"remove": 1})
    prune(llama, settings, tmp_path / "streamed")
    model = AutoModelForCausalLM.from_pretrained(llama).train()
    report = prune(model, settings, tokenizer=tokenizer())
    assert model.config.intermediate_size == 24
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(report.structures) == 6
    with torch.no_grad():
        ids = torch.arange(1, 12)[None]
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")(ids).logits
        assert torch.equal(model.eval()(ids).logits, expected)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 14)


def test_a_model_in_memory_is_saved_where_asked(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    prune(model, structured(ffn={"remove": 0.5}), tmp_path / "out", tokenizer=tokenizer())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_interrupted_run_goes_on_to_the_same_bits(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = structured(ffn={"remove": 0.5}, heads={"remove": 1}) | {"pattern": 0.5, "method": "wanda"}
    whole = prune(llama, settings, tmp_path / "whole")
    commit = Writer.commit

    def stop_at_the_second(self: Writer, layer: Any, *args: Any) -> None:
        if layer.index == 1:
            raise KeyboardInterrupt
        commit(self, layer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "commit", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            prune(llama, settings, tmp_path / "resumed")
    again = prune(llama, settings, tmp_path / "resumed", resume=True)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "resumed" / shard.name).read_bytes()
    assert [row.error for row in again.structures] == [row.error for row in whole.structures]
    with pytest.raises(ResumeError, match="structures"):
        prune(llama, structured(ffn={"remove": 0.25}), tmp_path / "resumed", resume=True)


def test_bits_of_a_wider_checkpoint_survive_a_narrow_forward(llama: Path, tmp_path: Path) -> None:
    settings = structured(ffn={"remove": 0.5, "method": "magnitude-l2"}) | {"compute_dtype": "bfloat16"}
    report = prune(llama, settings, tmp_path / "out")
    dense, pruned = read_index(llama), read_index(tmp_path / "out")
    gone = next(row.removed for row in report.structures)
    assert gone is not None
    kept = [channel for channel in range(48) if channel not in gone]
    key = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(pruned[key][...], dense[key][...][kept])
    key = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(pruned[key][...], dense[key][...][:, kept])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2", "phi3", "deepseek_v3"])
def test_other_architectures_shrink_too(family: str, tmp_path: Path) -> None:
    folder = save(build(family), tmp_path / "model")
    report = prune(folder, structured(ffn={"remove": 0.5, "multiple": 4}), tmp_path / "out")
    assert all(0 < row.kept < row.groups for row in report.structures)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.num_parameters() < AutoModelForCausalLM.from_pretrained(folder).num_parameters()


def test_experts_go_with_their_rows_of_the_router(tmp_path: Path) -> None:
    folder = save(build("mixtral"), tmp_path / "model")
    report = prune(folder, structured(experts={"remove": 0.5}), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_local_experts == 2
    assert {row.kind for row in report.structures} == {"experts"}


def test_what_is_not_there_cannot_go(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no experts"):
        prune(llama, structured(experts={"remove": 0.5}), tmp_path / "out")
    with pytest.raises(RecipeError, match="removes 48 of 48 groups"):
        prune(llama, structured(ffn={"remove": 48}), tmp_path / "out")
    with pytest.raises(RecipeError, match="removes 0 of 2 groups"):
        prune(llama, structured(heads={"remove": 0.1}), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"removes 32 of 32 hidden channels"):
        prune(llama, structured(width={"remove": 32}), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"ffn\.multiple is 1000, but there are only 48 channels"):
        prune(llama, structured(ffn={"remove": 0.25, "multiple": 1000}), tmp_path / "out")
    with pytest.raises(RecipeError, match="removes 4 of 4 groups") as caught:
        prune(llama, structured(heads={"remove": 2, "unit": "query-head"}), tmp_path / "out")
    assert caught.value.expected == "between 1 and 1 of each of 2 partitions"
    assert caught.value.fix.endswith("such as 1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "structures", [{"attention": {"remove": 1}}, {"mlp": {"remove": 1}}, {"ffn": {}, "budget": {"remove": 0.2}}]
)
def test_an_uneven_model_in_memory_says_so_where_it_is_saved(
    llama: Path, tmp_path: Path, structures: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    prune(model, structured(**structures))
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_flap_without_a_bias_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = save(build("mistral"), tmp_path / "model")
    section = {"remove": 0.5, "method": "flap"}
    with pytest.raises(ModelError, match="has no bias"):
        prune(folder, structured(ffn={**section, "compensate": True}), tmp_path / "out")
    # Elsewhere a refit makes up for it, unless the recipe says otherwise.
    report = prune(folder, structured(ffn=section), tmp_path / "without")
    assert {(row.refit, row.compensated) for row in report.structures} == {(True, False)}
    report = prune(folder, structured(ffn={**section, "refit": False}), tmp_path / "plain")
    assert {(row.refit, row.compensated) for row in report.structures} == {(False, False)}


def test_flap_moves_the_mean_into_the_bias(llama: Path, tmp_path: Path) -> None:
    section = {"remove": 0.5, "method": "flap"}
    reports = {
        compensate: prune(llama, structured(ffn={**section, "compensate": compensate}), tmp_path / str(compensate))
        for compensate in (True, False)
    }
    assert reports[True].structures[0].compensated
    assert not reports[False].structures[0].compensated
    key = "model.layers.0.mlp.down_proj.bias"
    dense = read_index(llama)[key][...]
    assert torch.equal(read_index(tmp_path / "False")[key][...], dense)
    assert not torch.equal(read_index(tmp_path / "True")[key][...], dense)
    assert reports[True].structures[0].removed == reports[False].structures[0].removed


def test_the_decisions_survive_json() -> None:
    decisions = Decisions((0, 2), {0: {"mlp.down_proj.weight": 3}}, {0: {"mlp.down_proj.weight": ((1, 2, 5),)}})
    assert Decisions.from_dict(json.loads(json.dumps(decisions.to_dict()))) == decisions


def test_widths_are_aligned_where_that_is_near() -> None:
    assert [aligned(14336, kept, "auto") for kept in (10752, 7168, 12500)] == [10752, 7168, 12544]
    assert (aligned(704, 528, "auto"), aligned(704, 528, 1), aligned(704, 528, 100)) == (512, 528, 500)
    assert aligned(48, 24, "auto") == 24
    assert aligned(10, 5, "auto") == 5


def test_only_the_layer_s_number_changes_in_keys() -> None:
    keys = ["transformer.h.3.attn.3.weight", "transformer.h.3.mlp.weight"]
    renamed = _renumbered(dict.fromkeys(keys, torch.zeros(1)), 3, 1)
    assert list(renamed) == ["transformer.h.1.attn.3.weight", "transformer.h.1.mlp.weight"]


def test_the_recipe_is_in_the_report(llama: Path, tmp_path: Path) -> None:
    settings = structured(ffn={"remove": 0.5})
    assert prune(llama, settings, tmp_path / "out").header["recipe"] == load_recipe(settings).to_dict()
