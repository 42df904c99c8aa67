"""Adapters of PEFT for a pruned model: masked ones that are merged, and ordinary ones beside the sparse weights.

Masked LoRA: PEFT's adapters, of which only the part on kept weights counts, in training as in the merged weights.

A plain adapter, merged, fills every zero. Here the layer computes with W + s (M * B A), M the mask of kept weights, and
that is what is merged: the trained model is the merged one. Its cost is the product B A of each layer, in the size of
its weights.

SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175) trains chosen weights of each matrix and leaves the others; here they
are chosen at random among the kept ones, as many as adapters of the same rank have numbers. It is merged, like masked
LoRA.

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
from llmprune.recovery.options import Adapter
from llmprune.storage.companions import ADAPTER_FOLDER
from llmprune.storage.files import write_shard

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


def require_no_correction(folder: Path) -> None:
    """Refuse a checkpoint with a correction beside its weights, which would be left out.

    Raises:
        RecoveryError: there is one.
    """
    if (folder / ADAPTER_FOLDER / "adapter_config.json").exists():
        raise RecoveryError(
            f"{folder} has a correction beside its weights ({ADAPTER_FOLDER}/), which training them would leave out",
            expected="a pruned model as it is",
            fix=f"name the model that the correction was made for, or remove {folder / ADAPTER_FOLDER}",
        )


def add_adapters(
    decoder: Decoder, masks: Mapping[str, Tensor], rank: int, seed: int, kind: Adapter = "lora"
) -> dict[str, Tensor]:
    """Give every linear layer inside the decoder layers an adapter, in place; only the adapters train.

    Args:
        decoder: of the pruned model.
        masks: parameter name -> bool in its shape, True for pruned.
        rank: of each adapter; one of SHiRA trains as many weights as factors of this rank have.
        seed: of their beginnings, and of the choice of weights.
        kind: "lora" or "shira", which leave pruned weights at zero, or "low-rank", which does not.

    Returns:
        The masks under the names that the parameters have now.

    Raises:
        MissingPackageError: PEFT is not installed.
        RecoveryError: there are no linear layers, but only fused experts or other modules; SHiRA is to train more
            weights of a layer than are kept.
    """
    require_peft()
    from peft import inject_adapter_in_model

    model = decoder.model
    targets = _targets(decoder)
    before = {id(parameter): name for name, parameter in model.named_parameters()}
    config = (
        _shira(model, targets, masks, rank, seed) if kind == "shira" else _lora(targets, rank, masked=kind == "lora")
    )
    torch.manual_seed(seed)
    inject_adapter_in_model(config, model, adapter_name=_NAME)
    for name, module in model.named_modules():
        if kind == "lora" and isinstance(module, masked_lora()):
            module.pruned = masks.get(f"{name}.weight")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in before)
    now = {before[id(parameter)]: name for name, parameter in model.named_parameters() if id(parameter) in before}
    return {now[name]: mask for name, mask in masks.items()}


def trained_numbers(decoder: Decoder, rank: int) -> int:
    """How many numbers adapters of a rank have, of either kind, before they are added.

    Raises:
        RecoveryError: there are no linear layers that could have one.
    """
    return sum(rank * sum(decoder.model.get_parameter(f"{name}.weight").shape) for name in _targets(decoder))


def _targets(decoder: Decoder) -> list[str]:
    """The linear layers inside the decoder layers."""
    linears = {name for name, module in decoder.model.named_modules() if isinstance(module, nn.Linear)}
    matrices = (
        matrix.name for index, layer in enumerate(decoder.layers)
        for matrix in prunable_matrices(layer, decoder.layer_name(index))
    )  # fmt: skip
    targets = [name for name in matrices if name in linears]
    if not targets:
        raise RecoveryError(
            f"adapters for {type(decoder.model).__name__}, which has no linear layers inside its decoder layers",
            expected="torch.nn.Linear",
            fix="train all weights, without --adapter",
        )
    return targets


def _lora(targets: list[str], rank: int, *, masked: bool) -> Any:
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    if masked:
        config._register_custom_module({nn.Linear: masked_lora()})
    return config


def _shira(model: nn.Module, targets: list[str], masks: Mapping[str, Tensor], rank: int, seed: int) -> Any:
    from peft import ShiraConfig

    weights = [(name, model.get_parameter(f"{name}.weight")) for name in targets]
    pruned = {id(weight): masks.get(f"{name}.weight") for name, weight in weights}
    for name, weight in weights:
        mask = pruned[id(weight)]
        kept = weight.numel() if mask is None else mask.numel() - int(mask.count_nonzero())
        most = kept // sum(weight.shape)
        if rank > most:
            raise RecoveryError(
                f"SHiRA of rank {rank} trains {rank * sum(weight.shape)} weights of {name}, which has kept {kept}",
                expected=f"a rank of at most {most} for this layer" if most else "more weights kept, even at rank 1",
                fix=f"{'lower the rank (--rank), or ' if most else ''}choose the adapter lora",
            )
    generator = torch.Generator().manual_seed(seed)

    def among_kept(layer: nn.Linear, rank: int, **_: object) -> Tensor:
        weight = layer.weight
        mask = pruned[id(weight)]
        places = torch.arange(weight.numel()) if mask is None else (~mask).flatten().nonzero().squeeze(1).cpu()
        order = torch.randperm(len(places), generator=generator)
        chosen = torch.zeros(weight.numel(), dtype=weight.dtype)
        chosen[places[order[: rank * sum(weight.shape)]]] = 1
        return chosen.view_as(weight).to(weight.device)

    # PEFT does not say whether its sparse tensors are to be checked, of which torch warns; this is torch's default.
    if not torch.sparse.check_sparse_tensor_invariants.is_enabled():
        torch.sparse.check_sparse_tensor_invariants.disable()
    config = ShiraConfig(r=rank, target_modules=targets)
    config.mask_fn = among_kept
    return config


def remove_adapters(model: nn.Module, *, merge: bool) -> None:
    """Put the linear layers back in the place of those with adapters, in place.

    Args:
        model: as `add_adapters` has left it.
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


def clear_adapters(model: nn.Module) -> None:
    """Set every adapter to what it was at first: no correction."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()


def save_adapters(model: nn.Module, folder: Path, base: str) -> None:
    """Save ordinary adapters as `PeftModel.save_pretrained` does.

    Args:
        model: as `add_adapters` has left it.
        folder: for adapter_config.json and adapter_model.safetensors; an interrupted run may have left them.
        base: what adapter_config.json names as the model that they belong to.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    kinds: Any = model.peft_config
    config = kinds[_NAME]
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, "CAUSAL_LM", True
    state: Mapping[str, Tensor] = get_peft_model_state_dict(model, adapter_name=_NAME)
    folder.mkdir(exist_ok=True)
    write_shard(folder / SAFETENSORS_WEIGHTS_NAME, {f"base_model.model.{key}": value for key, value in state.items()})
    config.save_pretrained(folder)


def merge_saved(model: nn.Module, folder: Path) -> None:
    """Add what `save_adapters` saved to the weights, in place, which fills their zeros.

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
    """The classes of linear layers with an adapter of any kind."""
    from peft.tuners import lora, shira

    return lora.Linear, shira.Linear


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
