"""Streams over tiny models, and models whose layers are wired in unusual ways."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import build, random_ids
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llmprune.models.decoder import Decoder, prunable_matrices
from llmprune.models.source import ModelSource
from llmprune.statistics import Gram
from llmprune.stream.observation import Group
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream, StreamSettings

IDS = random_ids(5, 12)


def stream(model: PreTrainedModel, ids: Tensor = IDS, **settings: Any) -> Stream:
    return Stream(ModelSource(model), ids, StreamSettings(**{"batch_size": 2, **settings}))


def observe(layer: ResidentLayer, needs: Any = Gram) -> list[Group]:
    return layer.observe(dict.fromkeys(layer.matrices, needs))


def final_states(model: PreTrainedModel, **settings: Any) -> list[Tensor]:
    """Prune half of every matrix by sign on the way, so that later layers depend on it."""
    run = stream(model, outputs=True, **settings)
    for layer in run:
        observe(layer)
        for name in layer.matrices:
            weight = layer.weight(name)
            layer.replace(name, weight * (weight > 0))
    return [run.hidden[batch] for batch in range(len(run.batches))]


def walk(run: Stream, visit: Callable[[ResidentLayer], Any]) -> None:
    for layer in run:
        visit(layer)


class Block(GradientCheckpointingLayer):
    """A layer as a test wants it: `act(itself, hidden states, what else it is handed)`."""

    def __init__(self, act: Callable[..., Any], index: int) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.act, self.index = act, index

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.act(self, x, *args, **kwargs)


def wired(act: Callable[..., Any], run: Callable[[nn.ModuleList, Tensor], Tensor]) -> PreTrainedModel:
    """A Llama with other layers, called by `run(layers, hidden states)`."""
    model = build("llama", num_hidden_layers=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.ModuleList([Block(act, index).requires_grad_(False) for index in range(4)])
    model.model.layers = layers
    inner = model.model.forward

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        model.model.layers = nn.ModuleList()
        try:
            output = inner(input_ids=input_ids, **kwargs)
        finally:
            model.model.layers = layers
        return output

    embed = model.model.embed_tokens

    def embed_and_run(ids: Tensor) -> Tensor:
        return run(layers, F.embedding(ids, embed.weight))

    embed.forward = embed_and_run
    model.model.forward = forward
    return model


def in_turn(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


# (Layer, parameter inside it) -> mean gradient, mean squared gradient.
Known = dict[tuple[int, str], tuple[Tensor, Tensor]]


def matrix_names(model: PreTrainedModel) -> dict[int, list[str]]:
    layers = Decoder.find(model).layers
    return {i: sorted({m.parameter for m in prunable_matrices(layer, "")}) for i, layer in enumerate(layers)}


def whole_gradients(model: PreTrainedModel, names: dict[int, list[str]], ids: Tensor) -> Known:
    """Gradients of the loss by automatic differentiation of the whole model, a sample at a time."""
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
