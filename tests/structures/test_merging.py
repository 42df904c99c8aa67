"""Layers that take up the heads and channels of removed ones: exactly where that is possible, or refused."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import tensors, weights_and_texts
from rich.console import Console
from runs import stop_early
from tiny_models import build, recipe, save
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune import Report, dry_run, prune
from llmprune.cli.tables.pruning import dry_run_tables
from llmprune.errors import ModelError, RecipeError
from llmprune.pages.fitted import fitting_facts
from llmprune.recipe.recipe import load_recipe
from llmprune.structures import merging
from llmprune.structures.merging import placed

QUICK = {"epochs": 2, "lr": 3e-3, "sequences": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(calm(build("llama", num_hidden_layers=4)), tmp_path_factory.mktemp("model"))


def calm(model: PreTrainedModel) -> PreTrainedModel:
    """Layers that change the hidden states little, as trained ones do: then the next one reads nearly the same."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(0.1)
    return model


def settings(depth: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    plain = {key: value for key, value in recipe(held_back=2).items() if key not in ("pattern", "method")}
    depth = {"remove": 1, "replace": "merge", **(depth or {})}
    return {**plain, "structures": {"depth": depth}, **changes}


def test_every_group_has_one_place() -> None:
    assert placed([0, 1, 2], 3) == [0, 1, 2]
    assert placed([3, 4, 5], 3) == [3, 4, 5]
    assert placed([0, 2, 5, 6, 9, 11], 6) == [0, 6, 2, 9, 11, 5]


def halved(model: PreTrainedModel) -> None:
    """The first two layers use different halves of their places, so that nothing is lost when they share them."""
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers[:2]):
            heads, channels = layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight
            heads[:, number * (half := heads.shape[1] // 2) :][:, :half] = 0
            channels[:, number::2] = 0


def side_by_side(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the first two layers give if their attentions, and then their MLPs, read the same."""
    inner = model.model
    h = inner.embed_tokens(ids)
    length = ids.shape[1]
    rotary = inner.rotary_emb(h, torch.arange(length)[None])
    causal = torch.full((length, length), -torch.inf).triu(1)[None, None]
    first, second = inner.layers[:2]
    x = h
    for layer in (first, second):
        x = x + layer.self_attn(layer.input_layernorm(h), position_embeddings=rotary, attention_mask=causal)[0]
    y = x
    for layer in (first, second):
        y = y + layer.mlp(layer.post_attention_layernorm(x))
    return y


def test_what_fits_into_one_layer_is_merged_exactly(tmp_path: Path) -> None:
    model = calm(build("llama", num_hidden_layers=3))
    halved(model)
    # Its successor is protected: the second layer is merged into the first.
    report = prune(save(model, tmp_path / "dense"), settings({"protect": 1}), tmp_path / "out")
    assert report.header["decisions"]["layers"] == [0, 2]
    assert [(row.layer, row.target) for row in report.matches] == [("model.layers.0", "merge")]
    assert report.matches[0].after < report.matches[0].before
    merged, states = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), []
    merged.model.layers[0].register_forward_hook(lambda module, args, output: states.append(output))
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        merged(ids)
        expected = side_by_side(model.float(), ids)
    assert torch.allclose(states[0], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_result_is_a_checkpoint_of_the_usual_widths(llama: Path, tmp_path: Path) -> None:
    report = prune(llama, settings({"remove": 2}), tmp_path / "out")
    kept = report.header["decisions"]["layers"]
    old, new = tensors(llama), tensors(tmp_path / "out")
    assert {value.shape for value in new.values()} == {value.shape for value in old.values()}
    standing = [row.layer for row in report.matches if row.best]
    gains = [f"{name}.{norm}.weight" for name in standing for norm in ("input_layernorm", "post_attention_layernorm")]
    assert standing
    assert kept[0] == 0
    assert all(bool((new[gain] == 1).all()) for gain in gains)
    assert dict(fitting_facts(report)).keys() == {"standing for removed layers"}


def test_a_merge_that_does_not_help_is_left_out(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([1.0, 2.0])
    monkeypatch.setattr(merging, "relative_error", lambda *_: next(errors))
    report = prune(llama, settings(), tmp_path / "out")
    assert [(row.before, row.after, row.best) for row in report.matches] == [(1.0, 1.0, 0)]
    prune(llama, settings({"replace": None, "protect": 0}), tmp_path / "plain")
    assert weights_and_texts(tmp_path / "out").keys() == weights_and_texts(tmp_path / "plain").keys()
    one, other = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_groups_that_compute_something_else_in_their_new_place_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging._Merge, "_moved", lambda self, *_: self._parameters[0][_[1]].clone())
    with pytest.raises(ModelError, match="compute something else"):
        prune(llama, settings(), tmp_path / "out")


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings(reconstruct=QUICK, pattern="2:4", method="wanda")
    whole = prune(llama, wanted, tmp_path / "whole")
    stop_early(monkeypatch, llama, wanted, tmp_path / "resumed")
    again = prune(llama, wanted, tmp_path / "resumed", resume=True)
    assert weights_and_texts(tmp_path / "resumed") == weights_and_texts(tmp_path / "whole")
    assert rows(again) == rows(whole)
    assert again.sparsity == 0.5


def rows(report: Report) -> list[tuple[str, str, float]]:
    return [(row.layer, row.target, row.after) for row in report.matches]


@pytest.mark.parametrize("reconstruct", [None, {**QUICK, "train": ["norms"]}], ids=["plain", "fitted"])
def test_the_dry_run_knows_what_it_takes(llama: Path, reconstruct: Any, tmp_path: Path) -> None:
    wanted = settings(reconstruct=reconstruct)
    plan, report = dry_run(llama, wanted), prune(llama, wanted, tmp_path / "out")
    assert plan.memory.layer.replacing > 2 * plan.memory.layer.weights
    assert plan.memory.peak == pytest.approx(report.header["memory"]["predicted_bytes"], rel=0.01)
    without = dry_run(llama, settings({"replace": None}, reconstruct=reconstruct))
    assert without.work.solve == 0
    # A quarter of the layers is removed, and each layer counts for as much of a merge: 2 x 32 and 2 x 48 columns.
    solved = sum(4 * width**3 + 2 * width**2 * 32 for width in (64, 96))
    assert plan.work.solve == pytest.approx(4 * solved / 4)
    text = StringIO()
    Console(file=text, width=120).print(*dry_run_tables(plan))
    assert "takes up the best of the heads and channels" in " ".join(text.getvalue().split())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "layer_types in the config is not the same"),
        ("smollm3", "(no_rope_layers|layer_types) in the config is not the same"),
        ("qwen3", "all its groups share self_attn.[qk]_norm.weight"),
        ("gpt2", "the gains of its norms do not fold|does not belong to a linear layer"),
        ("mixtral", "experts"),
        ("mamba", "structures of heads|mixer"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_runs(family: str, reason: str, tmp_path: Path) -> None:
    source = save(build(family), tmp_path / "dense")
    with pytest.raises(ModelError, match=f"cannot be merged with its neighbour: .*({reason})"):
        dry_run(source, settings())


@pytest.mark.parametrize("other", ["mlp", "attention", "width"])
def test_layers_are_merged_whole(other: str) -> None:
    structures = {"depth": {"remove": 1, "replace": "merge"}, other: {"remove": 1}}
    with pytest.raises(RecipeError, match=f"replace together with {other}"):
        load_recipe(settings(structures=structures))
