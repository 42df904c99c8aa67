"""The record in config.json that describes a packed checkpoint, and the dense view of its tensors.

config.json says which linear layers are stored in which layout:

    "quantization_config": {"quant_method": "llmprune", "version": 1, "modules": {"model.layers.0.mlp.up_proj": {...}}},
    "transformers_weights": "written by llmprune: ..."

If decoder layers differ in size (`per_layer_config`, see `llmprune.models.uneven`), the same record, with or without
modules, makes llmprune build them in their own sizes.

transformers continues with random weights when it does not know a `quant_method`. The second key prevents that: its
value is not a file name, and transformers shows it in its error. With llmprune imported, the key is removed before
transformers reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmprune.errors import CheckpointError, FormatError
from llmprune.patterns import NM, Block, Pattern
from llmprune.precision import dtype_name
from llmprune.storage.files import Stored
from llmprune.storage.formats import GROUP, Layout, block, fit_layout, layout_from_dict
from llmprune.storage.records import checked

QUANT_METHOD = "llmprune"
FORMAT_VERSION = 1
NOTICE_KEY = "transformers_weights"
NOTICE = "written by llmprune: install llmprune, and `import llmprune` before from_pretrained"

# A mapping with both keys has decoder layers that differ; some architectures have only the first.
_UNEVEN = ("per_layer_config", "allow_global_per_layer_attribute_access")

Format = Literal["dense", "auto", "nm", "block", "bitmask"]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A dense weight that is stored in parts, with the interface of `llmprune.storage.files.Stored`.

    Attributes:
        key: the dense tensor's name in the checkpoint.
        layout: how it is packed.
        parts: the layout's tensors, by suffix.
    """

    key: str
    layout: Layout
    parts: Mapping[str, Stored]

    @property
    def file(self) -> Path:
        """The file that holds the first of its parts."""
        return next(iter(self.parts.values())).file

    @property
    def shape(self) -> tuple[int, ...]:
        """The dense dimensions."""
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        specs = self.layout.tensors()
        return next(part.dtype for suffix, part in self.parts.items() if specs[suffix].dtype is None)

    @property
    def nbytes(self) -> int:
        """Size of the dense tensor."""
        return self.layout.shape[0] * self.layout.shape[1] * self.dtype.itemsize

    @property
    def packed_bytes(self) -> int:
        """Size on disk."""
        return sum(part.nbytes for part in self.parts.values())

    def __getitem__(self, index: object) -> Tensor:
        """Read and unpack it."""
        return self.layout.unpack({suffix: part[...] for suffix, part in self.parts.items()})

    def get_dtype(self) -> str:
        """The safetensors name of the dtype."""
        return next(part for part in self.parts.values() if part.dtype == self.dtype).get_dtype()


