"""From torch.nn.utils.prune to a checkpoint: `weight_orig` and `weight_mask` become `weight`, zeros included.

`save_pretrained` of a model with such masks writes keys that no loader expects, as does `torch.save` of its state dict.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from llmprune.errors import CheckpointError
from llmprune.exporting.report import ExportReport, files_of
from llmprune.models.checkpoint_source import find_contradiction
from llmprune.paths import user_path
from llmprune.progress import Progress, Watcher, ignore
from llmprune.storage.companions import CONFIG_NAME, copy_companions
from llmprune.storage.config_files import write_config
from llmprune.storage.exchange import replacing
from llmprune.storage.files import INDEX_NAME, read_header, read_json, weight_files, write_json, write_shard
from llmprune.storage.folders import expanded, require_empty, require_free, require_other
from llmprune.storage.packed_config import without_packing_record
from llmprune.storage.state_dict import read_state_dict
from llmprune.storage.torch_prune import MASK, ORIGINAL, masked_keys, merged

_EXPECTED = "a folder with safetensors files, or a state dict that torch.save wrote (.pt, .pth or .bin)"


def import_masked(
    source: str | Path,
    output: str | Path,
    *,
    config: str | Path | None = None,
    overwrite: bool = False,
    watch: Watcher = ignore,
) -> ExportReport:
    """Write a model that torch.nn.utils.prune has pruned as an ordinary checkpoint.

    Args:
        source: a folder that `save_pretrained` wrote, or a file with a state dict, of which torch reads tensors only
            (`weights_only`).
        output: a new folder.
        config: folder with the model's config.json and tokenizer; default: `source`, if it is a folder.
        overwrite: replace an earlier checkpoint in `output`, once the new one is whole.
        watch: told about every file.

    Returns:
        What was written.

    Raises:
        CheckpointError: `source` has no such tensors or cannot be read, a mask does not fit, or the result is not what
            config.json describes.
        ResumeError: `output` is not empty, or is in use.
    """
    path, target = user_path(source, CheckpointError, expected=_EXPECTED), expanded(output)
    companions = path if config is None else expanded(config)
    if not (companions / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{companions} has no {CONFIG_NAME}",
            expected="the folder of the model, with its config.json",
            fix="name the folder that the model was loaded from (--config)",
        )
    for read in (path, companions):
        require_other(target, read)
    require_free(target)
    require_empty(target, resume=None, overwrite=overwrite)
    shapes, parts = _parts(path)
    plain = masked_keys(shapes)
    if not plain:
        raise CheckpointError(
            f"{path} has no tensors named ...{ORIGINAL} and ...{MASK}",
            expected="a model pruned by torch.nn.utils.prune, before prune.remove",
            fix="use it as it is: without such masks it is an ordinary checkpoint",
        )
    with replacing(target) as new:
        _write(parts(), plain, new, watch)
        write_config(new, without_packing_record(read_json(companions / CONFIG_NAME)))
        for left_out in copy_companions(companions, new):
            watch(Progress(left_out))
        if problem := find_contradiction(new):
            raise CheckpointError(f"{path} does not fit {companions / CONFIG_NAME}: {problem}")
    files = files_of(target, "*.safetensors")
    facts = {"matrices": f"{len(plain)} had a mask"}
    return ExportReport("checkpoint", target, files, sum(file.bytes for file in files), facts)


def _parts(path: Path) -> tuple[list[str], Callable[[], Iterator[Mapping[str, Tensor]]]]:
    """The keys of all tensors, and a function that reads them, a file at a time, originals with their masks."""
    if not path.is_dir():
        state = read_state_dict(path)
        return list(state), lambda: iter([state])
    standard = any((path / name).is_file() for name in ("model.safetensors", INDEX_NAME))
    files = weight_files(path) if standard else sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} has no safetensors files", expected=_EXPECTED, fix="check the path")
    stored = {tensor.key: tensor for file in files for tensor in read_header(file)}
    masks = {f"{key}{MASK}" for key in masked_keys(stored)}

    def read() -> Iterator[Mapping[str, Tensor]]:
        for file in files:
            own = [tensor for tensor in stored.values() if tensor.file == file and tensor.key not in masks]
            tensors = {tensor.key: tensor[...] for tensor in own}
            for key in masked_keys([*tensors, *masks]):
                tensors[f"{key}{MASK}"] = stored[f"{key}{MASK}"][...]
            if tensors:
                yield tensors

    return list(stored), read


def _write(parts: Iterator[Mapping[str, Tensor]], plain: list[str], target: Path, watch: Watcher) -> None:
    """Write each part as a file, and the index."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(parts, start=1):
        watch(Progress("importing", number, unit="file"))
        name = f"model-{number:05d}.safetensors"
        own = [key for key in plain if f"{key}{ORIGINAL}" in tensors]
        taken = {f"{key}{end}" for key in own for end in (ORIGINAL, MASK)}
        result = {key: tensor for key, tensor in tensors.items() if key not in taken}
        for key in own:
            result[key] = merged(key, tensors[f"{key}{ORIGINAL}"], tensors[f"{key}{MASK}"])
        write_shard(target / name, result)
        weight_map |= dict.fromkeys(result, name)
        total += sum(tensor.nbytes for tensor in result.values())
    write_json(target / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
