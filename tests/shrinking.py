"""Cut every structure of a kind out of a tiny model: the shrunk state, and the same model with zeros."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache

import torch
from tiny_models import build
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.models.decoder import Decoder
from llmprune.structures.find.discovery import Structure, find_structures
from llmprune.structures.remove.cuts import Cut, mask, routed_without, shrink

Cuts = dict[int, list[Cut]]


@cache
def structures_of(family: str) -> list[list[Structure]]:
    """The structures of a tiny model of a family, found once for all tests, which do not change them."""
    return find_structures(Decoder.find(build(family)))


def cut_all(found: list[list[Structure]], kind: str, part: float = 0.3) -> tuple[Cuts, list[str]]:
    """Cuts of every structure of a kind, neither its first nor its last group, and why others are refused."""
    cuts: Cuts = {}
    refusals = []
    for layer, structures in enumerate(found):
        for structure in structures:
            if structure.kind == kind and structure.refusal:
                refusals.append(structure.refusal)
            elif structure.kind == kind:
                last = 1 + max(int(structure.groups * part), 1)
                cuts.setdefault(layer, []).append(Cut(structure, tuple(range(1, last))))
    return cuts, refusals


def shrunk_state(model: PreTrainedModel, cuts: Cuts) -> dict[str, Tensor]:
    path = Decoder.find(model).path
    state = dict(model.state_dict())
    for layer, own in cuts.items():
        prefix = f"{path}.{layer}."
        inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        state |= {prefix + name: tensor for name, tensor in shrink(inside, own).items()}
    return state


def masked_logits(model: PreTrainedModel, cuts: Cuts, ids: Tensor) -> Tensor:
    """The logits of the full-size model, in which the groups are zero from now on."""
    layers = Decoder.find(model).layers
    with torch.no_grad(), ExitStack() as stack:
        for layer, own in cuts.items():
            for cut in own:
                if cut.structure.kind == "experts":
                    stack.enter_context(routed_without(layers[layer], cut))
                else:
                    mask(layers[layer], cut)
        return logits(model, ids)


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def by_kind(found: list[list[Structure]], layer: int, kind: str) -> Sequence[Structure]:
    return [structure for structure in found[layer] if structure.kind == kind]
