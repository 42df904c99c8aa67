"""Decisions that measure the dense model first: depth, blocks, width, gradients and budgets."""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reduction import structured
from tiny_models import build, random_ids, save
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmprune.errors import ModelError, PatternError, RecipeError
from llmprune.models.decoder import Decoder
from llmprune.pruning.forecast.forecast import dry_run
from llmprune.pruning.pipeline import prune
from llmprune.pruning.writing import Writer
from llmprune.storage.report import Report, load_report
from llmprune.structures.find.discovery import find_structures
from llmprune.structures.remove.cuts import Cut, mask, routed_without

IDS = random_ids(2, 12)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama", num_hidden_layers=4), tmp_path_factory.mktemp("model"))


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS, use_cache=False).logits


def kept_layers(report: Report) -> list[int]:
    return list(report.header["decisions"]["layers"])


@pytest.mark.parametrize("method", ["block-influence", "angular", "kl"])
def test_layers_that_go_are_as_if_they_had_not_been_there(llama: Path, tmp_path: Path, method: str) -> None:
    report = prune(llama, structured(depth={"remove": 2, "method": method}), tmp_path / "out")
    kept = kept_layers(report)
    assert len(kept) == 2
    assert report.header["extent"]["pruned"]["layers"] == 2
    dense = AutoModelForCausalLM.from_pretrained(llama)
    dense.model.layers = torch.nn.ModuleList(dense.model.layers[layer] for layer in kept)
    with torch.no_grad():
        expected = dense(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(logits(tmp_path / "out"), expected)


def test_the_last_layers_can_be_protected(llama: Path, tmp_path: Path) -> None:
    report = prune(llama, structured(depth={"remove": 3, "protect": 1}), tmp_path / "out")
    assert kept_layers(report) == [3]
    with pytest.raises(RecipeError):
        prune(llama, structured(depth={"remove": 4}), tmp_path / "none")


def test_depth_width_and_channels_go_together_and_weights_after_them(llama: Path, tmp_path: Path) -> None:
    settings = structured(depth={"remove": 1}, width={"remove": 0.5}, ffn={"remove": 0.5}, heads={"remove": 1})
    report = prune(llama, settings | {"pattern": "2:4", "method": "sparsegpt"}, tmp_path / "out")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    shape = config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_key_value_heads
    assert shape == (3, 16, 24, 1)
    assert {row.layer for row in report.rows} == {f"model.layers.{layer}" for layer in range(3)}
    assert report.sparsity == 0.5
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_an_interrupted_run_goes_on_with_what_it_had_decided(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = structured(depth={"remove": 1}, width={"remove": 0.5}, ffn={"remove": 0.5, "method": "taylor"})
    prune(llama, settings, tmp_path / "whole")
    commit = Writer.commit

    def stop_at_the_third(self: Writer, layer: Any, *args: Any) -> None:
        if layer.index == 2:
            raise KeyboardInterrupt
        commit(self, layer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "commit", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            prune(llama, settings, tmp_path / "resumed")
    monkeypatch.setattr("llmprune.pruning.deciding.decide", None)
    prune(llama, settings, tmp_path / "resumed", resume=True)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "resumed" / shard.name).read_bytes()


@pytest.mark.parametrize("unit", ["parameters", "flops"])
def test_a_budget_gives_each_layer_its_own_widths(llama: Path, tmp_path: Path, unit: str) -> None:
    settings = structured(ffn={}, heads={}, budget={"remove": 0.3, "of": unit, "multiple": 4})
    report = prune(llama, settings, tmp_path / "out")
    extent, evidence = report.header["extent"], report.header["decisions"]["evidence"]["budget"]
    key = "parameters" if unit == "parameters" else "flops_per_token"
    assert extent["pruned"][key] < extent["dense"][key]
    assert evidence["size"] <= evidence["budget"]
    assert evidence["uniform_error"] is None or evidence["error"] <= evidence["uniform_error"] + 1e-12
    widths = [
        layer.mlp.up_proj.out_features for layer in AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers
    ]
    removed = {row.layer: row.kept for row in report.structures if row.kind == "ffn"}
    assert widths == [removed.get(f"model.layers.{layer}", 48) for layer in range(4)]


def test_a_budget_that_cannot_be_kept_is_refused(llama: Path, tmp_path: Path) -> None:
    settings = structured(heads={}, budget={"remove": 0.6})
    for run in (lambda: dry_run(llama, settings), lambda: prune(llama, settings, tmp_path / "out")):
        with pytest.raises(PatternError, match=r"removes 1\d\d\.\d% of .* but at most \d\d\.\d% can be removed"):
            run()


def test_blocks_go_from_layers_that_stay(llama: Path, tmp_path: Path) -> None:
    settings = structured(attention={"remove": 1}, mlp={"remove": 1, "method": "kl"}, ffn={"remove": 0.5})
    report = prune(llama, settings, tmp_path / "out")
    blocks = report.header["decisions"]["blocks"]
    gone = sorted(name for modules in blocks.values() for name in modules)
    assert gone == ["mlp", "self_attn"]
    assert len(report.structures) == 3, "no channels are taken from a removed MLP"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = IDS[:1]
    with_cache, without = (
        model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_query_heads_go_and_their_keys_stay(llama: Path, tmp_path: Path) -> None:
    report = prune(llama, structured(heads={"remove": 1, "unit": "query-head"}), tmp_path / "out")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 2)
    for row in report.structures:
        assert row.removed is not None
        assert [head // 2 for head in row.removed] == [0, 1], "one of each key and value head"


@pytest.mark.parametrize("method", ["taylor", "fisher"])
def test_gradients_choose(llama: Path, tmp_path: Path, method: str) -> None:
    report = prune(llama, structured(ffn={"remove": 0.5, "method": method}), tmp_path / "out")
    other = prune(llama, structured(ffn={"remove": 0.5, "method": "magnitude-l2"}), tmp_path / "other")
    assert [row.removed for row in report.structures] != [row.removed for row in other.structures]
    assert {row.kept for row in report.structures} == {24}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "heads"),
        ("llama", "ffn"),
        ("gpt2", "ffn"),
        ("gemma2", "heads"),
        ("phi3", "heads"),
        ("mixtral", "experts"),
    ],
)
def test_the_checkpoint_computes_what_the_masked_model_does(family: str, kind: str, tmp_path: Path) -> None:
    folder = save(build(family), tmp_path / "model")
    section = {"remove": 0.5} if kind == "experts" else {"remove": 0.5, "method": "magnitude-l2"}
    report = prune(folder, structured(**{kind: section}), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = Decoder.find(model).layers
    with torch.no_grad(), ExitStack() as stack:
        for row in report.structures:
            index = int(row.layer.rpartition(".")[2])
            structure = next(s for s in find_structures(Decoder.find(model))[index] if s.kind == kind)
            assert row.removed is not None
            cut = Cut(structure, row.removed)
            if kind == "experts":
                stack.enter_context(routed_without(layers[index], cut))
            else:
                mask(layers[index], cut)
        expected = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-5)


