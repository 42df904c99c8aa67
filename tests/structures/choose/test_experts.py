"""Scores of experts against direct computation from their weights and routers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shrinking import by_kind
from streams import stream, walk
from tiny_models import build, known, random_ids
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from llmprune.errors import ModelError, PatternError
from llmprune.models.decoder import Decoder
from llmprune.stream.resident import ResidentLayer
from llmprune.structures.choose.experts import ExpertScores, expert_scores, lowest_experts
from llmprune.structures.find.discovery import Structure, find_structures

IDS = random_ids(5, 12)
HELD_BACK = 1
TOKENS = (len(IDS) - HELD_BACK) * IDS.shape[1]

# For each family: the block's name in its layer, the gates [tokens, experts] (zero where not routed) from its inputs,
# and the weighted output of one expert from all inputs and their gates.
Gates = Callable[[Any, Tensor], Tensor]
Expert = Callable[[Any, int, Tensor, Tensor], Tensor]


def spread(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    return weights.new_zeros(len(index), experts).scatter(1, index, weights)


def gates_of_gate(block: Any, x: Tensor) -> Tensor:
    _, weights, index = block.gate(x)
    return spread(index, weights, len(block.gate.weight))


def glu(block: Any, expert: int, x: Tensor, gates: Tensor) -> Tensor:
    gate, up = F.linear(x, block.experts.gate_up_proj[expert]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, block.experts.down_proj[expert]) * gates


def gates_of_gpt_oss(block: Any, x: Tensor) -> Tensor:
    top, index = F.linear(x, block.router.weight, block.router.bias).topk(2, -1)
    return spread(index, top.softmax(-1), 4)


def gpt_oss(block: Any, expert: int, x: Tensor, gates: Tensor) -> Tensor:
    own = block.experts
    gate_up = x @ own.gate_up_proj[expert] + own.gate_up_proj_bias[expert]
    gate, up = gate_up[:, ::2].clamp(max=own.limit), gate_up[:, 1::2].clamp(-own.limit, own.limit)
    out = (up + 1) * gate * torch.sigmoid(gate * own.alpha) @ own.down_proj[expert] + own.down_proj_bias[expert]
    return out * gates


def gates_of_dbrx(block: Any, x: Tensor) -> Tensor:
    top, index = block.router.layer(x).softmax(-1).topk(2, -1)
    return spread(index, top / top.norm(p=1, dim=-1, keepdim=True), 8)


def dbrx(block: Any, expert: int, x: Tensor, gates: Tensor) -> Tensor:
    rows = slice(24 * expert, 24 * expert + 24)
    w1, v1, w2 = (weight[rows] for weight in (block.experts.mlp.w1, block.experts.mlp.v1, block.experts.mlp.w2))
    return (F.silu(x @ w1.T) * (x @ v1.T)) @ w2 * gates


def gates_of_llama4(block: Any, x: Tensor) -> Tensor:
    top, index = F.linear(x, block.router.weight).topk(1, -1)
    return spread(index, top.sigmoid(), 4)


def llama4(block: Any, expert: int, x: Tensor, gates: Tensor) -> Tensor:
    gate, up = ((x * gates) @ block.experts.gate_up_proj[expert]).chunk(2, -1)
    return up * F.silu(gate) @ block.experts.down_proj[expert]


def nemotron(block: Any, expert: int, x: Tensor, gates: Tensor) -> Tensor:
    return F.linear(F.linear(x, block.experts.up_proj[expert]).relu().square(), block.experts.down_proj[expert]) * gates


DIRECT: dict[str, tuple[str, Gates, Expert]] = {
    "mixtral": ("mlp", gates_of_gate, glu),
    "qwen3_moe": ("mlp", gates_of_gate, glu),
    "gpt_oss": ("mlp", gates_of_gpt_oss, gpt_oss),
    "dbrx": ("ffn", gates_of_dbrx, dbrx),
    "llama4": ("feed_forward", gates_of_llama4, llama4),
    "nemotron_h": ("mixer", gates_of_gate, nemotron),
}


def with_experts(model: PreTrainedModel) -> dict[int, list[Structure]]:
    found = find_structures(Decoder.find(model))
    return {layer: own for layer in range(len(found)) if (own := list(by_kind(found, layer, "experts")))}


def score(model: PreTrainedModel, method: str, structures: dict[int, list[Structure]]) -> dict[int, ExpertScores]:
    scores: dict[int, ExpertScores] = {}

    def visit(layer: ResidentLayer) -> None:
        for structure in structures.get(layer.index, ()):
            scores[layer.index] = expert_scores(layer, [structure], method)[structure.consumer]

    walk(stream(model, IDS, held_back=HELD_BACK), visit)
    return scores


def block_inputs(model: PreTrainedModel, layer: int, name: str) -> Tensor:
    """What the experts' block of a layer reads, [tokens, hidden], without the samples held back."""
    seen: list[Tensor] = []
    block = Decoder.find(model).layers[layer].get_submodule(name)
    hook = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=IDS[: len(IDS) - HELD_BACK], use_cache=False)
    hook.remove()
    return seen[0].flatten(0, -2)


