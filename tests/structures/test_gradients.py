"""Gradients that come layer by layer are those of the whole model, and so are the scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shrinking import by_kind
from streams import in_turn, wired
from tiny_models import build, known, random_ids, save
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from llmprune.errors import ModelError, NumericsError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.decoder import Decoder, prunable_matrices
from llmprune.models.source import ModelSource
from llmprune.stream.stream import StreamSettings
from llmprune.structures.choose.gradients import BackwardStream, gradient_scores
from llmprune.structures.find.discovery import Structure, find_structures

IDS = random_ids(4, 10)
KINDS = ("heads", "ffn", "experts")
# (Layer, parameter inside it) -> mean gradient, mean squared gradient.
Known = dict[tuple[int, str], tuple[Tensor, Tensor]]


def matrices(model: PreTrainedModel) -> dict[int, list[str]]:
    layers = Decoder.find(model).layers
    return {i: sorted({m.parameter for m in prunable_matrices(layer, "")}) for i, layer in enumerate(layers)}


def streamed(model: PreTrainedModel, names: dict[int, list[str]], ids: Tensor = IDS, **settings: Any) -> Known:
    source = ModelSource(model)
    return {
        (layer.index, name): (both.mean.clone(), both.mean_square.clone())
        for layer in BackwardStream(source, ids, StreamSettings(**settings), names)
        for name, both in layer.gradients.items()
    }


def whole(model: PreTrainedModel, names: dict[int, list[str]], ids: Tensor = IDS) -> Known:
    """The same by automatic differentiation of the whole model, a sample at a time."""
    layers = Decoder.find(model).layers
    weights = {(i, name): layers[i].get_parameter(name) for i, own in names.items() for name in own}
    flags = [weight.requires_grad for weight in weights.values()]
    for weight in weights.values():
        weight.requires_grad_()
    samples = []
    for sample in ids:
        logits = model(input_ids=sample[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits, sample[1:])
        samples.append(torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True))
    for weight, flag in zip(weights.values(), flags, strict=True):
        weight.requires_grad_(flag)
    stacked = [torch.stack(own) for own in zip(*samples, strict=True)]
    return {key: (own.mean(0), own.square().mean(0)) for key, own in zip(weights, stacked, strict=True)}


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "gemma2", "mixtral", "opt-350m", "falcon-7b", "granite", "gpt_oss", "llama4", "dbrx", "mamba2"],
)
def test_gradients_are_those_of_the_whole_model(family: str) -> None:
    model = build(family, dtype=torch.float64)
    names = matrices(model)
    wanted = whole(model, names)
    found = streamed(model, names)
    assert set(found) == set(wanted)
    for key, (mean, square) in wanted.items():
        for mine, exact in zip(found[key], (mean, square), strict=True):
            # Norms compute in float32 even here, on inputs that are rounded elsewhere.
            assert_close(
                mine, exact, rtol=0, atol=2e-5 * float(exact.abs().max()), msg=lambda text, key=key: f"{key}: {text}"
            )
    assert any(bool(mean.abs().max() > 1e-4) for mean, _ in wanted.values())


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
    ((wanted, _),) = whole(model.float(), names).values()
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
    names = matrices(model)
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
    streamed(model, matrices(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["transformer.wte.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", [family for family in ("gemma3n", "gemma4", "zaya", "glm_moe_dsa") if known(family)])
def test_layers_that_hand_on_more_than_hidden_states_are_refused(family: str) -> None:
    model = build(family)
    with pytest.raises(ModelError, match="is handed more by the layers before it than their hidden states"):
        streamed(model, matrices(model))


def test_what_is_not_finite_is_named() -> None:
    def act(block: Any, x: Tensor) -> Tensor:
        # Its derivative is infinite where x is 0.
        return x + block.linear(x * 0).abs().sqrt() * 1e-3 if block.index == 1 else x + block.linear(x)

    model = wired(act, in_turn)
    with torch.no_grad():
        model.model.layers[1].linear.bias.zero_()
    with pytest.raises(NumericsError, match=r"model\.layers\.1"):
        streamed(model, {1: ["linear.weight"]})


def structures_of(model: PreTrainedModel) -> dict[int, list[Structure]]:
    found = find_structures(Decoder.find(model))
    kinds = {index: [s for kind in KINDS for s in by_kind(found, index, kind)] for index in range(len(found))}
    return {index: [s for s in own if s.refusal is None] for index, own in kinds.items()}


Weigh = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
WEIGH: dict[str, Weigh] = {
    "taylor": lambda weight, both: (weight * both[0]).abs(),
    "fisher": lambda weight, both: 0.5 * weight.square() * both[1],
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "dbrx", "gpt_oss"])
def test_scores_add_up_what_each_group_holds(family: str) -> None:
    model = build(family, dtype=torch.float64)
    structures = structures_of(model)
    scores = gradient_scores(ModelSource(model), IDS, None, structures, ["taylor", "fisher"])
    gradients = whole(model, matrices(model))
    layers = Decoder.find(model).layers
    assert set(scores) == set(structures)
    for index, own in structures.items():
        for structure, found in zip(own, scores[index], strict=True):
            for method, values in found.items():
                weighed = {
                    name: WEIGH[method](layers[index].get_parameter(name).detach(), both)
                    for (layer, name), both in gradients.items()
                    if layer == index
                }
                parts = [part for part in structure.slices if part.name in weighed]
                # Summed without regard to experts: a channel's scores in all of them together.
                wanted = [
                    sum(weighed[p.name].index_select(p.dim, p.index[group]).sum() for p in parts)
                    for group in range(structure.groups)
                ]
                total = values.sum(0) if values.dim() == 2 else values
                assert_close(total, torch.stack(wanted), rtol=1e-5, atol=1e-12)  # type: ignore[arg-type]


def test_channels_of_fused_experts_have_scores_of_each_expert() -> None:
    model = build("mixtral", dtype=torch.float64)
    (own,) = by_kind(find_structures(Decoder.find(model)), 1, "ffn")
    ((found,),) = gradient_scores(ModelSource(model), IDS, None, {1: [own]}, ["taylor"]).values()
    gradients = whole(model, {1: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]})
    experts: Any = model.model.layers[1].mlp.experts
    up = (experts.gate_up_proj * gradients[1, "mlp.experts.gate_up_proj"][0]).abs().sum(2).view(4, 2, 48).sum(1)
    down = (experts.down_proj * gradients[1, "mlp.experts.down_proj"][0]).abs().sum(1)
    assert found["taylor"].shape == (4, 48)
    assert_close(found["taylor"], (up + down).detach(), rtol=1e-5, atol=1e-12)
