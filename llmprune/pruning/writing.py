"""Write the pruned checkpoint: a shard for each layer, one for everything outside the layers, and the config."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from llmprune.models.checkpoint_source import CheckpointSource, positive_zeros
from llmprune.models.patched_config import patched_config
from llmprune.models.source import StoredSource
from llmprune.pruning.jobs import Job
from llmprune.storage.files import read_header
from llmprune.storage.output import OutputFolder
from llmprune.storage.packed_config import Format, pack_matrices
from llmprune.storage.report import MatchRow, MatrixRow, StructureRow
from llmprune.stream.stream import ResidentLayer
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
        tensors, number = self._tensors(layer, cuts)
        patterns = {name: job.pattern for name, job in jobs.items() if self._is_linear(layer, name)}
        tensors, layouts = pack_matrices(tensors, patterns, self._format)
        shard = self.target.commit(layer.name, self._shard(number + 1), tensors, rows, layouts, removed, matches)
        self._result.overlay(shard, layouts)

    def finish(self) -> list[str]:
        """Write everything outside the decoder layers, the config and the index; then the files can be loaded.

        Returns:
            A sentence about each companion of the dense checkpoint that was not copied.
        """
        first = self._shard(0)
        ends = {key: positive_zeros(tensor) for key, tensor in self._streamed.end_tensors().items()}
        self.target.commit_ends(first, ends)
        shards = [first, *(layer.shard for layer in self.target.layers.values())]
        config = None if self._reduction is None else patched_config(self._dense, self._result.config)
        headers = {shard: read_header(self.target.path / shard) for shard in shards}
        return self.target.finish(self._dense.folder, headers, config)

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
        """The usual shard name; number 0 holds everything outside the decoder layers."""
        return f"model-{number + 1:05d}-of-{len(self._result.layers) + 1:05d}.safetensors"
