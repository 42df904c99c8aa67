"""Gradients that come layer by layer are those of the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from streams import Known, in_turn, matrix_names, whole_gradients, wired
from tiny_models import build, known, random_ids, save
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from llmprune.errors import ModelError, NumericsError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.source import ModelSource
from llmprune.stream.backward import BackwardStream
from llmprune.stream.stream import StreamSettings

IDS = random_ids(4, 10)


def streamed(model: PreTrainedModel, names: dict[int, list[str]], ids: Tensor = IDS, **settings: Any) -> Known:
    source = ModelSource(model)
    return {
        (layer.index, name): (both.mean.clone(), both.mean_square.clone())
        for layer in BackwardStream(source, ids, StreamSettings(**settings), names)
        for name, both in layer.gradients.items()
    }


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "gemma2", "mixtral", "opt-350m", "falcon-7b", "granite", "gpt_oss", "llama4", "dbrx", "mamba2"],
)
def test_gradients_are_those_of_the_whole_model(family: str) -> None:
    model = build(family, dtype=torch.float64)
    names = matrix_names(model)
    wanted = whole_gradients(model, names, IDS)
    found = streamed(model, names)
    assert set(found) == set(wanted)
    for key, (mean, square) in wanted.items():
        for mine, exact in zip(found[key], (mean, square), strict=True):
            # Norms compute in float32 even here, on inputs that are rounded elsewhere.
            assert_close(
                mine, exact, rtol=0, atol=2e-5 * float(exact.abs().max()), msg=lambda text, key=key: f"{key}: {text}"
            )
    assert any(bool(mean.abs().max() > 1e-4) for mean, _ in wanted.values())


@pytest.mark.parametrize("family", ["gemma2", "granite", "opt-350m", "mamba2"])
def test_gradients_do_not_depend_on_how_many_logits_are_computed_at_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, dtype=torch.float64)
    names = {1: matrix_names(model)[1][:1]}
    whole = streamed(model, names)
    # Ten positions, the last of which has no token to predict.
    for most in (3, 1):
        monkeypatch.setattr("llmprune.stream.stream.window_positions", lambda *_, most=most: most)
        for key, found in streamed(model, names).items():
            assert_close(found, whole[key], rtol=1e-4, atol=2e-5 * float(whole[key][0].abs().max()))


def test_soft_capping_of_the_logits_takes_part() -> None:
    """Guards the comparison above: without the cap the gradients of Gemma 2 are others."""
    capped, free = (build("gemma2", final_logit_softcapping=cap) for cap in (0.5, None))
    names = {1: ["mlp.down_proj.weight"]}
    one, other = (streamed(model, names)[1, "mlp.down_proj.weight"][0] for model in (capped, free))
    assert not torch.allclose(one, other, rtol=0.1)


def test_16_bit_weights_have_32_bit_gradients() -> None:
    model = build("llama", dtype=torch.bfloat16)
    names = {0: ["mlp.up_proj.weight"]}
    ((mean, square),) = streamed(model, names).values()
    assert mean.dtype == square.dtype == torch.float32
    ((wanted, _),) = whole_gradients(model.float(), names, IDS).values()
    assert float((mean - wanted).norm() / wanted.norm()) < 0.05


def test_layers_come_last_first_and_only_those_asked_for() -> None:
    model = build("llama", num_hidden_layers=4)
    source = ModelSource(model)
    loaded: list[int] = []
    load = source.load_layer

    def watch(index: int, device: torch.device) -> None:
        loaded.append(index)
        load(index, device)

    source.load_layer = watch  # type: ignore[method-assign]
    names = {3: ["mlp.up_proj.weight"], 1: ["mlp.down_proj.weight", "self_attn.q_proj.weight"], 0: []}
    seen = [(layer.index, sorted(layer.gradients)) for layer in BackwardStream(source, IDS, None, names)]
    assert seen == [(3, ["mlp.up_proj.weight"]), (1, ["mlp.down_proj.weight", "self_attn.q_proj.weight"])]
    assert loaded[-3:] == [3, 2, 1]
    assert list(BackwardStream(source, IDS, None, {0: []})) == []


def test_a_checkpoint_on_disk_gives_the_same_in_little_memory(tmp_path: Path) -> None:
    model = build("mixtral")
    names = matrix_names(model)
    wanted = streamed(model, names)
    source = CheckpointSource(save(model, tmp_path))
    for layer in BackwardStream(source, IDS, StreamSettings(activation_budget=0), names):
        others = [p for i, other in enumerate(source.layers) if i != layer.index for p in other.parameters()]
        assert all(parameter.is_meta for parameter in others)
        for name, both in layer.gradients.items():
            assert torch.equal(both.mean, wanted[layer.index, name][0])
            assert torch.equal(both.mean_square, wanted[layer.index, name][1])
    assert all(parameter.is_meta for parameter in source.layers.parameters())


def test_held_back_samples_and_the_batch_size_make_no_difference() -> None:
    model = build("llama")
    names = {0: ["mlp.up_proj.weight"]}
    one = streamed(model, names, torch.cat([IDS, random_ids(2, 10, seed=5)]), held_back=2, batch_size=3)
    other = streamed(model, names)
    assert all(torch.equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True))


def test_the_model_stays_as_it_was() -> None:
    model = build("gpt2")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.transformer.wte.weight.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    streamed(model, matrix_names(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["transformer.wte.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", [family for family in ("gemma3n", "gemma4", "zaya", "glm_moe_dsa") if known(family)])
def test_layers_that_hand_on_more_than_hidden_states_are_refused(family: str) -> None:
    model = build(family)
    with pytest.raises(ModelError, match="reads more than the hidden states of earlier layers"):
        streamed(model, matrix_names(model))


def test_what_is_not_finite_is_named() -> None:
    def act(block: Any, x: Tensor) -> Tensor:
        # Its derivative is infinite where x is 0.
        return x + block.linear(x * 0).abs().sqrt() * 1e-3 if block.index == 1 else x + block.linear(x)

    model = wired(act, in_turn)
    with torch.no_grad():
        model.model.layers[1].linear.bias.zero_()
    with pytest.raises(NumericsError, match=r"model\.layers\.1"):
        streamed(model, {1: ["linear.weight"]})
