"""Write the tensors of a checkpoint in another form, with one of its shards in memory at a time."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from llmprune.errors import FormatError, ModelError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.linear_weights import linear_weights
from llmprune.progress import Progress, Watcher
from llmprune.storage.companions import CONFIG_NAME, copy_companions
from llmprune.storage.config_files import write_config
from llmprune.storage.files import read_json, write_shard
from llmprune.storage.folders import writing_to
from llmprune.storage.packed_config import packed_layouts, without_packing_record

# Pruned: at least this fraction of a matrix is zero.
_PRUNED = 0.01


@dataclass(frozen=True)
class Exported:
    """A checkpoint to be exported.

    Attributes:
        folder: its folder.
        watch: told about every shard.
    """

    folder: Path
    watch: Watcher

    @cached_property
    def checkpoint(self) -> CheckpointSource:
        """The checkpoint, without its weights."""
        return CheckpointSource(self.folder)

    @cached_property
    def linear(self) -> dict[str, str]:
        """Key of the weight -> name of the layer, for the linear layers inside the decoder layers."""
        return linear_weights(self.checkpoint)

    @cached_property
    def _shares(self) -> Counter[str]:
        """How many tensors of the checkpoint become one of the model's."""
        return Counter(name for names in self.checkpoint.targets.values() for name in names)

    @property
    def dense_bytes(self) -> int:
        """Size of its tensors when dense."""
        return sum(tensor.nbytes for tensor in self.checkpoint.stored.values())

    def name_of(self, key: str) -> str:
        """The model's own name of a tensor.

        Raises:
            ModelError: the model fuses it with others, or has no place for it.
        """
        names = self.checkpoint.targets[key]
        if len(names) != 1 or self._shares[names[0]] > 1:
            raise ModelError(
                f"{key} is stored in another form than the model has it",
                expected="a checkpoint whose tensors are those of the model",
                fix="choose another --to, which keeps the checkpoint's own tensors",
            )
        return names[0]

    def write(
        self, target: Path, convert: Callable[[str, Tensor], Mapping[str, Tensor]], prefix: str, stage: str
    ) -> list[str]:
        """Write every tensor, and copy configuration and tokenizer.

        Args:
            target: an empty folder.
            convert: returns what to write for a key and its tensor.
            prefix: of the names of the files, so that nothing takes them for a checkpoint.
            stage: for the watcher.

        Returns:
            The names of the files.
        """
        shards: dict[str, list[str]] = {}
        for key, stored in self.checkpoint.stored.items():
            shards.setdefault(stored.file.name, []).append(key)
        written = []
        for done, name in enumerate(sorted(shards)):
            self.watch(Progress(stage, done, len(shards), name, unit="file"))
            tensors: dict[str, Tensor] = {}
            for key in shards[name]:
                tensors |= convert(key, self._read(key))
            write_shard(target / f"{prefix}{name}", tensors)
            written.append(f"{prefix}{name}")
        copy_description(self.folder, target, self.watch)
        self.watch(Progress(stage, len(shards), len(shards), unit="file"))
        return written

    def _read(self, key: str) -> Tensor:
        try:
            return self.checkpoint.stored[key][...]
        except FormatError as error:
            raise error.at(key) from error


def copy_description(source: Path, target: Path, watch: Watcher) -> None:
    """Copy configuration, tokenizer and licence; of a packed checkpoint, the configuration of the dense one."""
    with writing_to(target):
        for left_out in copy_companions(source, target):
            watch(Progress(left_out))
        shutil.copyfile(source / CONFIG_NAME, target / CONFIG_NAME)
    config = read_json(source / CONFIG_NAME)
    if packed_layouts(config):
        write_config(target, without_packing_record(config))


def is_pruned(weight: Tensor) -> bool:
    """Whether a matrix has more zeros than chance leaves."""
    return weight.numel() - int(weight.count_nonzero()) >= max(1, _PRUNED * weight.numel())
