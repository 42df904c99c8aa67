"""Models in memory as people have them: compiled, with adapters, masks or values that cannot be saved."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from folders import same, tensors
from tiny_models import build, recipe, tokenizer
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from transformers import PreTrainedModel

from llmprune import prune
from llmprune.errors import ModelError
from llmprune.models.source import ModelSource


def with_lora(model: PreTrainedModel) -> None:
    """As PEFT does: the layer becomes a part of a larger one."""
    owner = model.model.layers[1].mlp
    wrapped = nn.Module()
    wrapped.base_layer = owner.up_proj
    wrapped.lora_A = nn.ModuleDict({"default": nn.Linear(32, 4, bias=False)})
    wrapped.lora_B = nn.ModuleDict({"default": nn.Linear(4, 48, bias=False)})
    owner.up_proj = wrapped


def with_another_adapter(model: PreTrainedModel) -> None:
    model._hf_peft_config_loaded = True


def with_a_mask(model: PreTrainedModel) -> None:
    torch_prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.3)


def with_a_parametrization(model: PreTrainedModel) -> None:
    parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def with_a_compiled_part(model: PreTrainedModel) -> None:
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")


def with_a_temperature(model: PreTrainedModel) -> None:
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.3


@pytest.fixture(autouse=True)
def compiler_reset() -> Iterator[None]:
    """Let the compiler forget what it has seen here: other tests compile other code in this process."""
    yield
    torch._dynamo.reset()


STRUCTURES = {"structures": {"ffn": {"remove": 0.25}}, "pattern": None, "method": None}


@pytest.mark.parametrize(
    ("change", "message", "fix"),
    [
        (with_lora, r"adapter \(model\.layers\.1\.mlp\.up_proj\.lora_A\)", "merge it first"),
        (with_another_adapter, "adapter", "merge it first"),
        (with_a_mask, r"model\.layers\.0\.mlp\.up_proj is computed", "make it permanent first"),
        (with_a_parametrization, r"model\.layers\.0\.mlp\.up_proj is computed", "make it permanent first"),
        (with_a_compiled_part, r"model\.layers\.1 is wrapped by torch\.compile", "compile its parts afterwards"),
        (with_a_temperature, "cannot be saved.*temperature", "generation_config"),
    ],
)
@pytest.mark.parametrize("changes", [{}, STRUCTURES], ids=["weights", "structures"])
def test_what_cannot_be_pruned_is_refused_before_anything_changes(
    change: Callable[[PreTrainedModel], None],
    message: str,
    fix: str,
    changes: dict[str, object],
    tmp_path: Path,
) -> None:
    model = build("llama")
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {key: value for key, value in recipe(**changes).items() if value is not None or key == "evaluation"}
    with pytest.raises(ModelError, match=message) as caught:
        prune(model, settings, tmp_path / "out", tokenizer=tokenizer())
    assert fix in caught.value.fix
    assert not (tmp_path / "out").exists()
    assert all(same(tensor, before[name]) for name, tensor in model.state_dict().items())
    if change is not with_a_temperature:
        with pytest.raises(ModelError, match=message):
            ModelSource(model)


def test_a_model_that_is_not_saved_may_have_any_generation_config() -> None:
    model = build("llama")
    with_a_temperature(model)
    assert prune(model, recipe(), tokenizer=tokenizer()).sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "compile_model", [lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager") or m]
)
def test_a_compiled_model_is_pruned_as_the_model_inside(
    compile_model: Callable[[PreTrainedModel], nn.Module], tmp_path: Path
) -> None:
    plain, model = build("llama"), build("llama")
    # No sampling, for which lengths are compiled one after another.
    (tmp_path / "text.txt").write_text(" ".join(f"w{number % 120 + 4}" for number in range(100)))
    settings = recipe(calibration={"source": str(tmp_path / "text.txt"), "samples": 3, "length": 8})
    prune(plain, settings, tmp_path / "plain", tokenizer=tokenizer())
    prune(compile_model(model), settings, tmp_path / "compiled", tokenizer=tokenizer())  # type: ignore[arg-type]
    one, other = tensors(tmp_path / "plain"), tensors(tmp_path / "compiled")
    assert one.keys() == other.keys()
    assert all(same(one[key], other[key]) for key in one)
    assert all(same(tensor, model.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_a_mask_that_was_made_permanent_is_pruned() -> None:
    model = build("llama")
    with_a_mask(model)
    torch_prune.remove(model.model.layers[0].mlp.up_proj, "weight")
    assert prune(model, recipe(), tokenizer=tokenizer()).sparsity >= 0.49