@pytest.mark.parametrize("family", [family for family in DIRECT if known(family)])
def test_scores_are_those_of_the_weights(family: str) -> None:
    model = build(family)
    structures = with_experts(model)
    assert structures
    reap, frequency = (score(model, method, structures) for method in ("reap", "frequency"))
    name, gates_of, expert_of = DIRECT[family]
    layers = Decoder.find(model).layers
    for layer, own in structures.items():
        block = layers[layer].get_submodule(name)
        x = block_inputs(model, layer, name)
        with torch.no_grad():
            gates = gates_of(block, x)
            wanted = []
            for expert in range(own[0].groups):
                sent = gates[:, expert] > 0
                norms = expert_of(block, expert, x[sent], gates[sent, expert, None]).norm(dim=-1)
                wanted.append(norms.double().mean().item() if len(norms) else 0.0)
        assert_close(reap[layer].values, torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=1e-6)
        counts = (gates > 0).sum(0)
        assert reap[layer].tokens.tolist() == frequency[layer].tokens.tolist() == counts.tolist()
        assert frequency[layer].values.tolist() == counts.tolist()
        assert reap[layer].chosen == int((gates > 0).sum(1).max())


GATE_FREE = [family for family in DIRECT if family != "llama4" and known(family)]


@pytest.mark.parametrize("family", GATE_FREE)
def test_gate_free_scores_are_those_of_the_outputs_alone(family: str) -> None:
    model = build(family).double()
    structures = with_experts(model)
    norm, energy = (score(model, method, structures) for method in ("output-norm", "output-energy"))
    name, gates_of, expert_of = DIRECT[family]
    layer, own = next(iter(structures.items()))
    block = Decoder.find(model).layers[layer].get_submodule(name)
    x = block_inputs(model, layer, name)
    norms, energies = torch.zeros(2, own[0].groups, dtype=torch.float64)
    with torch.no_grad():
        gates = gates_of(block, x)
        for expert in range(own[0].groups):
            sent = gates[:, expert] > 0
            if sent.any():
                outputs = expert_of(block, expert, x[sent], torch.ones(1, 1, dtype=torch.float64))
                norms[expert], energies[expert] = outputs.norm(dim=-1).mean(), outputs.square().sum(-1).mean()
    assert_close(norm[layer].values, norms, rtol=1e-5, atol=1e-9)
    assert_close(energy[layer].values, energies, rtol=1e-5, atol=1e-9)
    assert norm[layer].tokens.tolist() == (gates > 0).sum(0).tolist()


@pytest.mark.parametrize("renormalised", [False, True])
def test_reap_weighs_by_gates_as_the_model_normalises_them(renormalised: bool) -> None:
    model = build("olmoe").double()
    structures = with_experts(model)
    block: Any = Decoder.find(model).layers[0].get_submodule("mlp")
    block.gate.norm_topk_prob = renormalised
    reap = score(model, "reap", {0: structures[0]})[0]
    x = block_inputs(model, 0, "mlp")
    with torch.no_grad():
        weights, index = F.linear(x, block.gate.weight).softmax(-1).topk(block.gate.top_k, -1)
        gates = spread(index, weights / weights.sum(-1, keepdim=True) if renormalised else weights, reap.values.numel())
        for expert, found in enumerate(reap.values.tolist()):
            sent = gates[:, expert] > 0
            norms = glu(block, expert, x[sent], gates[sent, expert, None]).norm(dim=-1)
            assert found == pytest.approx(norms.mean().item() if len(norms) else 0.0, rel=1e-5)


def test_gates_that_scale_the_inputs_leave_reap_and_frequency() -> None:
    model = build("llama4")
    with pytest.raises(ModelError, match=r"gates scale the experts' inputs.*\n.*\nfix: score experts by reap or freq"):
        score(model, "output-norm", with_experts(model))


ROUTED = ["qwen2_moe", "olmoe", "glm_moe_dsa", "granitemoe", "granitemoehybrid", "jamba", "qwen3_next"]


