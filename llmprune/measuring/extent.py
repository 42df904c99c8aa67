"""The size of a model: parameters, FLOPs and bytes, from its shapes alone."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.sizes import active_experts, flops, layer_size
from llmprune.storage.hub import resolve_model


@dataclass(frozen=True, slots=True)
class Extent:
    """The size of a model.

    Attributes:
        layers: decoder layers.
        hidden_size: hidden channels.
        parameters: all of them, tied ones once.
        flops_per_token: of the matmuls with weights in the decoder layers and the LM head; of the routed experts only
            the active ones count. Attention's matmuls of activations, which grow with the length, are left out.
        nbytes: size of the tensors as stored.
    """

    layers: int
    hidden_size: int
    parameters: int
    flops_per_token: int
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return asdict(self)


def measure_stored(model: str | Path, *, unpacked: bool = False) -> dict[str, Any]:
    """Measure a checkpoint and count its non-zero weights, reading it tensor by tensor.

    Args:
        model: a hub id, a local folder or "testbed".
        unpacked: report the bytes of the dense checkpoint that a packed one represents.

    Returns:
        `Extent.to_dict()`, with "nonzeros".
    """
    source = CheckpointSource(resolve_model(model))
    nonzeros = sum(int(stored[...].count_nonzero()) for stored in source.stored.values())
    dense = {"nbytes": source.sizes()["dense_bytes"]} if unpacked else {}
    return {**measure_extent(source).to_dict(), "nonzeros": nonzeros, **dense}


def measure_extent(source: CheckpointSource) -> Extent:
    """Measure a checkpoint's size; no weight is read."""
    active = active_experts(source.config)
    head = source.model.get_output_embeddings()
    return Extent(
        layers=len(source.layers),
        hidden_size=int(source.config.get_text_config(decoder=True).hidden_size),
        parameters=sum(parameter.numel() for parameter in source.model.parameters()),
        flops_per_token=round(
            sum(layer_size(layer, flops, active) for layer in source.layers)
            + (2 * head.weight.numel() if head is not None else 0)
        ),
        nbytes=source.sizes()["stored_bytes"],
    )
