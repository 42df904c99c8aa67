"""Layers that read the same input multiply it in one kernel launch: q, k and v; gate and up.

Decode is bound by the bytes of the weights and by kernel launches; on a CPU, by the waking of threads. Which layers
share an input is observed in one forward pass of a token, not inferred from their names.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.kernels import cpu, nm_linear
from llmprune.serving.cpu_forms import CpuForm
from llmprune.serving.forms import Fragments, multiply_fragments
from llmprune.serving.sparse_linear import SparseLinear

# Rows of W in one tile of fragments; a fused matrix is split between tiles.
_TILE = 16


class Fusion:
    """One matmul for several layers, computed when the first of them is called, and shared with the others.

    Args:
        layers: settled in the same form, with the same input dimension and dtype.

    Attributes:
        sizes: the output dimension of each layer.
        shape: (out, in) of all layers together.
        bias: of all layers, [out], or None.
    """

    def __init__(self, layers: Sequence[SparseLinear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.shape = sum(self.sizes), layers[0].in_features
        self.bias = _fused_bias(layers)
        self._x: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def multiply(self, x: Tensor, place: int) -> Tensor:
        """The result for the layer at index `place`; x [..., in] is the same object for all layers.

        If a layer is called twice, or with a different x, everything is computed again.
        """
        # By identity: comparing values would wait for the GPU. The input is kept alive, so that its address is not
        # reused, but only until all results are taken, so that activations live no longer than without a fusion.
        if x is not self._x or place not in self._waiting:
            self._x, self._waiting = x, dict(enumerate(self.product(x).split(self.sizes, dim=-1)))
        result = self._waiting.pop(place)
        if not self._waiting:
            self._x = None
        return result

    def product(self, x: Tensor) -> Tensor:
        """The results of all layers for x [..., in], one after another: [..., out]."""
        raise NotImplementedError


class FragmentFusion(Fusion):
    """2:4 on sparse tensor cores: afterwards the layers' weights are views of the fused one."""

    def __init__(self, layers: Sequence[SparseLinear]) -> None:
        super().__init__(layers)
        nm_linear.reserve(layers[0].device, *self.shape)
        # Tiles of rows are stored in sequence, so concatenating them stacks the matrices. The layers keep views of the
        # result: a fusion takes no more memory than they did.
        self.a = torch.cat([layer.held["a"] for layer in layers])
        self.e = torch.cat([layer.held["e"] for layer in layers])
        first = 0
        for place, layer in enumerate(layers):
            last = first + layer.out_features // _TILE
            layer.join(self, place, {"a": self.a[first:last], "e": self.e[first:last]})
            first = last

    def product(self, x: Tensor) -> Tensor:
        """The results of all layers."""
        return multiply_fragments(self.a, self.e, x, self.bias, self.shape)


class CpuFusion(Fusion):
    """Matrices for the CPU kernels, which multiply any number of them at once: threads are woken once."""

    def __init__(self, layers: Sequence[SparseLinear]) -> None:
        super().__init__(layers)
        for place, layer in enumerate(layers):
            layer.join(self, place, layer.held)
        # The layers' own parameters, so that a copy of both has one copy of the weights.
        self.packed = [layer.held["packed"] for layer in layers]

    def product(self, x: Tensor) -> Tensor:
        """The results of all layers."""
        return cpu.linear(x, self.packed, self.bias, self.sizes)


@torch.no_grad()
def fuse(model: nn.Module, **example: Any) -> list[list[str]]:
    """Fuse the layers that read the same tensor and are in a form that can be fused: 2:4 on a GPU, any on a CPU.

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
        fitting: dict[object, list[SparseLinear]] = defaultdict(list)
        for layer in layers:
            if layer.fusion is None and (kind := _kind(layer)) is not None:
                fitting[kind].append(layer)
        for some in fitting.values():
            if len(some) > 1:
                (FragmentFusion if type(some[0].form) is Fragments else CpuFusion)(some)
                fused.append([names[layer] for layer in some])
    return fused


def can_fuse(model: nn.Module) -> bool:
    """Whether a layer of a model is in a form that can be fused."""
    return any(isinstance(layer, SparseLinear) and _kind(layer) is not None for layer in model.modules())


def _kind(layer: SparseLinear) -> object:
    """What has to be equal for layers to be multiplied together; None if the layer cannot be."""
    if type(layer.form) is Fragments:
        return Fragments.name if layer.out_features % _TILE == 0 else None
    if isinstance(layer.form, CpuForm):
        found = cpu.library().describe(layer.held["packed"])
        return layer.form.name, found.kind, found.stored, found.dtype
    return None


def _fused_bias(layers: Sequence[SparseLinear]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([
        torch.zeros(layer.out_features, dtype=layer.dtype, device=layer.device) if layer.bias is None else layer.bias
        for layer in layers
    ])  # fmt: skip


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
