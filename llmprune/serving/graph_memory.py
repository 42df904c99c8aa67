"""Keys and values at fixed addresses, which the recorded steps of `decode_graphs` read and write."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from llmprune.errors import ModelError


class Memory:
    """Keys and values of all layers, as flat tensors that batches of any shape share.

    A recorded step reads and writes fixed addresses. As long as the flat tensors exist, each batch shape has the same
    addresses every time, and its step remains valid; once they are reallocated, all recorded steps are invalid.

    Attributes:
        length: int64 scalar on the device: number of tokens before those of the current forward pass.
        owner: the cache whose contents are stored here.
    """

    def __init__(self) -> None:
        self.length = torch.zeros(())
        self.owner: GraphCache | None = None
        self._states: list[tuple[Tensor, Tensor]] = []
        self._shapes: list[tuple[tuple[int, int], ...]] = []

    def reserve(self, like: DynamicCache, batch: int, room: int) -> bool:
        """Make space for `batch` sequences of `room` tokens of a model whose cache is shaped `like` this one.

        Returns:
            Whether all addresses are new, and the previous contents lost.
        """
        # Tensors created in inference mode could not be modified outside it.
        with torch.inference_mode(False):
            if not self._states:
                pairs = [(layer.keys, layer.values) for layer in like.layers]
                self._shapes = [tuple((state.shape[1], state.shape[3]) for state in pair) for pair in pairs]
                self._states = [(keys.new_empty(0), values.new_empty(0)) for keys, values in pairs]
                self.length = torch.zeros((), dtype=torch.int64, device=pairs[0][0].device)
            return self.extend(batch, room)

    def extend(self, batch: int, room: int) -> bool:
        """`reserve`, once the shapes are known."""
        # All layers hold the same tokens, so the first one's keys show whether there is space in all.
        heads, width = self._shapes[0][0]
        if batch * heads * room * width <= self._states[0][0].numel():
            return False
        with torch.inference_mode(False):
            self._states = [
                (
                    keys.new_empty(batch * shapes[0][0] * room * shapes[0][1]),
                    values.new_empty(batch * shapes[1][0] * room * shapes[1][1]),
                )
                for (keys, values), shapes in zip(self._states, self._shapes, strict=True)
            ]
        return True

    def views(self, batch: int, room: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The keys and the values of each layer, both [batch, heads, room, width]."""
        for pair, shapes in zip(self._states, self._shapes, strict=True):
            keys, values = (
                state[: batch * heads * room * width].view(batch, heads, room, width)
                for state, (heads, width) in zip(pair, shapes, strict=True)
            )
            yield keys, values

    def cache(self, batch: int, room: int) -> Cache:
        """The cache that a model reads and writes in a forward pass."""
        return Cache(layers=[_Layer(keys, values, self.length) for keys, values in self.views(batch, room)])


class GraphCache(Cache):  # type: ignore[misc] # transformers is not typed
    """The keys and values of one call of `generate`, in memory that the next call reuses.

    Args:
        memory: where they are stored.
        batch: number of sequences.
        length: tokens in each.
        room: tokens for which each has space.
    """

    def __init__(self, memory: Memory, batch: int, length: int, room: int) -> None:
        # Without layers, transformers leaves the masks to the model, whose forward gets a different cache.
        super().__init__(layers=[])
        self.memory, self.batch, self.length, self.room = memory, batch, length, room
        memory.owner = self

    def fill(self, past: DynamicCache) -> None:
        """Copy the contents of a growing cache; for a sliding window, these are the last tokens."""
        pairs = [(layer.keys, layer.values) for layer in past.layers]
        for views, states in zip(self._views(), pairs, strict=True):
            _write(views, states, self.length)

    def grow(self, tokens: int) -> bool:
        """Double the space until this many tokens fit; returns whether all addresses are new."""
        room = self.room
        while room < tokens:
            room *= 2
        if room == self.room:
            return False
        old = [tuple(state[:, :, : self.length] for state in states) for states in self._views()]
        moved = self.memory.extend(self.batch, room)
        self.room = room
        for views, states in zip(self._views(), old, strict=True):
            # Cloned, since both may overlap in memory.
            _write(views, tuple(state.clone() for state in states), self.length)
        return moved

    def require_memory(self) -> None:
        """Refuse to continue after a later call has taken over the memory.

        Raises:
            ModelError: a later call has taken it over.
        """
        if self.memory.owner is not self:
            raise ModelError(
                "the keys and values of this cache have been overwritten by a later call of generate",
                expected="one call at a time to a model with CUDA graphs",
                fix="pass the whole prompt without past_key_values, or load the model without graphs",
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in each sequence."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i continue from sequence `beam_idx[i]`."""
        self.require_memory()
        for states in self._views():
            for state in states:
                past = state[:, :, : self.length]
                # In place, where the recorded steps read; the selection is a copy, so nothing is overwritten too early.
                past.copy_(past.index_select(0, beam_idx.to(past.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; their number is given as a negative one, as in transformers."""
        self.length += tokens_to_remove

    def reset(self) -> None:
        """Drop all tokens."""
        self.length = 0

    def _views(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.memory.views(self.batch, self.room)


def is_adoptable(past: object) -> bool:
    """Whether a `GraphCache` can continue with the contents of a cache."""
    # Exact types: subclasses keep more (quantised or offloaded states), which would be lost.
    if not isinstance(past, DynamicCache) or type(past) is not DynamicCache or past.offloading:
        return False
    kinds = DynamicLayer, DynamicSlidingWindowLayer
    return bool(past.layers) and all(type(layer) in kinds and layer.is_initialized for layer in past.layers)


class _Layer(StaticLayer):  # type: ignore[misc] # transformers is not typed
    """Keys and values of one layer; their number is in a tensor that all layers read and the host updates."""

    def __init__(self, keys: Tensor, values: Tensor, length: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, length
        self.dtype, self.device, self.batch_size = keys.dtype, keys.device, keys.shape[0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append to the existing tokens, and return all positions, empty ones too: the shape must not change.

        The length is not updated: all layers of a forward pass read the same one, and the host updates it afterwards.
        """
        slots = self.cumulative_length.view(1)
        if key_states.shape[2] > 1:
            slots = slots + torch.arange(key_states.shape[2], device=self.device)
        self.keys.index_copy_(2, slots, key_states)
        self.values.index_copy_(2, slots, value_states)
        return self.keys, self.values


def _write(views: tuple[Tensor, ...], states: tuple[Tensor, ...], length: int) -> None:
    """Fill a layer with tokens that end at `length`; the rest becomes zero, since NaN would pass through any mask."""
    for view, state in zip(views, states, strict=True):
        view.zero_()
        view[:, :, length - state.shape[2] : length].copy_(state)
