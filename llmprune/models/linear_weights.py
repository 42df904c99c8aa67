"""The prunable matrices of a checkpoint, as it stores them."""

from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.decoder import prunable_matrices


def linear_weights(checkpoint: CheckpointSource) -> dict[str, str]:
    """Key of the weight -> name of the layer, for the linear layers inside the decoder layers."""
    return {
        key: matrix.name
        for index, layer in enumerate(checkpoint.layers)
        for matrix in prunable_matrices(layer, checkpoint.layer_name(index))
        if (key := checkpoint.linear_key(matrix.name)) is not None
    }
