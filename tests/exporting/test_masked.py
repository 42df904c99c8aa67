"""Masks for torch.nn.utils.prune: what users of it load, train and make permanent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import tensors
from packed_models import save_packed
from safetensors.torch import load_file
from tiny_models import build, random_ids, save
from torch.nn.utils import prune
from transformers import AutoConfig, AutoModelForCausalLM
from uneven_models import save_uneven

from llmprune import export
from llmprune.errors import CheckpointError, ModelError
from llmprune.exporting.masked import load_masked

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return save_packed(tmp_path)


def fresh(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(random_ids(2, 12)).logits


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_the_loaded_model_is_the_exported_one(made: Path, kind: str) -> None:
    folder = export(made / kind, "torch-prune").output
    model = load_masked(fresh(made / "dense"), folder)
    dense = AutoModelForCausalLM.from_pretrained(made / "dense")
    assert torch.equal(logits(model), logits(dense))
    layer = model.get_submodule(LAYER)
    assert prune.is_pruned(layer)
    assert torch.equal(layer.weight, dense.get_submodule(LAYER).weight)
    assert float(layer.weight_mask.float().mean()) == 0.5


def test_keys_are_those_of_a_pruned_torch_module(made: Path) -> None:
    folder = export(made / "dense", "torch-prune").output
    model = fresh(made / "dense")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            prune.identity(module, "weight")
    state = load_file(folder / "torch-prune-model.safetensors")
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(made / "dense")))


def test_training_keeps_the_zeros(made: Path) -> None:
    model = load_masked(fresh(made / "dense", torch.float32), export(made / "dense", "torch-prune").output)
    zeros = model.get_submodule(LAYER).weight == 0
    before = model.get_submodule(LAYER).weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(random_ids(2, 12), labels=random_ids(2, 12)).loss.backward()
    optimizer.step()
    prune.remove(model.get_submodule(LAYER), "weight")
    after = model.get_submodule(LAYER).weight
    assert torch.equal(after == 0, zeros)
    assert not torch.equal(after, before)


def test_tied_and_uneven_models(tmp_path: Path) -> None:
    save(build("llama-tied", torch.bfloat16), tmp_path / "tied")
    export(tmp_path / "tied", "torch-prune")
    model = load_masked(fresh(tmp_path / "tied"), tmp_path / "tied-torch-prune")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "tied")))
    save_uneven(tmp_path / "uneven")
    report = export(tmp_path / "uneven", "torch-prune")
    assert "0 of" in report.facts["matrices"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "uneven")
    wanted = logits(model)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert torch.equal(logits(load_masked(model, report.output)), wanted)


def test_tensors_in_another_form_are_refused(tmp_path: Path) -> None:
    save(build("mixtral"), tmp_path / "experts")
    stored = tensors(tmp_path / "experts")
    assert any("experts.0" in key for key in stored)
    with pytest.raises(ModelError, match="is stored in another form than the model has it"):
        export(tmp_path / "experts", "torch-prune")
    assert not any((tmp_path / "experts-torch-prune").glob("*"))


def without(name: str) -> Callable[[Any], Any]:
    return lambda model: delattr(model.model.layers[0].mlp, name)


@pytest.mark.parametrize("change", [without("up_proj"), lambda model: setattr(model, "more", torch.nn.Linear(2, 2))])
def test_another_model_is_refused_and_left_alone(made: Path, change: Callable[[Any], Any]) -> None:
    folder = export(made / "dense", "torch-prune").output
    model = fresh(made / "dense")
    change(model)
    with pytest.raises(ModelError, match="are not those of this model"):
        load_masked(model, folder)
    assert not prune.is_pruned(model)
    with pytest.raises(ModelError, match="are not those of this model"):
        load_masked(build("llama", hidden_size=64), folder)


def test_a_folder_of_something_else_is_refused(made: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no torch-prune-\*.safetensors"):
        load_masked(fresh(made / "dense"), made / "dense")
