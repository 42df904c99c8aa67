"""The trained model as a checkpoint: the pruned one's files and dtypes, packed as it was, with every zero counted."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmprune.errors import CheckpointError, RecoveryError
from llmprune.measuring.inspection import inspect_checkpoint
from llmprune.models.checkpoint_source import CheckpointSource, positive_zeros
from llmprune.progress import Progress, Watcher
from llmprune.storage.companions import CONFIG_NAME, copy_companions
from llmprune.storage.config_files import write_config
from llmprune.storage.copying import copy_tensors, in_shards
from llmprune.storage.files import INDEX_NAME, Stored, listed, read_json, write_json, write_shard
from llmprune.storage.folders import writing_to
from llmprune.storage.packed_config import packed_layouts, without_packing_record


def load_whole(source: CheckpointSource, device: torch.device) -> None:
    """Read all of a model onto the device."""
    source.load_ends(device)
    for index in range(len(source.layers)):
        source.load_layer(index, device)


def write_result(source: CheckpointSource, target: Path, watch: Watcher, *, dense: bool = False) -> None:
    """Write the model that a source holds, trained, as the checkpoint that it was read from.

    Args:
        source: of the pruned checkpoint, with all of its model in memory.
        target: an existing folder.
        watch: told about every shard.
        dense: unpack what is packed there, for weights that its layouts do not fit.

    Raises:
        CheckpointError: it cannot be written, or a tensor does not convert back to the checkpoint's.
    """
    config = read_json(source.folder / CONFIG_NAME)
    if dense:
        config = without_packing_record(config)
    layouts = packed_layouts(config)
    groups: list[Mapping[str, Tensor] | list[Stored]] = [_ends(source)]
    groups += [source.checkpoint_tensors(index) for index in range(len(source.layers))]
    ignored = (source.stored[key] for key in source.ignored_keys())
    groups += in_shards([stored for stored in ignored if isinstance(stored, Stored)])
    total, count = 0, len(groups)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups):
        watch(Progress("writing", number, count, unit="file"))
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        if isinstance(group, list):
            copy_tensors(target / name, group)
            weight_map |= {stored.key: name for stored in group}
            total += sum(stored.nbytes for stored in group)
            continue
        tensors: dict[str, Tensor] = {}
        for key, tensor in group.items():
            layout = layouts.get(key.removesuffix(".weight"))
            parts = {key: tensor.cpu()} if layout is None else layout.pack(tensor.cpu())
            prefix = "" if layout is None else key.removesuffix("weight")
            tensors |= {f"{prefix}{part}": value for part, value in parts.items()}
        write_shard(target / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    with writing_to(target):
        for left_out in copy_companions(source.folder, target):
            watch(Progress(left_out))
    write_config(target, config)
    write_json(target / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def compare_zeros(pruned: Path, result: Path, watch: Watcher) -> dict[str, int]:
    """Count the zeros of both checkpoints anew, from their files.

    Args:
        pruned: the one before.
        result: the one after.
        watch: told about every tensor.

    Returns:
        "before" and "after", over all matrices.

    Raises:
        RecoveryError: a matrix has fewer zeros than before.
    """
    before, after = (
        {row.name: row.zeros for row in inspect_checkpoint(folder, watch, stage).rows if len(row.shape) > 1}
        for folder, stage in ((pruned, "counting zeros before"), (result, "counting zeros after"))
    )
    if lost := [name for name, zeros in before.items() if after.get(name, 0) < zeros]:
        raise RecoveryError(
            f"{listed(lost)} would have fewer zeros than before",
            expected="every pruned weight to stay zero",
            fix="report this as a bug, with the model's id",
        )
    return {"before": sum(before.values()), "after": sum(after[name] for name in before)}


def _ends(source: CheckpointSource) -> Mapping[str, Tensor]:
    """The tensors outside the decoder layers, trained, under the checkpoint's own keys and in its dtypes."""
    state, ends = source.model.state_dict(), {}
    for key, stored in source.end_tensors().items():
        names = source.targets[key]
        value = state[names[0]] if len(names) == 1 else None
        if value is None or value.shape != stored.shape:
            raise CheckpointError(
                f"{key} is not one tensor of the model",
                expected="tensors outside the decoder layers that the model has as they are stored",
                fix="train it in a loop of your own with llmprune.keep_zeros",
            )
        ends[key] = positive_zeros(value.detach().to(stored.dtype).cpu().clone())
    return ends
