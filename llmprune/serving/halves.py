"""Dense weights that stay in the 16 bits of their file while the model computes in float32.

A processor without instructions for a 16-bit dtype computes in float32. Weights in float32 would take twice the memory,
and one token is bound by reading them: the LM head, which stays dense, and all others of a dense model.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmprune.devices import return_freed_memory
from llmprune.kernels import cpu
from llmprune.serving.cpu_forms import MEASURED_WEIGHTS
from llmprune.serving.dense_product import DenseLinear
from llmprune.serving.sparse_linear import SparseLinear


class HalvesEmbedding(nn.Embedding):
    """An embedding, often the one that an LM head is tied to, whose rows are used in another dtype.

    Attributes:
        computed: the dtype of the rows that it returns.
    """

    computed = torch.float32

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of ids [...]: [..., features]."""
        return F.embedding(ids, self.weight, self.padding_idx).to(self.computed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # torch passes a function without its purpose: an empty tensor shows whether it casts.
        self.computed = fn(torch.empty(0, dtype=self.computed, device="cpu")).dtype
        return super()._apply(fn, recurse)


@torch.no_grad()
def keep_halves(model: nn.Module, stored: torch.dtype, **example: Any) -> None:
    """Hold large dense weights in the dtype in which they are stored, where that loses nothing.

    They stay ordinary parameters. One whose dtype the model itself takes for that of activations stays in float32.

    Args:
        model: on the CPU, in float32, with the layers that `cpu_forms.measure_products` leaves.
        stored: bfloat16 or float16, the dtype of its file.
        example: arguments of one short forward pass, for example `input_ids` of one token.
    """
    halved = []
    for weight, layers in _owners(model).items():
        if all(_fits(layer, weight) for layer in layers) and torch.equal(weight.to(stored).float(), weight):
            # In huge pages: a look-up for each 4 KB costs a fifth of one token's time.
            room = cpu.new_memory(weight.numel() * stored.itemsize).view(stored).view(weight.shape)
            weight.data = room.copy_(weight)
            halved.append(weight)
            for layer in layers:
                if type(layer) is nn.Embedding:
                    layer.__class__ = HalvesEmbedding
    for weight in _misread(model, example, halved):
        weight.data = weight.data.float()
    return_freed_memory()


def computed_dtype(model: Any) -> torch.dtype:
    """The dtype of a model's activations, which that of its first weight is not if large ones stay in 16 bits."""
    dtype: torch.dtype = model.dtype
    return next((layer.computed for layer in model.modules() if isinstance(layer, HalvesEmbedding)), dtype)


def _owners(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """The layers of each large parameter: several if it is tied."""
    owners: dict[nn.Parameter, list[nn.Module]] = defaultdict(list)
    for layer in model.modules():
        for parameter in layer._parameters.values():
            if parameter is not None and parameter.numel() >= MEASURED_WEIGHTS:
                owners[parameter].append(layer)
    return owners


def _fits(layer: nn.Module, weight: nn.Parameter) -> bool:
    # Subclasses may do more with their weight, and `max_norm` changes it.
    dense = isinstance(layer, SparseLinear) and layer.form is not None and layer.form.name == "dense"
    known = dense or type(layer) in (DenseLinear, nn.Embedding)
    plain = type(weight.data) is Tensor and weight.dtype is torch.float32 and getattr(layer, "max_norm", None) is None
    return known and plain and layer._parameters.get("weight") is weight


def _misread(model: nn.Module, example: dict[str, Any], halved: list[nn.Parameter]) -> list[nn.Parameter]:
    """The weights by whose dtype the model has cast the input; all of them if it cannot be tried."""
    found: list[nn.Parameter] = []

    def note(layer: nn.Module, given: tuple[Any, ...]) -> None:
        weight = layer._parameters.get("weight")
        if weight is not None and given and isinstance(given[0], Tensor) and given[0].dtype is weight.dtype:
            found.append(weight)

    hooks = [
        layer.register_forward_pre_hook(note)
        for layer in model.modules()
        if any(layer._parameters.get("weight") is weight for weight in halved)
    ]
    try:
        model(**example)
    # Whatever the model asks for beyond token ids: nothing is known of it then.
    except Exception:  # noqa: BLE001
        return halved
    finally:
        for hook in hooks:
            hook.remove()
    return found
