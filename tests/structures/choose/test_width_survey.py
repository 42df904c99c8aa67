"""Measurements of hidden channels against float64 sums over the whole model's activations."""

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from streams import IDS, stream
from tiny_models import build
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.errors import ModelError, NumericsError, RecipeError
from llmprune.structures.choose.width_survey import WIDTH_SCORES, WidthChoice, WidthSurvey
from llmprune.structures.remove.width import plan_width

KEPT = 24


def survey(model: PreTrainedModel, score: str, ids: Tensor = IDS, held_back: int = 0) -> WidthChoice:
    own = WidthSurvey(plan_width(model.config, KEPT), score)
    run = stream(model, ids, held_back=held_back, outputs=True)
    for layer in run:
        own.see(layer)
    own.finish(run)
    return own.result()


def around_norms(model: PreTrainedModel, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Norm -> its inputs and outputs [tokens, hidden] in the model's own forward."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:

        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            seen[name] = args[0].double().flatten(0, 1), output.double().flatten(0, 1)

        model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return seen


def highest(scores: Tensor) -> list[int]:
    return sorted(scores.argsort(descending=True)[:KEPT].tolist())


# Without and with centring, with one added to the gain, with an embedding that is tied, in parallel, with experts.
@pytest.mark.parametrize("family", ["llama-tied", "phi", "qwen3_next", "nemotron", "glm4", "mixtral", "rwkv"])
def test_energies_and_factors(family: str) -> None:
    model = build(family)
    choice = survey(model, "energy")
    seen = around_norms(model, list(choice.energy))
    shares = {}
    for name, (x, _) in seen.items():
        if family in ("phi", "nemotron", "rwkv"):
            x = x - x.mean(-1, keepdim=True)
        shares[name] = (x.square() / x.square().mean(-1, keepdim=True)).mean(0)
    assert choice.channels == highest(sum(shares.values()))
    energy = {name: float(share[choice.channels].sum() / 32) for name, share in shares.items()}
    assert choice.energy == pytest.approx(energy, rel=1e-4)
    assert choice.factors == pytest.approx({name: (p * 32 / KEPT) ** 0.5 for name, p in energy.items()}, rel=1e-4)


def test_the_norms_of_outputs() -> None:
    model = build("llama")
    choice = survey(model, "activation-norm")
    seen = around_norms(model, list(choice.factors))
    assert choice.channels == highest(sum(y.square().mean(0).sqrt() for _, y in seen.values()))


def absolute(tensor: Tensor) -> Tensor:
    return tensor.abs()


@pytest.mark.parametrize(("score", "weigh"), [("magnitude-l1", absolute), ("magnitude-l2", torch.square)])
@pytest.mark.parametrize("tied", [False, True])
def test_all_weights_of_a_channel(score: str, weigh: Callable[[Tensor], Tensor], tied: bool) -> None:
    """In this model nothing else has the hidden size; a tied embedding counts once."""
    model = build("llama", head_dim=16, num_key_value_heads=1, tie_word_embeddings=tied)
    # Heavy where the head and the embedding disagree about the channels.
    with torch.no_grad():
        model.lm_head.weight[:, :16] *= 5
    total = torch.zeros(32, dtype=torch.float64)
    for parameter in model.parameters():
        for dim in range(parameter.dim()):
            if parameter.shape[dim] == 32:
                total += weigh(parameter.detach().double()).movedim(dim, -1).reshape(-1, 32).sum(0)
    assert survey(model, score).channels == highest(total)


@pytest.mark.parametrize(("family", "offset"), [("llama", 0), ("qwen3_next", 1)])
def test_gains(family: str, offset: int) -> None:
    model = build(family)
    names = plan_width(model.config, KEPT).norms
    gains = [(model.get_submodule(name).weight + offset).abs() for name in names]
    assert len(gains) == 5
    assert survey(model, "norm-gain").channels == highest(torch.stack(gains).double().sum(0))


def test_the_samples_held_back_are_not_seen() -> None:
    model = build("llama")
    fewer = survey(model, "activation-norm", IDS[:4])
    assert asdict(survey(model, "activation-norm", IDS, held_back=1)) == asdict(fewer)
    assert asdict(survey(model, "activation-norm", IDS)) != asdict(fewer)


def test_large_tokens_weigh_no_more_than_others() -> None:
    """The energy of one token that is a thousand times as large as the others does not decide."""
    model = build("llama")
    before = survey(model, "energy")
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS[0, 0]] *= 1000
    after = survey(model, "energy")
    name = "model.layers.0.input_layernorm"
    assert after.energy[name] == pytest.approx(before.energy[name], abs=0.05)
    assert len(set(before.channels) & set(after.channels)) >= KEPT - 2


@pytest.mark.parametrize("score", WIDTH_SCORES)
def test_a_choice_is_ready_for_json(score: str) -> None:
    choice = survey(build("llama"), score)
    assert WidthChoice(**json.loads(json.dumps(asdict(choice)))) == choice
    assert choice.score == score
    assert choice.channels == sorted(set(choice.channels))
    assert len(choice.channels) == KEPT


def test_the_model_is_as_before() -> None:
    model = build("llama")
    survey(model, "activation-norm")
    assert "forward" not in vars(model.lm_head)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_score_that_does_not_exist() -> None:
    with pytest.raises(RecipeError, match="width score 'wanda'"):
        WidthSurvey(plan_width(build("llama").config, KEPT), "wanda")


def test_a_survey_that_did_not_end() -> None:
    model = build("llama")
    own = WidthSurvey(plan_width(model.config, KEPT))
    for layer in stream(model):
        own.see(layer)
    with pytest.raises(ModelError, match=r"the norm model\.norm was not used"):
        own.result()


def test_activations_that_are_not_finite() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS[0, 0], 3] = torch.nan
    with pytest.raises(NumericsError, match=r"the input of model\.layers\.0\.input_layernorm"):
        survey(model, "energy")
