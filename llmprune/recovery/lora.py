"""Adapters of PEFT for a pruned model: masked ones that are merged, and ordinary ones beside the sparse weights.

Masked LoRA: PEFT's adapters, of which only the part on kept weights counts, in training as in the merged weights.

A plain adapter, merged, fills every zero. Here the layer computes with W + s (M * B A), M the mask of kept weights, and
that is what is merged: the trained model is the merged one. Its cost is the product B A of each layer, in the size of
its weights.

A low-rank correction is an ordinary adapter, which is never merged: the model computes with sparse weights and, beside
them, two narrow products. PEFT alone loads it.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from llmprune.errors import MissingPackageError, RecoveryError
from llmprune.models.decoder import Decoder, prunable_matrices
from llmprune.storage.files import write_shard

_NAME = "default"
ADAPTER_FOLDER = "adapter"


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


def add_lora(
    decoder: Decoder, masks: Mapping[str, Tensor], rank: int, seed: int, *, masked: bool = True
) -> dict[str, Tensor]:
    """Give every linear layer inside the decoder layers an adapter, in place; only the adapters train.

    Args:
        decoder: of the pruned model.
        masks: parameter name -> bool in its shape, True for pruned.
        rank: of each adapter.
        seed: of their beginnings.
        masked: they leave pruned weights at zero; otherwise they are ordinary ones.

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
    if masked:
        config._register_custom_module({nn.Linear: masked_lora()})
    torch.manual_seed(seed)
    inject_adapter_in_model(config, model, adapter_name=_NAME)
    for name, module in model.named_modules():
        if masked and isinstance(module, masked_lora()):
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
        if not isinstance(module, adapted_linear()):
            continue
        base = module.get_base_layer()
        if merge:
            with torch.no_grad():
                base.weight.add_(module.get_delta_weight(_NAME))
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, base)


def clear_lora(model: nn.Module) -> None:
    """Set every adapter to what it was at first: no correction."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()


def save_lora(model: nn.Module, folder: Path, base: str) -> None:
    """Save ordinary adapters as `PeftModel.save_pretrained` does.

    Args:
        model: as `add_lora` has left it.
        folder: new, for adapter_config.json and adapter_model.safetensors.
        base: what adapter_config.json names as the model that they belong to.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    kinds: Any = model.peft_config
    config = kinds[_NAME]
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, "CAUSAL_LM", True
    state: Mapping[str, Tensor] = get_peft_model_state_dict(model, adapter_name=_NAME)
    folder.mkdir()
    write_shard(folder / SAFETENSORS_WEIGHTS_NAME, {f"base_model.model.{key}": value for key, value in state.items()})
    config.save_pretrained(folder)


def merge_saved(model: nn.Module, folder: Path) -> None:
    """Add what `save_lora` saved to the weights, in place, which fills their zeros.

    Args:
        model: without adapters.
        folder: of the adapter.
    """
    from peft import LoraConfig
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    config = LoraConfig.from_pretrained(folder)
    state = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    with torch.no_grad():
        for key, down in state.items():
            name = key.removeprefix("base_model.model.")
            if ".lora_A." in name:
                weight = model.get_submodule(name.partition(".lora_A.")[0]).weight
                assert isinstance(weight, Tensor)
                up = state[key.replace(".lora_A.", ".lora_B.")].to(weight.device)
                weight.add_(config.lora_alpha / config.r * (up @ down.to(weight.device)))


@cache
def adapted_linear() -> Any:
    """The class of linear layers with an adapter, masked or not."""
    from peft.tuners.lora import layer

    return layer.Linear


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
