"""vLLM's side of packed linear layers: its quantisation config and its linear method.

Imported by `register` only, since it needs vLLM.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from llmprune.errors import ModelError
from llmprune.serving.sparse_linear import SparseLinear
from llmprune.storage.formats import Layout
from llmprune.storage.packed_config import QUANT_METHOD, read_layouts, require_version
from llmprune.vllm_plugin.assembly import Assembly, Shape, ShardId
from llmprune.vllm_plugin.guard import require_even, require_not_shadowed, require_untouched

# Of these, attention with latent keys and values takes the weights themselves, and keeps them dense anyway.
_READ_AS_WEIGHTS = ("kv_b_proj",)


class LlmpruneConfig(QuantizationConfig):  # type: ignore[misc] # vLLM is not installed here
    """The record of packed layers in config.json.

    Args:
        layouts: by the name of the linear layer; vLLM leaves them out where config.json has no record.

    Raises:
        ModelError: there is no record.
    """

    def __init__(self, layouts: Mapping[str, Layout] | None = None) -> None:
        super().__init__()
        if layouts is None:
            raise ModelError(
                "--quantization llmprune for a checkpoint without packed layers",
                expected="a checkpoint that llmprune has packed, for which vLLM needs no flag",
                fix="leave the flag out, or pack the checkpoint first (llmprune pack)",
            )
        self.layouts = dict(layouts)
        self._claimed: set[str] = set()

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # a GPU without a kernel gets dense weights

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Refuse what would go wrong: this is where vLLM shows the whole config.

        Raises:
            ModelError: decoder layers differ, or vLLM changes tensors before a packed layer gets them.
        """
        if hf_quant_cfg.get("quant_method") == QUANT_METHOD and hf_config is not None:
            config = hf_config.to_dict()
            require_even(config)
            layouts = read_layouts(hf_quant_cfg.get("modules") or {})
            require_untouched(config, {name: layout.name for name, layout in layouts.items()})
        return None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LlmpruneConfig":
        """Read the record.

        Raises:
            CheckpointError: it has another version.
            FormatError: a layout cannot be read.
            ModelError: vLLM was started in a clone of llmprune.
        """
        require_not_shadowed()
        require_version(config.get("version"))
        return cls(read_layouts(config.get("modules") or {}))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as vLLM renames the checkpoint's tensors."""
        self.layouts = hf_to_vllm_mapper.apply_dict(self.layouts)

    def get_checkpoint_weight_mapper(self) -> Any:
        """Nothing to rename; vLLM asks when its model is built and before it reads weights.

        Raises:
            ModelError: a packed matrix is in no layer.
        """
        lost = [name for name in self.layouts if name not in self._claimed]
        if lost and get_pp_group().world_size == 1:  # otherwise other ranks have the layers of other stages
            raise ModelError(
                f"vLLM's model has no layer that asks how {lost[0]} is packed",
                expected="a model all of whose linear layers may be quantised",
                fix="unpack the checkpoint (llmprune unpack) and serve it dense, or use llmprune serve",
            )
        return super().get_checkpoint_weight_mapper()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is held: packed, if one of its matrices is.

        Raises:
            ModelError: it has packed matrices, and is no linear layer.
        """
        if isinstance(layer, LinearBase):
            matrices = self._matrices(prefix)
            return PackedLinearMethod(prefix, matrices) if any(matrices.values()) else UnquantizedLinearMethod()
        packed = [name for name in self.layouts if name == prefix or name.startswith(f"{prefix}.")]
        if packed:
            raise ModelError(
                f"{packed[0]} is packed; vLLM holds it in a {type(layer).__name__}",
                expected="packed linear layers; experts and embeddings as ordinary weights",
                fix="unpack the checkpoint (llmprune unpack) and serve it dense",
            )
        return UnquantizedFusedMoEMethod(layer.moe_config) if isinstance(layer, RoutedExperts) else None

    def _matrices(self, prefix: str) -> dict[str, Layout | None]:
        """The matrices of the checkpoint that make up a layer of vLLM, in its order; None: dense."""
        parent, dot, last = prefix.rpartition(".")
        names = [prefix]
        if prefix not in self.layouts and last in self.packed_modules_mapping:
            names = [f"{parent}{dot}{shard}" for shard in self.packed_modules_mapping[last]]
        self._claimed.update(names)
        return {name: self.layouts.get(name) for name in names}


class _Arriving(nn.Parameter):
    """An empty parameter under a tensor's name, whose loader hands what arrives to the layer's assembly."""

    weight_loader: Any


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc] # vLLM is not installed here
    """Linear layers of which at least one matrix is packed.

    Args:
        name: of the layer.
        matrices: the layouts of its matrices in the checkpoint; None for dense ones.
    """

    def __init__(self, name: str, matrices: Mapping[str, Layout | None]) -> None:
        self.name, self.matrices = name, matrices

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Prepare the layer to receive the tensors of its matrices.

        Raises:
            ModelError: they do not fill the layer.
        """
        held, ranks = output_partition_sizes, int(layer.tp_size)
        shape = Shape(
            inputs=(input_size, input_size_per_partition),
            outputs=tuple(zip(_whole_sizes(layer, held, output_size), held, strict=True)),
            rank=int(layer.tp_rank),
            ranks=ranks,
            dtype=params_dtype,
        )
        assembly = layer.llmprune_assembly = Assembly(self.name, self.matrices, shape)
        for suffix, dtype in assembly.arriving.items():
            parameter = _Arriving(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = _loader(assembly, suffix)
            layer.register_parameter(suffix, parameter)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Convert the tensors that have arrived to the forms in which they are multiplied.

        Raises:
            CheckpointError: tensors are missing.
            FormatError: tensors are damaged.
            NumericsError: a kernel gives wrong results on this machine.
        """
        assembly: Assembly = layer.llmprune_assembly
        device = next(getattr(layer, suffix) for suffix in assembly.arriving).device
        parts = assembly.finish(device)
        for suffix in assembly.arriving:
            delattr(layer, suffix)
        del layer.llmprune_assembly
        if self.name.rpartition(".")[2] in _READ_AS_WEIGHTS:
            _make_dense(layer, parts)
        else:
            layer.llmprune_parts = nn.ModuleList(parts)
            layer.llmprune_sizes = [part.out_features for part in parts]

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X [..., in] times the transposed matrices, one after another, plus the bias."""
        sizes = layer.llmprune_sizes
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        products = [
            part.form.multiply(part.layout, part.held, x, part_bias)
            for part, part_bias in zip(layer.llmprune_parts, biases, strict=True)
        ]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def register() -> None:
    """Make vLLM know `quant_method: llmprune`."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(LlmpruneConfig)
        _require_all_tensors()


def _require_all_tensors() -> None:
    """Make vLLM refuse packed checkpoints in which a tensor is missing that is not packed, such as a norm.

    vLLM looks for them in checkpoints without a quant_method only. In others it serves what the memory happens to hold.
    """
    load_weights = DefaultModelLoader.load_weights

    @functools.wraps(load_weights)
    def load_all(self: Any, model: nn.Module, model_config: Any) -> None:
        # Whoever sets it in --model-loader-extra-config has the last word.
        if model_config.quantization == QUANT_METHOD and self.enable_weights_track is None:
            self.enable_weights_track = True
        load_weights(self, model, model_config)

    DefaultModelLoader.load_weights = load_all


def _make_dense(layer: LinearBase, parts: list[SparseLinear]) -> None:
    """Give a layer its weights, as if it had never been packed."""
    weight = torch.cat([part.unpack() for part in parts])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.quant_method = UnquantizedLinearMethod()
    layer.quant_method.process_weights_after_loading(layer)


def _loader(assembly: Assembly, suffix: str) -> Any:
    def load(parameter: nn.Parameter, loaded: Tensor, shard_id: ShardId = None) -> None:
        assembly.take(suffix, loaded, shard_id)

    return load


def _whole_sizes(layer: LinearBase, held: list[int], output_size: int) -> list[int]:
    """The output dimension of each part of a layer over all ranks; KV heads may be on several ranks each."""
    if sum(held) == output_size:
        return held
    copies = getattr(layer, "num_kv_head_replicas", 1)
    return [size * layer.tp_size // (copies if part else 1) for part, size in enumerate(held)]
