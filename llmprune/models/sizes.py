"""Model size and compute per token, from shapes alone.

Two units, each a function of a layer's weights:

* `parameters`: elements of all parameters;
* `flops`: of one token's matmuls with weights, two per element; for routed experts only the share that a token
  reaches. Products of activations with each other, as in attention, depend on the context length and are left out.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.errors import RecipeError
from llmprune.models.decoder import prunable_matrices
from llmprune.models.source import Source

# What configs call the number of routed experts.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class Weight:
    """What the cost of one parameter of a decoder layer depends on.

    Attributes:
        shape: of the parameter.
        matrices: number of matrices in it: one per routed expert, 1 for ordinary parameters.
        share: the fraction of all tokens that each matrix multiplies, in (0, 1].
    """

    shape: tuple[int, ...]
    matrices: int = 1
    share: float = 1.0

    @property
    def elements(self) -> int:
        """Number of elements in the parameter."""
        return math.prod(self.shape)

    @property
    def product(self) -> tuple[int, int] | None:
        """The shape of one of its matrices; None for biases, gains and convolutions."""
        if len(self.shape) == 2:
            return self.shape[0] // self.matrices, self.shape[1]
        return (self.shape[1], self.shape[2]) if len(self.shape) == 3 and self.matrices > 1 else None


Cost = Callable[[Iterable[Weight]], float]


def parameters(weights: Iterable[Weight]) -> float:
    """Count the elements of all parameters."""
    return float(sum(weight.elements for weight in weights))


def flops(weights: Iterable[Weight]) -> float:
    """Count the floating-point operations of one token's matmuls with the matrices."""
    return sum(2.0 * weight.share * weight.elements for weight in weights if len(weight.shape) > 1)


COUNTS: dict[str, Cost] = {"parameters": parameters, "flops": flops}


def layer_size(layer: nn.Module, cost: Cost, active: float = 1.0) -> float:
    """The cost of a whole decoder layer.

    Args:
        layer: the layer; meta tensors suffice.
        cost: `parameters`, `flops` or a `Latency`.
        active: the fraction of the routed experts that a token reaches, in (0, 1].
    """
    return cost(layer_weights(layer, active).values())


def layer_weights(layer: nn.Module, active: float) -> dict[str, Weight]:
    """The parameters of a layer."""
    if not 0 < active <= 1:
        raise RecipeError(f"active is {active}", expected="the fraction of the experts that a token reaches, in (0, 1]")
    weights = {name: Weight(tuple(parameter.shape)) for name, parameter in layer.named_parameters()}
    for matrix in prunable_matrices(layer, ""):
        share = active if matrix.routed else 1.0
        weights[matrix.parameter] = replace(weights[matrix.parameter], matrices=matrix.experts, share=share)
    return weights


def active_experts(config: PretrainedConfig) -> float:
    """The fraction of the routed experts that a token reaches, according to the config; 1 without experts."""
    text = config.get_text_config(decoder=True).to_dict()
    chosen = next((text[key] for key in ("num_experts_per_tok", "moe_top_k", "top_k_experts") if text.get(key)), None)
    experts = [v for k, v in text.items() if k in _EXPERT_COUNTS and isinstance(v, int) and v]
    return min(chosen / max(experts), 1.0) if chosen and experts else 1.0


def ends_bytes(source: Source) -> int:
    """Bytes of the parameters outside the decoder layers; they may be on the meta device."""
    inside = source.layers_path + "."
    return sum(p.nbytes for name, p in source.model.named_parameters() if not name.startswith(inside))


def parameter_count(model: nn.Module) -> int:
    """The parameters of a model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def matmul_weights(model: PreTrainedModel) -> int:
    """The weights that multiply each token: all but the embeddings, unless the head shares them."""
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embeddings
    return parameter_count(model) - (0 if tied else embeddings.numel())
