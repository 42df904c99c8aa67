"""Check whether config.json and the tensors of a checkpoint belong together."""

from pathlib import Path

import torch

from llmprune.checkpoint import INDEX_NAME, SINGLE_NAME
from llmprune.checkpoint_source import CheckpointSource
from llmprune.errors import CheckpointError, ModelError
from llmprune.overrides import UNBUILDABLE, one_line
from llmprune.structures.configuration import audit


def find_contradiction(folder: Path) -> str | None:
    """Say how config.json and the headers of the files contradict each other.

    Args:
        folder: of a checkpoint; one without config.json or the files that transformers reads, or of no causal LM,
            contradicts nothing.

    Returns:
        What is wrong, or None; whether the values make sense is not looked at.
    """
    weights = any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    if not weights or not (folder / "config.json").is_file():
        return None
    try:
        CheckpointSource(folder)
    except CheckpointError as error:
        return error.what.removeprefix(f"{folder}: ")
    except ModelError:
        return None
    except UNBUILDABLE as error:
        return f"no model can be built from config.json: {one_line(error)}"
    return None


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
