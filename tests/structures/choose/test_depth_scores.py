"""Depth pruning: each measure against a plain computation, and which layers and sub-blocks are chosen."""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shrinking import logits
from streams import stream
from tiny_models import build, random_ids
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.errors import ModelError, NumericsError, RecipeError
from llmprune.models.decoder import Decoder
from llmprune.models.source import ModelSource
from llmprune.stream import variants
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.structures.choose.depth_scores import (
    BlockInfluence,
    DepthRemoval,
    DepthUnit,
    LayerDistance,
    block_candidates,
    layer_candidates,
    remove_lowest,
    remove_run,
)
from llmprune.structures.choose.greedy import remove_greedily
from llmprune.structures.find.subblocks import find_subblocks

IDS = random_ids(5, 12)


class CountingSource(ModelSource):
    """Counts how often each layer is loaded."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.loads: list[int] = []

    def load_layer(self, index: int, device: torch.device) -> None:
        self.loads.append(index)
        super().load_layer(index, device)


def hidden_states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What goes into each layer and out of the last one, [tokens, hidden]; not normalised."""
    states: list[Tensor] = []
    layers = model.model.layers
    hooks = [layer.register_forward_pre_hook(lambda m, args: states.append(args[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda m, args, output: states.append(output)))
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return [state.flatten(0, 1).double() for state in states]


def cosine(before: Tensor, after: Tensor) -> Tensor:
    return (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))


def survey(run: Stream, *collectors: LayerDistance | BlockInfluence) -> None:
    for layer in run:
        for collector in collectors:
            collector.see(layer)
    for collector in collectors:
        collector.finish(run)


def test_block_influence_and_angles() -> None:
    model = build("llama", num_hidden_layers=4)
    single, triple = LayerDistance(), LayerDistance(span=3)
    # The last two samples are held back.
    survey(stream(model, held_back=2, outputs=True), single, triple)
    states = hidden_states(model, IDS[:3])
    cosines = [cosine(states[layer], states[layer + 1]) for layer in range(4)]
    expected = {(layer, "layer"): float((1 - values).mean()) for layer, values in enumerate(cosines)}
    assert single.influence == pytest.approx(expected, rel=1e-6)
    assert single.angles == pytest.approx([float((values.arccos() / math.pi).mean()) for values in cosines], rel=1e-6)
    runs = [cosine(states[layer], states[layer + 3]) for layer in range(2)]
    assert triple.angles == pytest.approx([float((values.arccos() / math.pi).mean()) for values in runs], rel=1e-6)


def test_the_same_tokens_of_every_layer() -> None:
    """A layer that adds nothing has no influence only if the same rows are compared."""
    model = build("llama", num_hidden_layers=3)
    layer = model.model.layers[1]
    with torch.no_grad():
        for parameter in (*layer.self_attn.o_proj.parameters(), *layer.mlp.down_proj.parameters()):
            parameter.zero_()
    few = LayerDistance(rows=7)
    survey(stream(model, outputs=True), few)
    scores = list(few.influence.values())
    assert scores[1] == pytest.approx(0, abs=1e-12)
    assert min(scores[0], scores[2]) > 1e-3
    assert {len(rows) for rows in few._recent} == {7}


def test_the_influence_of_blocks() -> None:
    model = build("llama", num_hidden_layers=3)
    blocks = find_subblocks(Decoder.find(model))
    collector = BlockInfluence(blocks)
    source = CountingSource(model)
    survey(Stream(source, IDS, StreamSettings(batch_size=2, outputs=True)), collector, LayerDistance())
    assert source.loads == [0, 0, 1, 2], "the first layer is loaded once more, to see what layers return"
    expected = {}
    states = hidden_states(model, IDS)
    for number, layer in enumerate(model.model.layers):
        for part, own in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            before = {name: parameter.detach().clone() for name, parameter in own.named_parameters()}
            for parameter in own.parameters():
                parameter.detach().zero_()
            rows = hidden_states(model, IDS)[number + 1]
            expected[number, part] = float((1 - cosine(rows, states[number + 1])).mean())
            own.load_state_dict(before)
    assert collector.result() == pytest.approx(expected, rel=1e-6)
    assert list(collector.result()) == sorted(collector.result())


def test_blocks_that_are_refused_have_no_score() -> None:
    model = build("granitemoehybrid")
    blocks = find_subblocks(Decoder.find(model))
    collector = BlockInfluence(blocks, parts=["attention"])
    survey(stream(model, outputs=True), collector)
    assert list(collector.result()) == [(1, "attention")]
    assert block_candidates(blocks, ["attention"]) == [(1, "attention")]
    assert block_candidates(blocks, ["attention", "mlp"], protect=1) == [(0, "mlp")]


def scores(*values: float) -> dict[DepthUnit, float]:
    return {DepthUnit(layer, "layer"): value for layer, value in enumerate(values)}


def test_the_lowest_go_and_ties_go_against_the_earlier() -> None:
    given = scores(0.3, 0.1, 0.2, 0.1, 0.1, 0.0)
    removal = remove_lowest(given, layer_candidates(6, protect=1), 2)
    assert removal.layers == [1, 3]
    assert removal.blocks == {}
    assert removal.scores == given
    assert remove_lowest(given, layer_candidates(6), 1).layers == [5]


def test_the_run_that_turns_least() -> None:
    angles = [0.3, 0.2, 0.2, 0.1]
    assert remove_run(angles, 3).layers == [3, 4, 5]
    assert remove_run(angles, 3, protect=1).layers == [1, 2, 3]
    removal = remove_run(angles, 3, protect=3)
    assert removal.layers == [0, 1, 2]
    assert removal.method == "angular-distance"
    assert removal.scores == {(layer, "layer"): angle for layer, angle in enumerate(angles)}


@pytest.mark.parametrize(
    "choose",
    [
        lambda: remove_lowest(scores(1, 2, 3), layer_candidates(3), 3),
        lambda: remove_lowest(scores(1, 2, 3), layer_candidates(3, protect=2), 2),
        lambda: remove_lowest(scores(1, 2, 3), layer_candidates(3), 0),
        lambda: remove_run([0.1, 0.2], 2, protect=2),
        lambda: remove_run([0.1], 3),
        lambda: remove_run([0.1, 0.2], 0),
        lambda: greedy_on(build("llama"), layer_candidates(2), 2),
    ],
)
def test_too_many_to_remove(choose: Callable[[], DepthRemoval]) -> None:
    with pytest.raises(RecipeError, match="are to be removed"):
        choose()


def test_scores_that_are_no_numbers() -> None:
    with pytest.raises(NumericsError, match="score of layer 1 is nan"):
        remove_lowest(scores(1, math.nan, 3), layer_candidates(3), 1)
    with pytest.raises(NumericsError, match="score of layer 0 is inf"):
        remove_run([math.inf, 1.0], 2)


def greedy_on(
    model: PreTrainedModel, candidates: list[DepthUnit], count: int, blocks: Any = (), **options: Any
) -> DepthRemoval:
    settings = StreamSettings(**{"batch_size": 2, "held_back": 1, **options})
    return remove_greedily(ModelSource(model), IDS, settings, candidates, count, blocks)


class Skipped(nn.Module):
    """Stands for a decoder layer that hands its input on."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


def meek_first(family: str) -> PreTrainedModel:
    """Four layers, of which the first changes least, so that others are weighed after it has gone."""
    model = build(family, num_hidden_layers=4)
    layer = model.model.layers[0]
    matrices = (layer.self_attn.o_proj, layer.mlp.down_proj)
    norms = [module for name, module in layer.named_children() if name.startswith("post_feedforward")]
    for module in (*matrices, *norms):
        for parameter in module.parameters():
            parameter.detach().mul_(0.05)
    return model


def divergence(family: str, gone: Iterable[DepthUnit]) -> float:
    """KL(dense || the model without some layers and blocks), each token but the last of a sample."""
    model = meek_first(family)
    layers = model.model.layers
    before = logits(model, IDS)[:, :-1].double().log_softmax(-1)
    for layer, part in sorted(gone):
        if part == "layer":
            layers[layer] = Skipped()
        elif type(layers[layer]) is not Skipped:
            module = layers[layer].self_attn if part == "attention" else layers[layer].mlp
            module.register_forward_hook(lambda m, args, out: (0 * out[0], None) if isinstance(out, tuple) else 0 * out)
    after = logits(model, IDS)[:, :-1].double().log_softmax(-1)
    return float(F.kl_div(after, before, reduction="sum", log_target=True)) / (IDS[:, 1:].numel())


def plainly(family: str, candidates: list[DepthUnit], count: int) -> list[tuple[DepthUnit, dict[DepthUnit, float]]]:
    steps: list[tuple[DepthUnit, dict[DepthUnit, float]]] = []
    gone: list[DepthUnit] = []
    for _ in range(count):
        within = {candidate.layer for candidate in gone if candidate.part == "layer"}
        values = {
            candidate: divergence(family, [*gone, candidate])
            for candidate in candidates
            if candidate not in gone and candidate.layer not in within
        }
        gone.append(min(values, key=values.__getitem__))
        steps.append((gone[-1], values))
    return steps


EVERYTHING = [DepthUnit(layer, part) for layer in range(4) for part in ("attention", "layer", "mlp")]


@pytest.mark.parametrize(("family", "candidates"), [("llama", EVERYTHING[1::3]), ("olmo2", EVERYTHING)])
@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_greedy_removal(family: str, candidates: list[DepthUnit], budget: int) -> None:
    model = meek_first(family)
    removal = greedy_on(model, candidates, 3, find_subblocks(Decoder.find(model)), activation_budget=budget)
    expected = plainly(family, candidates, 3)
    assert expected[0][0].layer == 0
    assert [best for best, _ in removal.steps] == [best for best, _ in expected]
    for (_, found), (_, wanted) in zip(removal.steps, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    assert removal.scores == pytest.approx(
        {key: value for _, values in expected for key, value in values.items()}, 1e-4
    )
    whole = {best.layer for best, _ in expected if best.part == "layer"}
    assert removal.removed == tuple(sorted(b for b, _ in expected if b.part == "layer" or b.layer not in whole))


def test_a_layer_that_goes_takes_its_blocks_along() -> None:
    """Without attention and MLP a layer does nothing more, so that it costs nothing to remove it as a whole."""
    model = build("llama", num_hidden_layers=4)
    layer = model.model.layers[2]
    for linear, scale in ((layer.self_attn.o_proj, 0.1), (layer.mlp.down_proj, 0.01)):
        for parameter in linear.parameters():
            parameter.detach().mul_(scale)
    candidates = [DepthUnit(2, "attention"), DepthUnit(2, "mlp"), *layer_candidates(4)]
    removal = greedy_on(model, candidates, 3, find_subblocks(Decoder.find(model)))
    assert [best for best, _ in removal.steps] == [(2, "mlp"), (2, "attention"), (2, "layer")]
    assert removal.steps[1][1][2, "attention"] == removal.steps[2][1][2, "layer"]
    assert removal.removed == ((2, "layer"),)
    early = greedy_on(model, candidates[2:], 1, find_subblocks(Decoder.find(model)))
    assert early.layers == [2]


def test_each_pass_loads_each_layer_once() -> None:
    source = CountingSource(build("llama", num_hidden_layers=3))
    passed: list[tuple[int, int]] = []
    remove_greedily(
        source, IDS, StreamSettings(), layer_candidates(3), 2, watch=lambda done, total: passed.append((done, total))
    )
    assert source.loads == [0, 0, 1, 2] * 2
    assert passed == [(done, 6) for done in range(1, 7)]


def test_logits_of_few_variants_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", num_hidden_layers=4)
    at_once = greedy_on(model, layer_candidates(4), 1)
    monkeypatch.setattr(variants, "_LOGIT_BYTES", 1)
    monkeypatch.setattr("llmprune.stream.stream.window_positions", lambda *_: 5)
    one_by_one = greedy_on(model, layer_candidates(4), 1)
    assert one_by_one.steps[0][1] == pytest.approx(at_once.steps[0][1], rel=1e-5)


@pytest.mark.parametrize("family", ["gemma3n", "gemma4", "zaya", "glm_moe_dsa"])
def test_layers_that_hand_one_another_more_than_hidden_states(family: str) -> None:
    model = build(family)
    layers = model.config.num_hidden_layers
    with pytest.raises(ModelError, match="reads more than the hidden states of earlier layers"):
        greedy_on(model, layer_candidates(layers), 1)


def test_tokens_that_are_not_in_front() -> None:
    model = build("gemma3n")
    with pytest.raises(ModelError, match="samples and length as the first two dimensions"):
        survey(stream(model, outputs=True), LayerDistance())


def test_a_removal_is_ready_for_json() -> None:
    steps = ((DepthUnit(1, "mlp"), {DepthUnit(0, "layer"): math.inf, DepthUnit(1, "mlp"): 0.5}),)
    removal = DepthRemoval("greedy-kl", (DepthUnit(0, "layer"), DepthUnit(1, "mlp")), steps[0][1], steps)
    assert json.loads(json.dumps(removal.to_dict(), allow_nan=False)) == {
        "method": "greedy-kl",
        "removed": [[0, "layer"], [1, "mlp"]],
        "scores": [[0, "layer", None], [1, "mlp", 0.5]],
        "steps": [{"removed": [1, "mlp"], "kl": [[0, "layer", None], [1, "mlp", 0.5]]}],
    }
    assert removal.layers == [0]
    assert removal.blocks == {1: ["mlp"]}


def test_predictions_that_are_no_numbers() -> None:
    model = build("llama")
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(NumericsError, match="without layer 0, the predictions diverge by nan"):
        greedy_on(model, layer_candidates(2), 1)
