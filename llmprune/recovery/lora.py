"""Masked LoRA: PEFT's adapters, of which only the part on kept weights counts, in training as in the merged weights.

A plain adapter, merged, fills every zero. Here the layer computes with W + s (M * B A), M the mask of kept weights, and
that is what is merged: the trained model is the merged one. Its cost is the product B A of each layer, in the size of
its weights.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from llmprune.errors import MissingPackageError, RecoveryError
from llmprune.models.decoder import Decoder, prunable_matrices

_NAME = "default"


def require_peft() -> None:
    """Refuse to begin without PEFT.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "adapters need the package peft, which is not installed", fix="pip install 'llmprune[recover]'"
        ) from error


def add_lora(decoder: Decoder, masks: Mapping[str, Tensor], rank: int, seed: int) -> dict[str, Tensor]:
    """Give every linear layer inside the decoder layers a masked adapter, in place; only the adapters train.

    Args:
        decoder: of the pruned model.
        masks: parameter name -> bool in its shape, True for pruned.
        rank: of each adapter.
        seed: of their beginnings.

    Returns:
        The masks under the names that the parameters have now.

    Raises:
        MissingPackageError: PEFT is not installed.
        RecoveryError: there are no linear layers, but only fused experts or other modules.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    model = decoder.model
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    matrices = (
        matrix.name for index, layer in enumerate(decoder.layers)
        for matrix in prunable_matrices(layer, decoder.layer_name(index))
    )  # fmt: skip
    targets = [name for name in matrices if name in linears]
    if not targets:
        raise RecoveryError(
            f"adapters for {type(model).__name__}, which has no linear layers inside its decoder layers",
            expected="torch.nn.Linear",
            fix="train all weights, without --adapter",
        )
    before = {id(parameter): name for name, parameter in model.named_parameters()}
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    config._register_custom_module({nn.Linear: masked_lora()})
    torch.manual_seed(seed)
    inject_adapter_in_model(config, model, adapter_name=_NAME)
    for name, module in model.named_modules():
        if isinstance(module, masked_lora()):
            module.pruned = masks.get(f"{name}.weight")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    now = {before[id(parameter)]: name for name, parameter in model.named_parameters() if id(parameter) in before}
    return {now[name]: mask for name, mask in masks.items()}


def remove_lora(model: nn.Module, *, merge: bool) -> None:
    """Put the linear layers back in the place of those with adapters, in place.

    Args:
        model: as `add_lora` has left it.
        merge: add the adapters to the weights; otherwise they are dropped.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, masked_lora()):
            continue
        base = module.get_base_layer()
        if merge:
            with torch.no_grad():
                base.weight.add_(module.get_delta_weight(_NAME))
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, base)


@cache
def masked_lora() -> Any:
    """The class of linear layers with a masked adapter; made on demand, since PEFT may be missing."""
    from peft.tuners.lora import layer

    class MaskedLora(layer.Linear):  # type: ignore[misc] # PEFT is not typed here
        """A linear layer whose adapter leaves pruned weights at zero; `pruned` is their mask, or None."""

        pruned: Tensor | None = None

        def get_delta_weight(self, adapter: str) -> Tensor:
            delta: Tensor = super().get_delta_weight(adapter)
            return delta if self.pruned is None else delta.masked_fill(self.pruned, 0)

        def forward(self, x: Tensor, *args: Any, **more: Any) -> Tensor:
            base = self.get_base_layer()
            return linear(x, base.weight + self.get_delta_weight(_NAME), base.bias)

    return MaskedLora
