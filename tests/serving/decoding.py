"""Models whose decoder layers take single tokens in two calls of the CPU library, and the same models without."""

import torch

from llmprune.serving.decode_layers import DecodeLayer
from llmprune.serving.loader import load

IDS = torch.arange(5, 15)[None]


def decoding(model):
    return [layer for layer in model.modules() if isinstance(layer.__dict__.get("forward"), DecodeLayer)]


@torch.no_grad()
def next_logits(model, ids=IDS, **options):
    """Of a token behind a prompt."""
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    return model(ids[:, -1:], past_key_values=cache, **options).logits


def plain(folder):
    model = load(folder, device="cpu", fused=False)
    assert not decoding(model)
    return model
