"""llmprune checkpoints in transformers: `AutoModelForCausalLM.from_pretrained(DIR)` after `import llmprune`.

A quantizer for transformers, `quant_method: llmprune`, changes the skeleton before the weights are loaded: decoder
layers that differ in size are rebuilt, and each packed linear layer is replaced by a `SparseLinear`, so that the dense
model never exists. The packed layers settle afterwards; a model without any is an ordinary model from then on.

Where nothing is packed, another library may quantise while loading: `from_pretrained(DIR, quantization_config=...)`.
transformers has one place for both records and refuses two of different classes, so that this refusal is replaced: its
quantizer then works on decoder layers that have their own sizes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmprune.errors import ModelError
from llmprune.serving.forms import Served
from llmprune.serving.sparse_linear import SparseLinear, self_tests_wanted
from llmprune.storage.config_files import write_config
from llmprune.storage.files import read_json
from llmprune.storage.formats import layout_from_dict
from llmprune.storage.packed_config import (
    FORMAT_VERSION,
    QUANT_METHOD,
    packed_layouts,
    read_layouts,
    require_version,
    with_packing_record,
    without_notice,
)

# While transformers loads a model, it replaces this method by one that does nothing.
_tie_weights = PreTrainedModel.tie_weights

# The name under which transformers finds the quantizer for both records.
_THEN = f"{QUANT_METHOD}, then another"


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc] # transformers is not typed
    """The `quantization_config` of an llmprune checkpoint.

    Args:
        modules: name of a packed linear layer -> its layout, as returned by `Layout.to_dict`.
        version: of this record.
        served: see `llmprune.serving.forms.choose_form`; not saved.

    Raises:
        CheckpointError: the version is unknown, or missing.
        FormatError: a layout cannot be read.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        version: int | None = None,
        served: Served = "auto",
        **_: Any,
    ) -> None:
        require_version(version)
        read_layouts(modules)
        self.quant_method = QUANT_METHOD
        self.modules, self.version, self.served = dict(modules or {}), FORMAT_VERSION, served

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {"quant_method": QUANT_METHOD, "version": self.version, "modules": self.modules}


class _UnevenLayers(HfQuantizer):  # type: ignore[misc] # transformers is not typed
    """The part of a quantizer that gives decoder layers their own sizes before the weights are loaded."""

    _per_layer: dict[int, dict[str, Any]] | None = None

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Remove from the config what transformers does not understand; called before it looks for weight files."""
        # Not at the top of the file: that module may be the first to import transformers, and thereby this one.
        from llmprune.models.uneven import take_per_layer

        self._per_layer = self._per_layer or take_per_layer(config)
        config.quantization_config = self.quantization_config
        return super().update_attn_implementation(without_notice(config))

    def update_tp_plan(self, config: PretrainedConfig) -> PretrainedConfig:
        """The same for transformers before 5.18, which has no other hook at this point."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        from llmprune.models.checkpoint_source import require_consistent
        from llmprune.models.decoder import Decoder
        from llmprune.models.uneven import apply_per_layer, put_per_layer

        if checkpoint_files := options.get("checkpoint_files"):
            with _tying():
                require_consistent(Path(checkpoint_files[0]).parent)
        if self._per_layer:
            put_per_layer(model.config, self._per_layer)
            apply_per_layer(Decoder.find(model), model.config)
        super()._process_model_before_weight_loading(model, **options)


@contextmanager
def _tying() -> Iterator[None]:
    """Tie weights again, within the loading of another model: of tied weights, a checkpoint has only one."""
    disabled = PreTrainedModel.tie_weights
    PreTrainedModel.tie_weights = _tie_weights
    try:
        yield
    finally:
        PreTrainedModel.tie_weights = disabled


class PackedQuantizer(_UnevenLayers):
    """Loads and saves checkpoints with packed layers, with decoder layers of different sizes, or both."""

    requires_calibration = False
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        super()._process_model_before_weight_loading(model, **options)
        for name, row in self.quantization_config.modules.items():
            replace_linear(model, name, row)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from llmprune.models.headers import require_finite

        require_finite(model.name_or_path, model.named_parameters())
        settle(model, self.quantization_config.served)
        keep_record(model)
        if not self.quantization_config.modules:
            self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        if isinstance(dtype, str):  # as stored in the configuration by `save_pretrained`
            dtype = getattr(torch, dtype)
        for name, layer in list(sparse_layers(model)):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(layer.unpack().to(dtype or layer.dtype), requires_grad=False)
            if layer.bias is not None:
                linear.bias = layer.bias
            _set_module(model, name, linear)
        if not self._per_layer:
            model.__dict__.pop("save_pretrained", None)
        return model

    def is_serializable(self, **_: Any) -> bool:
        """Whether `save_pretrained` works: always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained: packed weights have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether it can be compiled: the kernels are custom operators, which torch.compile and CUDA graphs support."""
        return True


