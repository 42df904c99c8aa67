"""Layers that read the same input multiply it in one kernel launch: q, k and v; gate and up.

Decode is bound by the bytes of the weights and by kernel launches. Which layers share an input is observed in one
forward pass of a token, not inferred from their names.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.kernels import nm_linear
from llmprune.serving.forms import Fragments, multiply_fragments
from llmprune.serving.sparse_linear import SparseLinear

# Rows of W in one tile of fragments; a fused matrix is split between tiles.
_TILE = 16


class Fusion:
    """One matmul for several layers, computed when the first of them is called, and shared with the others.

    Args:
        layers: settled as fragments, with the same input dimension and dtype; afterwards their weights are views of
            the fused one.
    """

    def __init__(self, layers: list[SparseLinear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.shape = sum(self.sizes), layers[0].in_features
        nm_linear.reserve(layers[0].device, *self.shape)
        # Tiles of rows are stored in sequence, so concatenating them stacks the matrices. The layers keep views of the
        # result: a fusion takes no more memory than they did.
        self.a = torch.cat([layer.held["a"] for layer in layers])
        self.e = torch.cat([layer.held["e"] for layer in layers])
        self.bias = self._fused_bias(layers)
        self._x: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}
        first = 0
        for place, layer in enumerate(layers):
            last = first + layer.out_features // _TILE
            layer.join(self, place, {"a": self.a[first:last], "e": self.e[first:last]})
            first = last

    def multiply(self, x: Tensor, place: int) -> Tensor:
        """The result for the layer at index `place`; x [..., in] is the same object for all layers.

        If a layer is called twice, or with a different x, everything is computed again.
        """
        # By identity: comparing values would wait for the GPU. The input is kept alive, so that its address is not
        # reused, but only until all results are taken, so that activations live no longer than without a fusion.
        if x is not self._x or place not in self._waiting:
            product = multiply_fragments(self.a, self.e, x, self.bias, self.shape)
            self._x, self._waiting = x, dict(enumerate(product.split(self.sizes, dim=-1)))
        result = self._waiting.pop(place)
        if not self._waiting:
            self._x = None
        return result

    @staticmethod
    def _fused_bias(layers: list[SparseLinear]) -> Tensor | None:
        if all(layer.bias is None for layer in layers):
            return None
        zeros = layers[0].held["a"].new_zeros
        return torch.cat([zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers])


@torch.no_grad()
def fuse(model: nn.Module, **example: Any) -> list[list[str]]:
    """Fuse the 2:4 layers that read the same tensor.

    Args:
        model: loaded and settled.
        example: arguments of one short forward pass, for example `input_ids` of one token.

    Returns:
        The names of the layers in each fusion.
    """
    readers = _readers(model, example)
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    fused = []
    for layers in readers:
        fitting = [layer for layer in layers if _fits(layer)]
        if len(fitting) > 1:
            Fusion(fitting)
            fused.append([names[layer] for layer in fitting])
    return fused


def _fits(layer: SparseLinear) -> bool:
    return type(layer.form) is Fragments and layer.out_features % _TILE == 0 and layer.fusion is None


def _readers(model: nn.Module, example: dict[str, Any]) -> list[list[SparseLinear]]:
    """The layers that read each input tensor, among those called once in a forward pass."""
    calls: dict[int, list[SparseLinear]] = defaultdict(list)
    alive: list[Tensor] = []  # so that no id is reused

    def note(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, SparseLinear)
        alive.append(arguments[0])
        calls[id(arguments[0])].append(layer)

    hooks = [layer.register_forward_pre_hook(note) for layer in model.modules() if isinstance(layer, SparseLinear)]
    try:
        model(**example)
    finally:
        for hook in hooks:
            hook.remove()
    # A layer that is called twice, with different inputs, would compute its neighbours' results in vain.
    times: dict[SparseLinear, int] = defaultdict(int)
    for layers in calls.values():
        for layer in layers:
            times[layer] += 1
    groups: dict[tuple[int, torch.dtype, torch.device, int], list[SparseLinear]] = defaultdict(list)
    for key, layers in calls.items():
        for layer in layers:
            if times[layer] == 1:
                groups[layer.in_features, layer.dtype, layer.device, key].append(layer)
    return list(groups.values())