def packing_record(layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """The keys that packing adds to config.json; `layouts` by the name of the linear layer."""
    modules = {name: layout.to_dict() for name, layout in layouts.items()}
    return {
        "quantization_config": {"quant_method": QUANT_METHOD, "version": FORMAT_VERSION, "modules": modules},
        NOTICE_KEY: NOTICE,
    }


def with_packing_record(config: Mapping[str, Any], layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """A checkpoint's config.json: with our record if stock transformers would load the checkpoint wrongly.

    Args:
        config: of the dense checkpoint; `per_layer_config`, if its decoder layers differ.
        layouts: of the packed layers, by name; may be empty.
    """
    config = _unrecorded(config)
    if not layouts and not is_uneven(config):
        return config
    # A text model may be loaded from the nested configuration alone, so that the notice must be inside it as well.
    inner = {key: {**part, NOTICE_KEY: NOTICE} for key, part in config.items() if _is_text(key, part)}
    return {**config, **inner, **packing_record(layouts)}


def without_packing_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dense checkpoint's config.json; a record without modules is kept if decoder layers differ."""
    return with_packing_record(config, {})


def is_uneven(config: Mapping[str, Any]) -> bool:
    """Whether config.json describes decoder layers that differ in size, or lack a block."""
    parts = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    return any(all(part.get(key) for key in _UNEVEN) for part in parts)


def _unrecorded(config: Mapping[str, Any]) -> dict[str, Any]:
    record = config.get("quantization_config")
    if record is None or quantised_by(record) is not None:
        return dict(config)
    inner = {
        key: {k: v for k, v in part.items() if k != NOTICE_KEY} for key, part in config.items() if _is_text(key, part)
    }
    return {key: value for key, value in {**config, **inner}.items() if key not in ("quantization_config", NOTICE_KEY)}


def _is_text(key: str, part: object) -> bool:
    return key == "text_config" and isinstance(part, Mapping)


def layout_name(wanted: Format, pattern: Pattern, *, eight_bits: bool = False) -> str | None:
    """The layout that a format gives to matrices of a pattern; None if they stay dense.

    "auto" chooses the layout that suits the pattern; "nm" and "block" leave matrices of other patterns dense. Weights
    of 8 bits are stored as such, except in blocks.
    """
    suits = "nm" if isinstance(pattern, NM) else "block" if _is_servable(pattern) else "bitmask"
    # No kernel multiplies `nm` other than 2:4, and a bitmask of 4:8 is smaller.
    if wanted == "bitmask" or (wanted == "auto" and suits == "nm" and pattern != NM(2, 4)):
        chosen: str | None = "bitmask"
    else:
        chosen = suits if wanted in ("auto", suits) else None
    return f"int8-{chosen}" if eight_bits and chosen in ("nm", "bitmask") else chosen


def pack_matrices(
    tensors: Mapping[str, Tensor],
    patterns: Mapping[str, Pattern],
    wanted: Format,
    groups: Mapping[str, int] = MappingProxyType({}),
) -> tuple[dict[str, Tensor], dict[str, Layout]]:
    """Pack the pruned linear layers among a checkpoint's tensors.

    Args:
        tensors: by key.
        patterns: name of a linear layer -> what it was pruned to.
        wanted: the format.
        groups: of the layers whose weights have 8 bits, the columns that share a peak.

    Returns:
        (tensors, layouts): all tensors, with packed layers split into parts under the layer's name; the layouts by
        name.
    """
    packed, layouts = dict(tensors), {}
    for name, pattern in patterns.items():
        layout = layout_name(wanted, pattern, eight_bits=name in groups)
        if layout is not None:
            weight = packed[f"{name}.weight"].to("cpu")
            fitted = fit_layout(layout, weight, pattern, groups.get(name, GROUP))
            if fitted.nbytes(weight.itemsize) >= weight.nbytes:
                continue  # it would not be smaller
            del packed[f"{name}.weight"]
            layouts[name] = fitted
            packed |= {f"{name}.{suffix}": part for suffix, part in layouts[name].pack(weight).items()}
    return packed, layouts


def packed_layouts(config: Mapping[str, Any]) -> dict[str, Layout]:
    """The layouts that config.json names; empty if the checkpoint is not packed.

    Raises:
        CheckpointError: the record has a different version.
        FormatError: a layout cannot be read.
    """
    record = config.get("quantization_config")
    if not isinstance(record, Mapping) or _method(record) != QUANT_METHOD:
        return {}
    require_version(record.get("version"))
    return read_layouts(record.get("modules"))


def read_layouts(modules: object) -> dict[str, Layout]:
    """The layouts in a record's `modules`, by the name of the linear layer.

    Raises:
        FormatError: they cannot be read.
    """
    rows = checked(
        modules,
        dict[str, dict[str, Any]],
        "the record of packed layers in config.json",
        expected="modules: a mapping from the names of linear layers to their layouts",
        fix="download config.json again, or pack the dense checkpoint again",
        raised=FormatError,
    )
    return {name: layout_from_dict(row) for name, row in rows.items()}


def _is_servable(pattern: Pattern) -> bool:
    return isinstance(pattern, Block) and pattern.size[0] == pattern.size[1] and pattern.size[0] in block.SIZES


def require_version(version: object) -> None:
    """Refuse a packed checkpoint whose record has a different version."""
    if type(version) is not int or version != FORMAT_VERSION:  # True == 1
        raise CheckpointError(
            f"the packed checkpoint has format version {version!r:.40}",
            expected=f"version {FORMAT_VERSION}, which this llmprune reads",
            fix="upgrade llmprune",
        )


def quantised_by(record: object) -> str | None:
    """The method by which weights are quantised, according to a `quantization_config`.

    Returns:
        Its name; None if the weights are ordinary ones: packed by llmprune, or with a record that is empty or, as in
        uncompressed checkpoints of llm-compressor, of sparsity only.
    """
    method = _method(record)
    values = record if isinstance(record, Mapping) else {}
    sparse_only = method == "compressed-tensors" and values.get("format") == "dense" and not values.get("config_groups")
    return None if not record or method == QUANT_METHOD or sparse_only else str(method or "unknown")


def _method(record: object) -> object:
    """The name in a record: as config.json has it, or as transformers keeps it with a loaded model."""
    return record.get("quant_method") if isinstance(record, Mapping) else getattr(record, "quant_method", record)


def without_idle_record(config: PretrainedConfig) -> PretrainedConfig:
    """Remove, in place, a record by which nothing is quantised or packed: transformers fails on it."""
    record = getattr(config, "quantization_config", None)
    if record is not None and _method(record) != QUANT_METHOD and quantised_by(record) is None:
        del config.quantization_config
    return config


def is_recorded(config: PretrainedConfig) -> bool:
    """Whether a configuration holds our record."""
    return _method(getattr(config, "quantization_config", None)) == QUANT_METHOD


def without_record(config: PretrainedConfig) -> PretrainedConfig:
    """Turn the configuration of a packed checkpoint into that of the dense one, in place; others are unchanged."""
    if is_recorded(config):
        del config.quantization_config
        without_notice(config)
    return config


def without_notice(config: PretrainedConfig) -> PretrainedConfig:
    """Remove the notice, in place, so that transformers looks for the weight files."""
    for part in {id(part): part for part in (config, config.get_text_config(decoder=True))}.values():
        if getattr(part, NOTICE_KEY, None) == NOTICE:
            delattr(part, NOTICE_KEY)
    return config


def as_dense(stored: Mapping[str, Stored], layouts: Mapping[str, Layout]) -> dict[str, Stored | PackedWeight]:
    """View a packed checkpoint's tensors as those of the dense one.

    Args:
        stored: its tensors by key.
        layouts: of the packed layers, by name.

    Raises:
        CheckpointError: a tensor of a packed layer is missing.
        FormatError: one has another shape or dtype than its layout.
    """
    dense: dict[str, Stored | PackedWeight] = dict(stored)
    for name, layout in layouts.items():
        parts = {}
        for suffix, spec in layout.tensors().items():
            key = f"{name}.{suffix}"
            if key not in stored:
                raise CheckpointError(
                    f"the packed checkpoint lacks {key!r}",
                    expected=f"the tensors of a {layout.name} layout for each layer that config.json names",
                    fix="download the checkpoint again",
                )
            part = parts[suffix] = stored[key]
            wanted = dtype_name(spec.dtype) if spec.dtype else "weights"
            fits = part.dtype == spec.dtype if spec.dtype else part.dtype.is_floating_point
            if part.shape != spec.shape or not fits:
                raise FormatError(
                    f"{key!r} is stored as {part.get_dtype()} {list(part.shape)}",
                    expected=f"{wanted} {list(spec.shape)}, by config.json",
                    fix="download the checkpoint again, or pack the dense one again",
                )
            dense.pop(key)
        dense[f"{name}.weight"] = PackedWeight(f"{name}.weight", layout, parts)
    return dense
