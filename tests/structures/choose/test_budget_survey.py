"""The budget survey's one streamed pass against the whole model with one structure pruned."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import build, random_ids, save
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.errors import ModelError, NumericsError, PatternError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.decoder import Decoder
from llmprune.models.sizes import parameters
from llmprune.models.source import ModelSource, Source
from llmprune.statistics import Gram
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.structures.choose.budget import BudgetPlan, Offer, Share, offer
from llmprune.structures.choose.budget_survey import BudgetSurvey
from llmprune.structures.find.discovery import Structure, find_structures
from llmprune.structures.remove.problem import RemovalSettings
from llmprune.structures.remove.solver import remove_groups

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

IDS, VALIDATION = random_ids(6, 16), random_ids(3, 12, seed=1)
SETTINGS = StreamSettings(batch_size=2)


def offers_of(source: Source) -> list[list[Offer]]:
    return [
        [offer(layer, one, parameters, multiple=4 if one.kind == "ffn" else 1) for one in own if usable(one)]
        for layer, own in zip(source.layers, find_structures(source.decoder), strict=True)
    ]


def usable(structure: Structure) -> bool:
    return structure.refusal is None and structure.kind in ("heads", "ffn")


def survey(source: Source, settings: StreamSettings = SETTINGS, part: float = 0.3) -> BudgetPlan:
    offers = offers_of(source)
    remove = part * sum(own.sizes[0] for one in offers for own in one)
    collector = BudgetSurvey(source, offers, remove, VALIDATION, settings)
    for layer in Stream(source, IDS, settings):
        collector.see(layer)
    return collector.result()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=VALIDATION, use_cache=False).logits.double()


def grams(model: PreTrainedModel, share: Share) -> dict[str, Gram]:
    for layer in Stream(ModelSource(model), IDS, SETTINGS):
        if layer.index == share.layer:
            own = [name for name, matrix in layer.matrices.items() if matrix.parameter == share.consumer]
            return {name: group.statistics for group in layer.observe(dict.fromkeys(own, Gram)) for name in group.names}
    raise AssertionError


def check_share(model: PreTrainedModel, share: Share, columns: int) -> None:
    """Prune one structure of the whole model and compare the divergence, and its error curve at the reference."""
    dense = logits(model).log_softmax(-1)
    source = ModelSource(model)
    parameter = source.layers[share.layer].get_parameter(share.consumer)
    before = parameter.detach().clone()
    shadow = ResidentLayer(Stream(source, VALIDATION, SETTINGS), share.layer)
    lost = energy = 0.0
    for name, gram in grams(model, share).items():
        weight = shadow.weight(name)
        removal = remove_groups(weight, gram.products, columns, share.reference, RemovalSettings(swaps=0))
        shadow.replace(name, removal.weight)
        own, change = weight.double(), (weight - removal.weight).double()
        # The curve includes what the damping adds.
        damped = gram.products.double() + 0.01 * gram.squares.double().mean() * torch.eye(weight.shape[1])
        lost += float((change @ damped @ change.T).trace())
        energy += float((own @ gram.products.double() @ own.T).trace())
    pruned = logits(model).log_softmax(-1)
    with torch.no_grad():
        parameter.copy_(before)
    expected = float(F.kl_div(pruned, dense, reduction="sum", log_target=True)) / VALIDATION.numel()
    assert share.divergence == pytest.approx(expected, rel=1e-3)
    assert share.curve[share.levels.index(share.reference)] == pytest.approx(lost / energy, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_divergences_are_those_of_the_whole_model(family: str) -> None:
    model = build(family)
    columns = {one.consumer: one.columns for one in find_structures(Decoder.find(model))[0] if usable(one)}
    plan = survey(ModelSource(model))
    assert [(share.layer, share.kind) for share in plan.shares] == [
        (0, "heads"), (0, "ffn"), (1, "heads"), (1, "ffn"),
    ]  # fmt: skip
    for share in plan.shares:
        check_share(model, share, columns[share.consumer])


def test_the_dense_model_stays_and_its_stream_goes_on() -> None:
    model = build("llama", dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = ModelSource(model)
    offers = offers_of(source)
    collector = BudgetSurvey(source, offers, 1000.0, VALIDATION, SETTINGS)
    run = Stream(source, IDS, StreamSettings(batch_size=2, outputs=True))
    for layer in run:
        collector.see(layer)
        assert not layer.replaced
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        expected = [model(input_ids=ids, use_cache=False).logits for ids in run.batches]
    assert all(torch.equal(*pair) for pair in zip([x for _, (x,) in run.logits(run.hidden)], expected, strict=True))


def test_a_checkpoint_and_a_full_disk_of_variants_give_the_same(tmp_path: Path) -> None:
    model = build("llama")
    source = CheckpointSource(save(model, tmp_path))
    plan = survey(source, StreamSettings(batch_size=2, activation_budget=0))
    assert plan == survey(ModelSource(model))
    assert all(parameter.is_meta for parameter in source.model.parameters())
    assert plan.size <= plan.budget
    assert plan.groups


def test_the_reference_moves_to_where_something_is_lost() -> None:
    """Most channels are dead, so that the divergence without a quarter of them says nothing."""
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :30] = 0
    shares = [share for share in survey(ModelSource(model)).shares if share.kind == "ffn"]
    assert [share.reference for share in shares] == [32, 32]
    assert all(share.divergence > 1e-6 and share.curve[share.levels.index(28)] < 1e-6 for share in shares)


@pytest.mark.parametrize("family", ["gemma3n", "gemma4", "zaya", "glm_moe_dsa"])
def test_layers_that_hand_one_another_more_than_hidden_states(family: str) -> None:
    with pytest.raises(ModelError, match="reads more than the hidden states of earlier layers"):
        survey(ModelSource(build(family)))


def test_a_layer_whose_numbers_overflow() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"layers\.1.*down_proj"):
        survey(ModelSource(model))


def test_candidates_that_do_not_fit() -> None:
    source = ModelSource(build("llama"))
    offers = offers_of(source)
    with pytest.raises(PatternError, match="can be removed"):
        BudgetSurvey(source, offers, 1e9, VALIDATION)
    with pytest.raises(PatternError, match="in 1 of 2 layers"):
        BudgetSurvey(source, offers[:1], 100.0, VALIDATION)
    with pytest.raises(PatternError, match="0 structures"):
        BudgetSurvey(source, [[], []], 100.0, VALIDATION)
