"""Write the pruned checkpoint: a shard for each layer, one for everything outside the layers, and the config.

Tensors that the model does not read, such as a draft head, are copied into shards of their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llmprune.models.checkpoint_source import CheckpointSource, positive_zeros
from llmprune.models.patched_config import patched_config
from llmprune.models.source import StoredSource
from llmprune.pruning.jobs import Job
from llmprune.storage.copying import in_shards
from llmprune.storage.files import Stored, read_header
from llmprune.storage.manifest import CommittedLayer
from llmprune.storage.output import OutputFolder
from llmprune.storage.packed_config import Format, pack_matrices
from llmprune.storage.report import MatchRow, MatrixRow, StructureRow
from llmprune.stream.resident import ResidentLayer
from llmprune.structures.reduction import Reduction
from llmprune.structures.remove.cuts import Cut


class Writer:
    """Writes one run's layers.

    Args:
        dense: the checkpoint that is pruned.
        reduction: removes structures from it; None: no structures are removed.
        target: the output folder.
        form: how pruned matrices are stored.
    """

    def __init__(
        self, dense: CheckpointSource, reduction: Reduction | None, target: OutputFolder, form: Format
    ) -> None:
        self._dense, self._result = dense, dense if reduction is None else reduction.result
        self._streamed: StoredSource = dense if reduction is None else reduction.source
        self._reduction, self.target, self._format = reduction, target, form
        draft_head = None if reduction is None else reduction.found.draft_head
        dropped = set() if draft_head is None else set(draft_head.keys)
        ignored = (dense.stored[key] for key in dense.ignored_keys() if key not in dropped)
        # Nothing reads them here, and they may be larger than a layer: they never are in memory.
        self._copied = in_shards([stored for stored in ignored if isinstance(stored, Stored)])

    def commit(
        self,
        layer: ResidentLayer,
        rows: Sequence[MatrixRow],
        jobs: Mapping[str, Job],
        cuts: Sequence[Cut],
        removed: Sequence[StructureRow],
        matches: Sequence[MatchRow] = (),
    ) -> None:
        """Write a finished layer; from now on it is read from its shard.

        Args:
            layer: resident.
            rows: the report rows of its matrices.
            jobs: what was done to them.
            cuts: what was removed.
            removed: the report rows of the cuts.
            matches: the report row, if the layer was fitted as a whole.
        """
        ranks = layer.stream.settings.ranks
        if not ranks.first:
            committed: CommittedLayer = ranks.share(None)
            self.target.follow(layer.name, committed)
            self._result.overlay(self.target.path / committed.shard, self.target.layouts_of(committed))
            return
        tensors, number = self._tensors(layer, cuts)
        patterns = {name: job.pattern for name, job in jobs.items() if self._is_linear(layer, name)}
        groups = {name: columns for name in patterns if (columns := _shared_columns(layer, name, jobs[name]))}
        tensors, layouts = pack_matrices(tensors, patterns, self._format, groups)
        shard = self.target.commit(layer.name, self._shard(number + 1), tensors, rows, layouts, removed, matches)
        self._result.overlay(shard, layouts)
        ranks.share(self.target.layers[layer.name])

    def finish(self) -> list[str]:
        """Write everything outside the decoder layers, the config and the index; then the files can be loaded.

        Returns:
            A sentence about each companion of the dense checkpoint that was not copied.
        """
        first = self._shard(0)
        ends = {key: positive_zeros(tensor) for key, tensor in self._streamed.end_tensors().items()}
        shard = self.target.commit_ends(first, ends)
        if self._reduction is None:
            self._result.overlay(shard)  # the dense checkpoint is no longer read
        copied = [self._shard(len(self._result.layers) + 1 + number) for number in range(len(self._copied))]
        for name, tensors in zip(copied, self._copied, strict=True):
            self.target.copy(name, tensors)
        shards = [first, *(layer.shard for layer in self.target.layers.values()), *copied]
        headers = {shard: read_header(self.target.path / shard) for shard in shards}
        return self.target.finish(self._dense.folder, headers, self._config())

    def _config(self) -> dict[str, Any] | None:
        """The content of config.json; None if it stays as it is."""
        if self._reduction is None:
            return None
        config = patched_config(self._dense, self._result.config)
        draft_head = self._reduction.found.draft_head
        return config if draft_head is None else draft_head.without(config)

    def _tensors(self, layer: ResidentLayer, cuts: Sequence[Cut]) -> tuple[dict[str, Tensor], int]:
        """The tensors to store for a layer, and its number in the result."""
        if self._reduction is None:
            return self._dense.checkpoint_tensors(layer.index, layer.replaced), layer.index
        return self._reduction.tensors(layer, cuts), self._reduction.numbers[layer.index]

    def _is_linear(self, layer: ResidentLayer, name: str) -> bool:
        """Whether a matrix is a linear layer that can be packed.

        If its key differs from the layer's name, the packed tensors could not be matched to it (see packing.py).
        """
        original = f"{self._dense.layer_name(layer.index)}{name.removeprefix(layer.name)}"
        return self._dense.linear_key(original) == f"{original}.weight"

    def _shard(self, number: int) -> str:
        """The usual shard name; number 0 holds the ends, and what the model does not read follows the layers."""
        total = 1 + len(self._result.layers) + len(self._copied)
        return f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def _shared_columns(layer: ResidentLayer, name: str, job: Job) -> int:
    """The columns that share a peak in the 8-bit layouts; 0 if the matrix has no 8-bit weights."""
    if job.quantiser is None or job.quantiser.bits != 8:
        return 0
    return job.quantiser.group or layer.matrices[name].shape[1]