class _ThenQuantised(QuantizationConfigMixin):  # type: ignore[misc] # transformers is not typed
    """Our record, and that of the library that quantises while the checkpoint is loaded."""

    def __init__(self, then: QuantizationConfigMixin) -> None:
        self.quant_method, self.then = _THEN, then


def _quantizer_of(config: _ThenQuantised, **_: Any) -> HfQuantizer:
    """The other library's quantizer, for a model whose decoder layers have their own sizes."""
    quantizer = AutoHfQuantizer.from_config(config.then, pre_quantized=False)
    kind = type(quantizer)
    # `per_layer_config` and the other library's record in one file: nothing could load it.
    unsaved = {"is_serializable": lambda self, **options: False}
    quantizer.__class__ = type(f"Uneven{kind.__name__}", (_UnevenLayers, kind), unsaved)
    return quantizer


def _merge(
    stock: Callable[..., QuantizationConfigMixin], found: dict[str, Any] | QuantizationConfigMixin, wanted: Any = None
) -> QuantizationConfigMixin:
    """What transformers does with the record of a checkpoint and the one that the caller passes.

    Raises:
        ModelError: packed weights are to be quantised.
    """
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if wanted is None or method != QUANT_METHOD or isinstance(wanted, PackedConfig):
        return stock(found, wanted)
    modules = found["modules"] if isinstance(found, dict) else found.modules
    if modules:
        raise ModelError(
            f"{type(wanted).__name__} for a packed checkpoint: its weights have no dense form to quantise",
            expected="a checkpoint that is not packed",
            fix="unpack it first (llmprune unpack DIR --output DENSE), and load DENSE with this quantization_config",
        )
    return _ThenQuantised(wanted)


def register() -> None:
    """Register `quant_method: llmprune` with transformers; calling it again has no effect."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = PackedConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = PackedQuantizer
    AUTO_QUANTIZER_MAPPING[_THEN] = _quantizer_of
    if not isinstance(AutoHfQuantizer.merge_quantization_configs, partial):
        AutoHfQuantizer.merge_quantization_configs = partial(_merge, AutoHfQuantizer.merge_quantization_configs)


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """The packed layers of a model with their names, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear))


def replace_linear(model: nn.Module, name: str, row: dict[str, Any]) -> None:
    """Replace a linear layer on the meta device by an empty packed layer.

    Args:
        model: the skeleton.
        name: of the linear layer.
        row: its layout, from config.json.

    Raises:
        ModelError: the model has no such linear layer, or one of a different shape.
        FormatError: the row is not a valid layout.
    """
    layout = layout_from_dict(row)
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    shape = tuple(linear.weight.shape) if isinstance(linear, nn.Linear) else None
    if not isinstance(linear, nn.Linear) or shape != layout.shape:
        found = f"one of {shape[0]} x {shape[1]}" if shape else "none" if linear is None else type(linear).__name__
        raise ModelError(
            f"config.json packs {name} as {layout.shape[0]} x {layout.shape[1]}; the model has {found}",
            expected="the model that was packed",
            fix="load config.json and weights from the same folder, with the class that AutoModelForCausalLM chooses",
        )
    packed = SparseLinear(layout, bias=linear.bias is not None, dtype=linear.weight.dtype)
    packed.train(linear.training)
    _set_module(model, name, packed)


def settle(model: nn.Module, served: Served = "auto") -> None:
    """Convert the packed layers of a loaded model, one by one, to the forms that their devices multiply fastest.

    Layers that accelerate offloads, and moves to the device for each call, stay as they are on disk.

    Raises:
        FormatError: the tensors of a layer are damaged.
        NumericsError: a kernel gives wrong results on this machine; the environment variable `LLMPRUNE_SELFTEST=0`
            skips this test.
    """
    for name, layer in sparse_layers(model):
        if _is_offloaded(layer):
            continue
        choice = layer.settle(served)
        if choice.form.tested and self_tests_wanted():
            layer.test(name)


def _is_offloaded(layer: nn.Module) -> bool:
    hook = getattr(layer, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return any(getattr(hook, "offload", False) for hook in hooks) or any(p.is_meta for p in layer.parameters())


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def keep_record(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write our record, which it otherwise drops, into the configuration."""
    model.save_pretrained = partial(_save_with_record, model)


def _save_with_record(model: PreTrainedModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """`PreTrainedModel.save_pretrained`, plus our record in the configuration."""
    if kwargs.get("push_to_hub"):
        # The upload would happen before the record is written.
        raise ModelError(
            "save_pretrained with push_to_hub does not work for a model that needs llmprune",
            fix="call model.push_to_hub(REPOSITORY)",
        )
    result = type(model).save_pretrained(model, save_directory, *args, **kwargs)
    path = Path(save_directory) / "config.json"
    if path.exists():
        config = read_json(path)
        write_config(path.parent, with_packing_record(config, packed_layouts(config)))
    return result


register()
