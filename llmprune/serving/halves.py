"""Dense layers that compute in float32 and hold their weights in the 16 bits of their file.

A processor without instructions for a 16-bit dtype computes in float32. Weights in float32 would take twice the memory,
and one token is bound by reading them: the LM head, which stays dense, and all others of a dense model.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmprune.kernels import cpu
from llmprune.serving.cpu_forms import MEASURED_WEIGHTS


class _Halves(nn.Module):
    """What the two layers share: `halves`, the weight's bits as int16, so that it is not taken for the model's dtype.

    Attributes:
        stored: bfloat16 or float16.
        asked: whether somebody has read the weight, which makes a copy.
    """

    stored: torch.dtype
    asked: bool

    @property
    def narrow(self) -> Tensor:
        """The weight as it is stored."""
        return self._parameters["halves"].detach().view(self.stored)  # type: ignore[union-attr]

    def widen(self, weight: nn.Parameter | None = None) -> None:
        """Become the ordinary layer again, with its weight [out, in] in float32, or the one given."""
        wide = weight if weight is not None else nn.Parameter(self.narrow.float(), requires_grad=False)
        del self._parameters["halves"]
        self.__class__ = nn.Linear if isinstance(self, nn.Linear) else nn.Embedding  # type: ignore[assignment]
        self.register_parameter("weight", wide)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "halves" in self.__dict__["_parameters"]:
            self.asked = True
            return self.narrow.float()
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # torch passes a function without its purpose: an empty tensor shows whether it casts or moves.
        probe = fn(torch.empty(0, dtype=torch.float32, device="cpu"))
        if (probe.dtype, probe.device.type) != (torch.float32, "cpu"):
            self.widen()
        return nn.Module._apply(self, fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.narrow.float()
        if (bias := self._parameters.get("bias")) is not None:
            destination[prefix + "bias"] = bias if keep_vars else bias.detach()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.widen()
        self._load_from_state_dict(*arguments)


class HalvesLinear(_Halves, nn.Linear):
    """A linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in]."""
        if torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.narrow.float(), self.bias)
        return cpu.halves_linear(x, self.narrow, self.bias)


class HalvesEmbedding(_Halves, nn.Embedding):
    """An embedding, often the one that an LM head is tied to."""

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of ids [...], float32: [..., features]."""
        return F.embedding(ids, self.narrow).float()


_KINDS: dict[type[nn.Module], type[_Halves]] = {nn.Linear: HalvesLinear, nn.Embedding: HalvesEmbedding}


@torch.no_grad()
def narrow(model: nn.Module, stored: torch.dtype, **example: Any) -> None:
    """Hold large dense weights in the dtype in which they are stored, where that loses nothing.

    A weight that the model itself reads, past its layer, stays as it is.

    Args:
        model: on the CPU, in float32, from a checkpoint of this dtype.
        stored: bfloat16 or float16.
        example: arguments of one short forward pass, for example `input_ids` of one token.
    """
    changed = []
    for weight, layers in _owners(model).items():
        if all(_fits(layer, weight) for layer in layers) and torch.equal(weight.to(stored).float(), weight):
            room = cpu.new_memory(weight.numel() * stored.itemsize).view(stored).view(weight.shape)
            halves = nn.Parameter(room.copy_(weight).view(torch.int16), requires_grad=False)
            changed.append([_narrowed(layer, halves, stored) for layer in layers])
    model(**example)
    for halved in changed:
        if any(layer.asked for layer in halved):
            weight = nn.Parameter(halved[0].narrow.float(), requires_grad=False)
            for layer in halved:
                layer.widen(weight)


def _owners(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """The layers of each large parameter: several if it is tied."""
    owners: dict[nn.Parameter, list[nn.Module]] = defaultdict(list)
    for layer in model.modules():
        for parameter in layer._parameters.values():
            if parameter is not None and parameter.numel() >= MEASURED_WEIGHTS:
                owners[parameter].append(layer)
    return owners


def _fits(layer: nn.Module, weight: nn.Parameter) -> bool:
    # Subclasses may do more with their weight.
    return type(layer) in _KINDS and layer._parameters.get("weight") is weight and type(weight.data) is Tensor


def _narrowed(layer: nn.Module, halves: nn.Parameter, stored: torch.dtype) -> _Halves:
    kind = _KINDS[type(layer)]
    del layer._parameters["weight"]
    layer.__class__ = kind
    assert isinstance(layer, _Halves)
    layer.register_parameter("halves", halves)
    layer.stored, layer.asked = stored, False
    return layer