def test_more_experts_stay_than_a_token_goes_to(tmp_path: Path) -> None:
    folder = save(build("mixtral"), tmp_path / "model")
    with pytest.raises(ModelError, match="experts"):
        prune(folder, structured(experts={"remove": 3}), tmp_path / "out")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"depth": {"remove": 4}}, "4 of 4 layers are to be removed (4 removable)\nexpected: from 1 to 3"),
        ({"depth": {"remove": 1, "protect": 4}}, "1 of 4 layers are to be removed (0 removable)"),
        ({"depth": {"remove": 3, "protect": 2, "method": "angular"}}, "3 of 4 layers are to be removed (2 removable)"),
        ({"attention": {"remove": 4, "method": "kl"}}, "4 of 4 attention blocks are to be removed (4 removable)"),
    ],
    ids=str,
)
def test_a_dry_run_refuses_the_removals_that_a_run_would(
    llama: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    for run in (lambda: dry_run(llama, structured(**sections)), lambda: prune(llama, structured(**sections), tmp_path)):
        with pytest.raises(RecipeError, match=re.escape(message)):
            run()


@pytest.mark.parametrize(("family", "part", "name"), [("bloom", "attention", "attention"), ("mpt", "mlp", "MLP")])
def test_blocks_that_cannot_go_are_refused_with_the_reason(family: str, part: str, name: str, tmp_path: Path) -> None:
    folder = save(build(family), tmp_path / "model")
    with pytest.raises(ModelError, match=rf"no {name} block of \w+ can be removed: \w+ adds the residual") as caught:
        dry_run(folder, structured(**{part: {"remove": 1}}))
    assert f"leave {part} out" in caught.value.fix


def test_more_blocks_than_may_go_are_refused_with_the_reason_of_one_that_stays(tmp_path: Path) -> None:
    folder = save(build("jamba"), tmp_path / "model")
    with pytest.raises(RecipeError, match=r"2 of 2 attention blocks \(not that of layer 0: .+\) are to be removed"):
        dry_run(folder, structured(attention={"remove": 2}))


def test_the_report_says_what_is_left_of_everything(llama: Path, tmp_path: Path) -> None:
    def left(**sections: Any) -> list[str]:
        report = prune(llama, structured(**sections), tmp_path / "-".join(sections), overwrite=True)
        return [str(one) for one in report.left]

    assert left(depth={"remove": 1}, width={"remove": 0.5}) == ["3 of 4 decoder layers", "16 of 32 hidden channels"]
    assert left(attention={"remove": 1}, mlp={"remove": 2}) == ["3 of 4 attention blocks", "2 of 4 MLP blocks"]
    assert left(heads={"remove": 1}) == ["1 of 2 groups of attention heads in each of 4 layers"]
    assert left(heads={"remove": 1, "unit": "query-head"}) == ["2 of 4 query heads in each of 4 layers"]
    rows = prune(llama, structured(ffn={}, budget={"remove": 0.2}), tmp_path / "budget").structures
    (one,) = Report((), load_report(tmp_path / "budget").header, rows[:3]).left
    assert "3 of 4 layers" in one.where
