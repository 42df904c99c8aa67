"""The matrices of a trained model as rows of its report, their zeros counted as they are stored."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.decoder import Matrix, prunable_matrices
from llmprune.storage.detection import describe_mask
from llmprune.storage.report import MatrixRow, Report

# Of a matrix that no report says anything about.
_UNKNOWN = "unknown"


def counted_row(
    layer: str, matrix: Matrix, parameter: Tensor, stored: torch.dtype, *, pattern: str = "", method: str = _UNKNOWN
) -> MatrixRow:
    """The row of a matrix that nothing was solved for.

    Args:
        layer: dotted name of its layer.
        matrix: how it lies in its parameter.
        parameter: holds it.
        stored: dtype of the checkpoint, in which small weights may be zero.
        pattern: as requested; empty: what its zeros look like.
        method: as requested.
    """
    weight = matrix.view(parameter.detach()).to(stored)
    zeros = weight.numel() - int(weight.count_nonzero())
    found = pattern or describe_mask(weight != 0)
    return MatrixRow(
        layer, matrix.name, matrix.shape, found, method, zeros, error=None, damping=None, damping_tried=(), tokens=0,
        prior_tokens=0, dead_inputs=None, seconds=0.0, peak_bytes=0,
    )  # fmt: skip


def recovered_rows(source: CheckpointSource, pruned: Report | None) -> tuple[MatrixRow, ...]:
    """The rows of what pruning has zeroed in a model.

    Args:
        source: of the pruned model, with the trained weights in memory.
        pruned: its report, whose matrices these are then; without any rows, matrices with a pattern are.
    """
    known = {} if pruned is None else {row.name: row for row in pruned.rows}
    rows = []
    for layer, matrix, parameter, stored in _matrices(source):
        if (before := known.get(matrix.name)) is not None:
            told = {"pattern": before.pattern, "method": before.method}
            rows.append(counted_row(layer, matrix, parameter, stored, **told))
        elif not known and (row := counted_row(layer, matrix, parameter, stored)).pattern != "dense":
            rows.append(row)
    return tuple(rows)


def stored_dtypes(source: CheckpointSource) -> dict[str, torch.dtype]:
    """The dtype of each parameter in its checkpoint; of several tensors that are fused into one, that of the first."""
    found: dict[str, torch.dtype] = {}
    for key, names in source.targets.items():
        for name in names:
            found.setdefault(name, source.stored[key].dtype)
    return found


def _matrices(source: CheckpointSource) -> Iterator[tuple[str, Matrix, Tensor, torch.dtype]]:
    dtypes = stored_dtypes(source)
    for index, layer in enumerate(source.layers):
        name = source.layer_name(index)
        for matrix in prunable_matrices(layer, name):
            stored = dtypes[f"{name}.{matrix.parameter}"]
            yield name, matrix, layer.get_parameter(matrix.parameter), stored
