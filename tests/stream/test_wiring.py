"""What layers return beside hidden states reaches the later ones, or the model is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from streams import IDS, Block, final_states, in_turn, stream, walk, wired
from torch import Tensor, nn

from llmprune.errors import ModelError


def through_tuples(layers: nn.ModuleList, x: Tensor) -> Tensor:
    state = None
    for layer in layers:
        x, state, _ = layer(x=x, state=state)
    return x


def skipping(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """Every layer gets what the first one has returned beside its hidden states."""
    x, first, _ = layers[0](x)
    for layer in layers[1:]:
        x, _, _ = layer(x, first)
    return x


def through_a_mapping(layers: nn.ModuleList, x: Tensor) -> Tensor:
    shared: dict[str, Tensor] = {}
    for layer in layers:
        x = layer(x, shared=shared)
    return x


def plain(block: Block, x: Tensor) -> Tensor:
    return block.linear(x).tanh()


def in_a_list(block: Block, x: Tensor, state: None) -> list[Any]:
    return [plain(block, x), None, None]


def add_state(block: Block, x: Tensor, state: Tensor | None = None) -> tuple[Any, ...]:
    y = block.linear(x) if state is None else block.linear(x) + state
    return y.tanh(), y, {"unused": None}


def add_shared(block: Block, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
    """The first two layers leave something for the others."""
    y = block.linear(x)
    if block.index < 2:
        shared[f"from {block.index}"] = y
        return y
    return (y + shared[f"from {block.index % 2}"]).tanh()


@pytest.mark.parametrize(
    ("act", "run"),
    [
        (plain, in_turn),
        (in_a_list, through_tuples),
        (add_state, through_tuples),
        (add_state, skipping),
        (add_shared, through_a_mapping),
    ],
    ids=["tensor", "list", "state of the layer before", "state of the first layer", "a mapping that all share"],
)
def test_what_layers_return_reaches_the_next_ones(act: Callable[..., Any], run: Callable[..., Any]) -> None:
    model = wired(act, run)
    streamed = final_states(model)
    with torch.no_grad():
        for ids, states in zip(IDS.split(2), streamed, strict=True):
            assert torch.equal(run(model.model.layers, F.embedding(ids, model.model.embed_tokens.weight)), states)


def test_values_are_carried_no_longer_than_needed() -> None:
    run = stream(wired(add_state, through_tuples))
    held = [run.calls.nbytes for _ in run]
    assert held[1] == held[2] == held[3] == IDS.numel() * 32 * 4


def broken(change: Callable[[Tensor], Tensor]) -> Callable[[nn.ModuleList, Tensor], Tensor]:
    def run(layers: nn.ModuleList, x: Tensor) -> Tensor:
        for layer in layers:
            x = change(layer(x))
        return x

    return run


def backwards(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in reversed(layers):
        x = layer(x)
    return x


def repeated(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in (*layers[:2], *layers):
        x = layer(x)
    return x


def half(layers: nn.ModuleList, x: Tensor) -> Tensor:
    return in_turn(layers[:2], x)


def computed_state(layers: nn.ModuleList, x: Tensor) -> Tensor:
    state = None
    for layer in layers:
        x, state, _ = layer(x, None if state is None else state * 2)
    return x


@pytest.mark.parametrize(
    ("act", "run", "message"),
    [
        (plain, broken(lambda x: x / 2), "changes the hidden states between its decoder layers"),
        (plain, broken(lambda x: x.mul_(0.5)), "changes the hidden states between its decoder layers"),
        (plain, broken(lambda x: x[:, 1:]), "changes the hidden states between its decoder layers"),
        (plain, broken(lambda x: x.double().float()), "changes the hidden states between its decoder layers"),
        (plain, backwards, r"calls layer 3 of model\.layers after 0 others"),
        (plain, repeated, r"calls layer 0 of model\.layers after 2 others"),
        (plain, half, r"called 2 of 4 layers in model\.layers"),
        (add_state, computed_state, "computes something from what a decoder layer returns"),
    ],
)
def test_wiring_that_cannot_be_streamed_is_refused(act: Any, run: Callable[..., Any], message: str) -> None:
    model = wired(act, run)
    with pytest.raises(ModelError, match=message):
        walk(stream(model), lambda layer: None)
