"""True-sequential order: a matrix is calibrated on the outputs of the pruned matrices before it."""

from pathlib import Path

import pytest
import torch
from folders import tensors
from tiny_models import build, random_ids, recipe, save

from llmprune import prune
from llmprune.errors import RecipeError
from llmprune.methods import SparseGPT
from llmprune.models.source import ModelSource
from llmprune.patterns import NM
from llmprune.pruning.jobs import Job
from llmprune.pruning.solving import solve_in_turn
from llmprune.recipe.recipe import load_recipe
from llmprune.statistics import Gram
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.timing import Stages


def test_a_matrix_sees_what_the_pruned_ones_before_it_give() -> None:
    """Compared with the plain way: hooks on a stock model in which the matrices before it are replaced by hand."""
    model, ids = build("llama"), random_ids(4, 16)
    reference = build("llama")
    job = Job(NM(2, 4), SparseGPT(), "sparsegpt")
    layer = next(iter(Stream(ModelSource(model), ids, StreamSettings(batch_size=2))))
    rows = solve_in_turn(layer, dict.fromkeys(layer.matrices, job), "none", 0, Stages())
    assert {row.name for row in rows} == set(layer.matrices)
    for part in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        modules = {name: module for name, module in reference.model.layers[0].named_modules() if name.endswith(part)}
        seen: list[torch.Tensor] = []
        first = next(iter(modules.values()))
        handle = first.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].flatten(0, 1)))
        with torch.no_grad():
            reference(input_ids=ids)
        handle.remove()
        gram = Gram.empty(first.in_features)
        gram.update(torch.cat(seen))
        for name, module in modules.items():
            expected = job.method(module.weight.detach(), gram, job.pattern).weight
            found = layer.module.get_submodule(name).weight.detach()
            assert torch.allclose(found, expected, atol=1e-4), name
            module.weight.data = expected


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_the_order_changes_what_comes_after_the_first_input(tmp_path: Path, family: str) -> None:
    source = save(build(family), tmp_path / "dense")
    for name, sequential in (("once", False), ("turns", True)):
        settings = recipe(pattern="2:4", statistics={"sequential": sequential})
        prune(source, settings, tmp_path / name)
    once, turns = (tensors(tmp_path / name) for name in ("once", "turns"))
    differ = {key for key in once if not torch.equal(once[key], turns[key])}
    assert differ
    assert not any(".0.self_attn.q_proj" in key or ".0.attn.c_attn" in key for key in differ)


def test_patterns_over_the_whole_layer_are_refused() -> None:
    with pytest.raises(RecipeError, match="compares weights over the whole layer"):
        load_recipe(recipe(pattern="0.5/layer", statistics={"sequential": True}))
