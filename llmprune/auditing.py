"""Check a checkpoint that was written."""

import torch

from llmprune.checkpoint_source import CheckpointSource
from llmprune.errors import ModelError
from llmprune.structures.configuration import audit


def audit_checkpoint(source: CheckpointSource) -> None:
    """Check the config and the tensors of a checkpoint against each other: load all of it, a layer at a time.

    Raises:
        ModelError: they do not fit; says what is wrong.
        CheckpointError: a tensor is missing, or has another shape than the config says.
    """
    cpu = torch.device("cpu")
    shapes: dict[str, list[int]] = {}

    def note() -> None:
        resident = (pair for pair in source.model.state_dict().items() if not pair[1].is_meta)
        shapes.update((name, list(tensor.shape)) for name, tensor in resident)

    source.load_ends(cpu)
    note()
    source.free_ends()
    for index in range(len(source.layers)):
        source.load_layer(index, cpu)
        note()
        source.free_layer(index)
    if problems := audit(source.config, shapes):
        raise ModelError(
            f"{source.folder}: config.json and the tensors do not fit: {'; '.join(problems[:3])}",
            expected="a checkpoint that loads",
            fix="report it with the model's id and the recipe",
        )
