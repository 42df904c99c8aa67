"""A checkpoint on disk as a source of decoder layers: parameters are in memory only while they are needed."""

import copy
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from llmprune.errors import CheckpointError, ModelError
from llmprune.models.boundary import explained
from llmprune.models.headers import check_headers, require_finite, require_none
from llmprune.models.skeleton import quiet_transformers, read_config
from llmprune.models.source import Smaller, drop_parameters, modules_outside, move
from llmprune.models.uneven import build_decoder
from llmprune.precision import computed_in
from llmprune.storage.files import INDEX_NAME, SINGLE_NAME, Stored, read_header, read_index, read_json
from llmprune.storage.formats import Layout
from llmprune.storage.packed_config import PackedWeight, as_dense, packed_layouts
from llmprune.storage.reading_ahead import read_ahead

# Of each matrix, this many runs of this many values are read to see how many are zero.
_PIECES, _PIECE = 8, 4096


class CheckpointSource:
    """A `StoredSource` that reads a checkpoint folder lazily: at most one decoder layer, or the ends, is in memory.

    The ends are everything outside the decoder layers: embeddings, final norm and LM head. Key renaming and fused
    experts follow transformers' own conversion tables, in both directions.

    Args:
        folder: a local folder with config.json and safetensors.
        compute_dtype: dtype of the parameters in memory; None: the one in config.json.
        decoder_layers: dotted name of the decoder layers; None: they are searched for.
        config: of a checkpoint that is yet to be written, used instead of config.json; `overlay` adds its tensors.

    Raises:
        ModelError: it is not a causal LM, or its decoder layers cannot be identified.
        CheckpointError: the files are damaged or a tensor is missing.
    """

    def __init__(
        self,
        folder: Path,
        compute_dtype: torch.dtype | None = None,
        decoder_layers: str | None = None,
        config: PretrainedConfig | None = None,
    ) -> None:
        self.folder = folder
        self.config = config or read_config(folder)
        self._named = decoder_layers
        if config is not None:
            self.decoder = build_decoder(config, compute_dtype, decoder_layers)
        else:
            stored = as_dense(read_index(folder), packed_layouts(read_json(folder / "config.json")))
            with explained(
                f"{folder}: no model can be built from config.json",
                expected="sizes and names that its architecture accepts",
                fix="correct the value, or download config.json again",
            ):
                self.decoder = build_decoder(self.config, compute_dtype, decoder_layers, len(stored))
        self.model, self.layers_path, self.layers = self.decoder.model, self.decoder.path, self.decoder.layers
        self.dtype: torch.dtype = self.model.dtype
        self._conversions = get_model_conversion_mapping(self.model)
        self._state_names = set(self.model.state_dict())
        self.stored: dict[str, Stored | PackedWeight] = {}
        self.targets: dict[str, tuple[str, ...]] = {}
        if config is None:
            self._add(stored)
            check_headers(folder, self.model, self.stored, self.targets)

    def overlay(self, shard: Path, layouts: Mapping[str, Layout] | None = None) -> None:
        """From now on, read the tensors in this shard from it; `layouts` are those of its packed layers."""
        self._add(as_dense({stored.key: stored for stored in read_header(shard)}, layouts or {}))

    def rewritten(self, config: PretrainedConfig) -> "CheckpointSource":
        """The source of the smaller checkpoint written from this one; `overlay` adds its tensors.

        Args:
            config: describes a model with fewer or smaller layers.

        Raises:
            ModelError: its decoder layers are found under another name, or not at all.
        """
        result = CheckpointSource(self.folder, self.model.dtype, self._named, config)
        if result.layers_path != self.layers_path:
            raise ModelError(
                f"the decoder layers of the smaller model are in {result.layers_path}, not in {self.layers_path}"
            )
        return result

    def load_layer(self, index: int, device: torch.device) -> None:
        """Read one decoder layer onto the device; the next one is read into the system's cache meanwhile."""
        prefix = self.layer_name(index) + "."
        self._load({key: self.stored[key] for key in self.layer_keys(index)}, device)
        if index + 1 < len(self.layers):
            read_ahead(self.stored[key] for key in self.layer_keys(index + 1))
        self._require_loaded(prefix)
        require_finite(self.folder, self.layers[index].named_parameters(prefix[:-1]))
        for module in self.layers[index].modules():
            move(module, device)

    def free_layer(self, index: int) -> None:
        """Drop one decoder layer's parameters."""
        drop_parameters(self.layers[index].modules())

    def stored_dtype(self, index: int, parameter: str) -> torch.dtype:
        """The dtype of the parameter (or of the first tensor fused into it) in the source checkpoint."""
        target = f"{self.layer_name(index)}.{parameter}"
        return next(self.stored[key].dtype for key, names in self.targets.items() if target in names)

    def load_ends(self, device: torch.device) -> None:
        """Read everything outside the decoder layers onto the device, and tie the weights that are tied."""
        self._load({key: self.stored[key] for key in self.end_keys()}, device)
        missing = {name for name, tensor in self.model.named_parameters(remove_duplicate=False) if tensor.is_meta}
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        self._require_loaded("")
        require_finite(self.folder, self.model.named_parameters())
        for module in modules_outside(self.model, self.layers):
            move(module, device)

    def free_ends(self) -> None:
        """Drop the parameters outside the decoder layers."""
        drop_parameters(modules_outside(self.model, self.layers))
        self.model.tie_weights()

    def layer_name(self, index: int) -> str:
        """Dotted name of a decoder layer."""
        return self.decoder.layer_name(index)

    def sizes(self) -> dict[str, int]:
        """Total bytes of the tensors: as stored, and as the equivalent dense checkpoint."""
        tensors = self.stored.values()
        packed = sum(t.packed_bytes if isinstance(t, PackedWeight) else t.nbytes for t in tensors)
        return {"stored_bytes": packed, "dense_bytes": sum(t.nbytes for t in tensors)}

    def linear_key(self, matrix: str) -> str | None:
        """The checkpoint's key of a linear layer's weight; None if not a `Linear`, or fused from several tensors."""
        weight = f"{matrix}.weight"
        if weight not in self._state_names or not isinstance(self.model.get_submodule(matrix), nn.Linear):
            return None
        keys = [key for key, targets in self.targets.items() if targets == (weight,)]
        return keys[0] if len(keys) == 1 else None

    def layer_keys(self, index: int) -> list[str]:
        """The checkpoint's own keys of one decoder layer."""
        prefix = self.layer_name(index) + "."
        return [key for key, targets in self.targets.items() if targets[0].startswith(prefix)]

    def end_tensors(self) -> dict[str, Tensor]:
        """The tensors outside the decoder layers that the model has, as stored."""
        return {key: self.stored[key][...] for key in self.end_keys() if self._feeds(key, self._state_names)}

    def ignored_keys(self) -> list[str]:
        """The checkpoint's keys outside the decoder layers that the model has no place for, such as a draft head."""
        return [key for key in self.end_keys() if not self._feeds(key, self._state_names)]

    def end_keys(self) -> list[str]:
        """The checkpoint's keys outside the decoder layers, including those unknown to the model."""
        layers = tuple(f"{self.layer_name(index)}." for index in range(len(self.layers)))
        return [key for key, targets in self.targets.items() if not targets[0].startswith(layers)]

    def checkpoint_tensors(
        self, index: int, changed: Collection[str] = (), smaller: Smaller | None = None
    ) -> dict[str, Tensor]:
        """The resident layer under the checkpoint's own keys and dtypes.

        Args:
            index: number of the layer.
            changed: its parameters with new values; where the compute dtype is narrower, the others are copied from the
                source.
            smaller: the layer to store instead; keys of removed parts (experts, blocks) are left out.

        Raises:
            CheckpointError: the conversion does not reproduce the source's keys.
        """
        prefix = self.layer_name(index)
        layer, model = (self.layers[index], self.model) if smaller is None else (smaller.layer, smaller.model)
        state = {f"{prefix}.{name}": tensor for name, tensor in layer.state_dict().items()}
        # Buffers that the checkpoint lacks have kept their initial values.
        for name, _ in layer.named_buffers():
            if not any(f"{prefix}.{name}" in targets for targets in self.targets.values()):
                state.pop(f"{prefix}.{name}", None)
        model._weight_conversions = [c for c in self._conversions if c.was_used()]
        reverted = revert_weight_conversion(model, state)
        wanted = self.layer_keys(index)
        renamed = {_as_in(wanted, key, self.model.base_model_prefix): tensor for key, tensor in reverted.items()}
        extra = set(renamed) - set(wanted)
        # Keys that the model ignores (such as old rotary buffers) are carried over; all others must be present.
        absent = [key for key in wanted if key not in renamed]
        lost = [key for key in absent if self._feeds(key, self._state_names)]
        if extra or (lost and smaller is None):
            raise CheckpointError(
                f"the tensors of {prefix} do not convert back to the checkpoint's keys: {sorted(extra)[:3]}",
                fix="report this as a bug, with the model's id",
            )
        new = {f"{prefix}.{name}" for name in changed}
        result = {key: self._as_stored(key, tensor, self._feeds(key, new), smaller) for key, tensor in renamed.items()}
        carried = {key: self.stored[key][...] for key in absent if key not in lost}
        return {key: positive_zeros(tensor) for key, tensor in {**result, **carried}.items()}

    def _as_stored(self, key: str, tensor: Tensor, changed: bool, smaller: Smaller | None) -> Tensor:
        """A resident tensor in its stored dtype; a narrower compute dtype affects only the changed weights."""
        dtype = self.stored[key].dtype
        if torch.promote_types(tensor.dtype, dtype) == tensor.dtype:
            return tensor.to(dtype)
        original = self.stored[key][...]
        if smaller is not None:
            original = smaller.part(self._inside(key), original)
            if original.shape != tensor.shape:  # one of several tensors fused into one parameter
                return tensor.to(dtype)
        if not changed:
            return original
        tensor = tensor.to("cpu")
        # A zero was pruned, even where the original also rounds to zero.
        return original.where((original.to(tensor.dtype) == tensor) & (tensor != 0), tensor.to(dtype))

    def _feeds(self, key: str, names: Collection[str]) -> bool:
        return any(target in names for target in self.targets[key])

    def _inside(self, key: str) -> str:
        """The name, inside its layer, of the parameter that a checkpoint key becomes."""
        return self.decoder.place(self.targets[key][0])[1]

    def _add(self, tensors: Mapping[str, Stored | PackedWeight]) -> None:
        """Read these tensors from now on."""
        self.targets |= self._plan_targets([key for key in tensors if key not in self.targets])
        self.stored |= tensors

    def _plan_targets(self, keys: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Map each checkpoint key to the parameters that its tensor becomes, or is part of."""
        if not keys:
            return {}
        renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        patterns = {source: c.target_patterns for c in converters for source in c.source_patterns}
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        targets = {}
        for key in keys:
            target, source = rename_source_key(key, renamings, converters, prefix, state)
            if target not in state and key in state:
                target, source = rename_source_key(key, [], [], prefix, state)
            first, *others = patterns.get(source, [target])
            targets[key] = target, *(target.replace(first, other) for other in others)
        return targets

    def _load(self, tensors: Mapping[str, Stored | PackedWeight], device: torch.device) -> None:
        dtype = self.model.dtype
        known = {key: _widened(t, dtype) for key, t in tensors.items() if self._feeds(key, self._state_names)}
        settings = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=copy.deepcopy(self._conversions),
        )
        # transformers 5.15 and 5.16 take the tensor-parallel plan as an extra argument.
        signature = inspect.signature(convert_and_load_state_dict_in_model).parameters
        plan = {"tp_plan": None} if "tp_plan" in signature else {}
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, known, settings, **plan)
        if info.mismatched_keys or info.conversion_errors:
            problem = info.conversion_errors or sorted(info.mismatched_keys)[0]
            raise CheckpointError(
                f"{self.folder}: a tensor does not fit the model: {problem}",
                expected="the shapes that config.json describes",
                fix="check that config.json and the weights belong together",
            )

    def _require_loaded(self, prefix: str) -> None:
        absent = [
            name
            for name, tensor in self.model.named_parameters()
            if tensor.is_meta and name.startswith(prefix) and (prefix or not name.startswith(f"{self.layers_path}."))
        ]
        require_none(self.folder, absent)


@dataclass(frozen=True, slots=True)
class _Widened:
    """A stored tensor that is read as float32, with the interface of the lazy tensors that transformers reads."""

    stored: Stored

    def __getitem__(self, index: object) -> Tensor:
        return self.stored.read(torch.float32)

    def get_dtype(self) -> str:
        return "F32"


def _widened(tensor: Stored | PackedWeight, dtype: torch.dtype) -> Stored | PackedWeight | _Widened:
    """Read 16-bit tensors directly as float32 where that is the compute dtype: a 16-bit copy would take memory."""
    if isinstance(tensor, Stored) and tensor.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        return _Widened(tensor)
    return tensor


def open_checkpoint(
    folder: Path, device: torch.device, compute_dtype: str = "auto", decoder_layers: str | None = None
) -> CheckpointSource:
    """Open a checkpoint in the dtype used for computing.

    Args:
        folder: a local folder with config.json and safetensors.
        device: where it will be computed.
        compute_dtype: a torch dtype's name, or "auto" (see `precision.computed_in`).
        decoder_layers: dotted name of the decoder layers; None: they are searched for.

    Raises:
        ModelError: it is not a causal LM, or its decoder layers cannot be identified.
        CheckpointError: the files are damaged or a tensor is missing.
    """
    if compute_dtype == "auto":
        dtype = computed_in(read_config(folder).dtype or torch.float32, device)
    else:
        dtype = getattr(torch, compute_dtype)
    return CheckpointSource(folder, dtype, decoder_layers)


def zero_share(source: CheckpointSource) -> float:
    """The share of exact zeros among the matrices of the decoder layers, estimated from samples of each."""
    zeros = total = 0.0
    for index in range(len(source.layers)):
        for stored in (source.stored[key] for key in source.layer_keys(index)):
            if len(stored.shape) > 1 and stored.dtype.is_floating_point and isinstance(stored, Stored):
                # Float8 knows no comparison with 0 on every device.
                values, size = stored.sample(_PIECES, _PIECE).float(), math.prod(stored.shape)
                zeros += float((values == 0).double().mean()) * size
                total += size
    return zeros / total if total else 0.0


def positive_zeros(tensor: Tensor) -> Tensor:
    """Replace -0.0 by 0.0 in place, so that every zero is all zero bits; returns the tensor."""
    return tensor.add_(0.0) if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else tensor


def _as_in(wanted: list[str], key: str, base_prefix: str) -> str:
    """The spelling of `key` that the checkpoint uses: with or without the base model's prefix."""
    for spelling in (key, key.removeprefix(f"{base_prefix}."), f"{base_prefix}.{key}"):
        if spelling in wanted:
            return spelling
    return key


def require_consistent(folder: Path) -> None:
    """Refuse a checkpoint whose config.json and files contradict each other, before any weights are read.

    Raises:
        CheckpointError: says how.
    """
    if problem := find_contradiction(folder):
        raise CheckpointError(
            f"{folder}: {problem}",
            expected="config.json and weights that describe the same model",
            fix="download the checkpoint again, or check that its files belong together",
        )


def find_contradiction(folder: Path) -> str | None:
    """Say how config.json and the headers of the files contradict each other.

    Args:
        folder: of a checkpoint; without config.json or the files that transformers reads, or if it is not a causal LM,
            there is nothing to contradict.

    Returns:
        What is wrong, or None; the values themselves are not checked.
    """
    weights = any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    if not weights or not (folder / "config.json").is_file():
        return None
    try:
        CheckpointSource(folder)
    except CheckpointError as error:
        return _without(folder, error)
    except ModelError as error:
        # Only what transformers itself could not build is a contradiction; an encoder, for example, is none.
        return _without(folder, error) if error.__cause__ else None
    return None


def _without(folder: Path, error: CheckpointError | ModelError) -> str:
    """What happened, without the name of the folder in front."""
    return error.what.removeprefix(str(folder)).removeprefix(":").lstrip()