@pytest.mark.parametrize("family", [family for family in ROUTED if known(family)])
def test_every_routed_token_counts_once(family: str) -> None:
    model = build(family)
    structures = with_experts(model)
    scores = score(model, "reap", structures)
    assert set(scores) == set(structures)
    for own in scores.values():
        assert int(own.tokens.sum()) == TOKENS * own.chosen
        assert ((own.values > 0) == (own.tokens > 0)).all()


def test_an_expert_without_tokens_scores_zero() -> None:
    model = build("mixtral")
    structures = with_experts(model)
    gate: Any = model.model.layers[0].mlp.gate
    gate.top_k = 1
    with torch.no_grad():
        gate.weight[1] = -gate.weight[0]
        gate.weight[2:] = 0
    scores = score(model, "reap", structures)[0]
    assert scores.chosen == 1
    assert (scores.tokens == 0).tolist() == [False, False, True, True]
    assert scores.values[2:].tolist() == [0.0, 0.0]


def test_scores_see_what_the_pruned_layers_before_give() -> None:
    model = build("mixtral")
    structures = with_experts(model)
    before = score(model, "reap", structures)
    scores: list[ExpertScores] = []

    def visit(layer: ResidentLayer) -> None:
        if layer.index == 0:
            for name in layer.matrices:
                layer.replace(name, torch.zeros_like(layer.weight(name)))
        else:
            (own,) = structures[1]
            scores.append(expert_scores(layer, [own], "reap")[own.consumer])

    walk(stream(model, IDS, held_back=HELD_BACK), visit)
    assert not torch.allclose(scores[0].values, before[1].values, rtol=1e-2)


def test_scoring_leaves_the_layer_as_it_was() -> None:
    model = build("gpt_oss")
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
    score(model, "reap", with_experts(model))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, wanted)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gates_outside_of_the_experts_leave_frequency_only() -> None:
    model = build("jetmoe")
    structures = with_experts(model)
    counts = score(model, "frequency", structures)
    assert [int(own.tokens.sum()) for own in counts.values()] == [2 * TOKENS] * 2
    assert [own.chosen for own in counts.values()] == [2, 2]
    with pytest.raises(ModelError, match=r"weighted outside their module\n.*\nfix: score experts by frequency"):
        score(model, "reap", structures)


def test_a_module_called_in_an_unknown_form_is_refused() -> None:
    model = build("mixtral")
    structures = with_experts(model)
    experts: Any = model.model.layers[0].mlp.experts
    own = experts.forward
    experts.forward = lambda x, index, weights, more: own(x, index, weights)
    model.model.layers[0].mlp.forward = lambda x: experts(x.view(-1, 32), *routing(model, x), 1).view(x.shape)
    for method in ("reap", "frequency"):
        with pytest.raises(ModelError, match="called with unknown arguments"):
            score(model, method, structures)


def routing(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    _, weights, index = model.model.layers[0].mlp.gate(x)
    return index, weights


def test_experts_that_never_run_are_refused() -> None:
    model = build("mixtral")
    structures = with_experts(model)
    model.model.layers[0].mlp = Bypassed(model.model.layers[0].mlp)
    with pytest.raises(ModelError, match="MixtralExperts is not called"):
        score(model, "frequency", structures)


class Bypassed(nn.Module):
    """The block with nothing of it in use."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate, self.experts = block.gate, block.experts

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_refused_experts_and_unknown_scores_are_not_scored() -> None:
    model = build("deepseek_v3")
    with pytest.raises(ModelError, match="groups of experts first"):
        score(model, "reap", with_experts(model))
    with pytest.raises(PatternError, match="'wanda'"):
        score(build("mixtral"), "wanda", with_experts(build("mixtral")))


def known_scores(*values: float, chosen: int = 2) -> ExpertScores:
    return ExpertScores(torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.int64), chosen)


def test_the_lowest_experts_go() -> None:
    scores = {"a": known_scores(3, 1, 2, 4), "b": known_scores(1, 1, 1, 0)}
    assert lowest_experts(scores, 2) == {"a": [1, 2], "b": [0, 3]}
    assert lowest_experts(scores, 0) == {"a": [], "b": []}


def test_as_many_experts_stay_as_a_token_goes_to() -> None:
    with pytest.raises(
        PatternError, match="3 of the 4 experts of a are to be removed, but each token is routed to 2 of them"
    ):
        lowest_experts({"a": known_scores(3, 1, 2, 4)}, 3)


def test_structures_of_one_layer_have_one_number_of_experts() -> None:
    with pytest.raises(PatternError, match=r"\[3, 4\] experts"):
        lowest_experts({"a": known_scores(1, 2, 3, 4), "b": known_scores(1, 2, 3)}, 1)
