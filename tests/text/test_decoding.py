"""Decoding that copies no cache and reads keys and values once."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmprune.text.decoding import grouped_attention, with_room

TOKENS = torch.randint(60, (3, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def step_by_step(model: Any, room: bool) -> Iterator[Tensor]:
    """The logits after each token, with the cache of before."""
    cache = None
    for ids in TOKENS.split(1, dim=1):
        output = model(input_ids=ids, use_cache=True, past_key_values=cache)
        cache = getattr(output, "past_key_values", None)
        if room:
            cache = with_room(cache, TOKENS.shape[1])
        yield output.logits


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_decodes_the_same(family: str) -> None:
    model = build(family)
    plain = list(step_by_step(model, room=False))
    with grouped_attention():
        roomy = list(step_by_step(model, room=True))
    for expected, logits in zip(plain, roomy, strict=True):
        torch.testing.assert_close(logits, expected)


def test_keys_stay_where_they_are() -> None:
    cache = DynamicCache()
    states = torch.randn(2, 1, 3, 4)
    cache.update(states, states, 0)
    with_room(cache, 5)
    before = cache.layers[0].keys.data_ptr()
    keys, values = cache.update(states[:, :, :2], -states[:, :, :2], 0)
    assert keys.data_ptr() == before
    assert torch.equal(keys, torch.cat([states, states[:, :, :2]], dim=2))
    assert torch.equal(values, torch.cat([states, -states[:, :, :2]], dim=2))
    assert cache.get_seq_length() == 5


def test_new_caches_are_of_the_library() -> None:
    cache = DynamicCache(config=build("llama").config)
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}


def test_other_caches_are_left_alone() -> None:
    assert with_room(None, 4) is None
    assert with_room({"state": 1}, 4) == {"state": 1}


def test_attention_is_the_library_s_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def interrupt() -> None:
        with grouped_attention():
            raise ValueError(str(ALL_ATTENTION_FUNCTIONS["sdpa"] is before))

    with pytest.raises(ValueError, match="False"):
        interrupt()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", print)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is print
