"""Tokens of massive activations: how they are weighed in the statistics, and how much of them there is."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny_models import build, random_ids, recipe, save
from torch import Tensor

from llmprune import prune
from llmprune.errors import RecipeError
from llmprune.models.source import ModelSource
from llmprune.recipe.recipe import load_recipe
from llmprune.statistics import ColumnNorm, Gram
from llmprune.storage.report import MatrixRow, load_report
from llmprune.stream.observation import Group
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.stream.weighting import TokenWeight, TokenWeighting

IDS = random_ids(6, 16)
UP = "model.layers.0.mlp.up_proj"
SINK = 3


def with_sink() -> ModelSource:
    """A model in which the first token of every sequence is a hundred times as large as the others."""
    model: Any = build("llama")
    model.model.embed_tokens.weight.data[SINK] *= 100
    # A norm in front would scale every token to the same size.
    model.model.layers[0].post_attention_layernorm = torch.nn.Identity()
    return ModelSource(model)


def ids() -> Tensor:
    tokens = torch.where(IDS == SINK, SINK + 1, IDS)
    tokens[:, 0] = SINK
    return tokens


def observed(kind: TokenWeight, need: type[ColumnNorm] | type[Gram] = Gram, batch: int = 4) -> tuple[Group, Tensor]:
    """The statistics of one matrix, and its inputs [tokens, in]."""
    layer = next(iter(Stream(with_sink(), ids(), StreamSettings(batch_size=batch))))
    (group,) = layer.observe({UP: need}, kind)
    return group, inputs_of(layer)


def inputs_of(layer: ResidentLayer) -> Tensor:
    rows: list[Tensor] = []
    hook = layer.module.get_submodule("mlp").register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    with torch.no_grad():
        for batch in range(len(layer.stream.batches)):
            layer.forward(layer.stream.hidden[batch], batch)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in rows])


def weights(x: Tensor, kind: TokenWeight) -> Tensor:
    """The factor of each token, in float64."""
    sizes = x.double().square().mean(-1).sqrt()
    if kind == "clip":
        return (2 * sizes[:16].median() / sizes).clamp(max=1)
    return 1 / sizes if kind == "normalise" else torch.ones_like(sizes)


@pytest.mark.parametrize("kind", get_args(TokenWeight))
@pytest.mark.parametrize("need", [Gram, ColumnNorm])
def test_statistics_are_those_of_weighed_tokens(kind: TokenWeight, need: type[Gram] | type[ColumnNorm]) -> None:
    group, x = observed(kind, need)
    scaled = x.double() * weights(x, kind)[:, None]
    assert group.statistics is not None
    wanted = scaled.square().sum(0)
    torch.testing.assert_close(group.statistics.squares.double(), wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))
    if isinstance(group.statistics, Gram):
        wanted = scaled.T @ scaled
        found = group.statistics.products.double()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    assert group.statistics.tokens == ids().numel()


@pytest.mark.parametrize("kind", get_args(TokenWeight))
def test_the_batch_size_makes_no_difference(kind: TokenWeight) -> None:
    one, other = (observed(kind, batch=batch)[0].statistics for batch in (1, 6))
    assert isinstance(one, Gram)
    assert isinstance(other, Gram)
    torch.testing.assert_close(one.products, other.products, rtol=1e-4, atol=1e-5 * float(one.squares.max()))


def test_the_share_of_the_largest_tokens_is_of_unweighed_ones() -> None:
    for kind in get_args(TokenWeight):
        group, x = observed(kind)
        energies = x.double().square().sum(-1)
        # 1 % of 96 tokens is one at least.
        assert group.top_tokens == pytest.approx(float(energies.max() / energies.sum()), rel=1e-4)
        assert group.top_tokens is not None
        assert 0.1 < group.top_tokens < 0.5
    assert Group(["x"], None).top_tokens is None
    assert Group(["x"], None, energies=[torch.zeros(3)]).top_tokens == 0


def test_tokens_of_zeros_stay_zero() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    for kind in get_args(TokenWeight):
        weighed = TokenWeighting(kind)(rows, rows.square().mean(-1), 2)
        assert weighed[0].tolist() == [0, 0]
        assert torch.isfinite(weighed).all()
    assert TokenWeighting("normalise")(rows, rows.square().mean(-1), 2)[1].square().mean() == pytest.approx(1)


def test_a_recipe_says_how_and_the_report_how_much(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    settings = recipe(pattern="2:4", method="sparsegpt")
    plain = prune(source, {**settings, "statistics": {"token_weight": "none"}}, tmp_path / "plain")
    weighed = prune(source, settings, tmp_path / "weighed")
    assert [row.zeros for row in plain.rows] == [row.zeros for row in weighed.rows]
    assert [row.error for row in plain.rows] != [row.error for row in weighed.rows]
    shares = [row.top_tokens for row in load_report(tmp_path / "plain").rows]
    assert all(share is not None and 0 < share <= 1 for share in shares)
    with pytest.raises(RecipeError, match='token_weight is "normalize"'):
        load_recipe({**settings, "statistics": {"token_weight": "normalize"}})
    with pytest.raises(RecipeError, match="unknown key 'weight' in statistics"):
        load_recipe({**settings, "statistics": {"weight": "clip"}})


def test_reports_of_before_have_no_share(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    row = prune(source, recipe(pattern=0.5, method="magnitude"), tmp_path / "out").rows[0]
    assert row.top_tokens is None
    old = {key: getattr(row, key) for key in row.__slots__ if key != "top_tokens"}
    assert MatrixRow(**old) == row
