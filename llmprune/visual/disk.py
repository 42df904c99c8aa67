"""How large a checkpoint is on the disk, and how many parameters it stands for; no weight is read."""

import math
from pathlib import Path

from llmprune.checkpoint import INDEX_NAME, SINGLE_NAME, read_index, read_json
from llmprune.packed import as_dense, packed_layouts


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, whole or not."""
    return any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))


def stored_bytes(folder: Path) -> int:
    """Bytes of the tensors as they are stored, which is what reports count: the files without their headers.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    return sum(tensor.nbytes for tensor in read_index(folder).values())


def count_parameters(folder: Path) -> int:
    """Elements of all tensors, those of packed matrices as the dense ones that they stand for.

    Raises:
        CheckpointError: a file is missing or damaged.
        FormatError: a layout cannot be read.
    """
    tensors = as_dense(read_index(folder), packed_layouts(read_json(folder / "config.json")))
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
