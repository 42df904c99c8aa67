"""Find the matrices that write an MLP's output, where that output enters the residual stream unchanged.

Only then can a linear map of the output be absorbed: T (W x + b) = (T W) x + T b. A norm behind the MLP, a scale for
each channel, or a matrix that is read by anything else prevents it. Weights and scores that are the same for all
channels of a token (gates of experts, multipliers of the residual) do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.models.decoder import Decoder
from llmprune.structures.find.discovery import Structure, find_structures, once
from llmprune.structures.find.tracing import Product, Trace, TracedForward, eagerly

# How far the cosine between a gradient and that of the residual stream may be from 1.
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class MlpOutput:
    """What writes the output of one layer's MLP to the residual stream.

    Attributes:
        matrices: parameters inside the layer; stacked experts share one.
        biases: parameters that are added to their products.
        refusal: why a linear map cannot be absorbed; None if it can.
    """

    matrices: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    refusal: str | None = None


def find_mlp_outputs(decoder: Decoder, found: Sequence[Sequence[Structure]] | None = None) -> list[MlpOutput]:
    """Find the last matrices of every decoder layer's MLP, without reading any weights.

    Args:
        decoder: a causal LM; meta tensors suffice. Left unchanged.
        found: the structures of each layer, if already known.

    Returns:
        One for each layer; refused if its output is changed on the way to the residual stream.

    Raises:
        ModelError: a matrix is used in an unknown layout.
    """
    found = find_structures(decoder) if found is None else found
    consumers = [[s.consumer for s in own if s.kind == "ffn"] for own in found]
    with torch.enable_grad(), eagerly(decoder.model):
        trace = TracedForward(decoder, frozen=False)
        outputs: list[MlpOutput] = trace.each(once(lambda index, trace: _output(trace, consumers[index])))
    if trace.handed_on - {-1}:
        return [MlpOutput(refusal="layers pass each other more than hidden states")] * len(outputs)
    return outputs


def _output(trace: Trace, consumers: Sequence[str]) -> MlpOutput:
    size = trace.hidden[0].shape[-1]
    names = tuple(dict.fromkeys(name for name in consumers if trace.matrices[name][0].shape[0] == size))
    if not names:
        return MlpOutput(refusal="it has no MLP whose output has the size of the hidden states")
    for product in trace.products:
        if product.parameter in names and product.leaf.numel() and not _added(trace, product):
            return MlpOutput(refusal=f"the output of {product.parameter} is changed before it is added")
    return MlpOutput(names, tuple(trace.biases[name] for name in names if name in trace.biases))


def _added(trace: Trace, product: Product) -> bool:
    """Whether a product only enters the hidden states multiplied by a number for each token.

    The gradient of v . hidden with respect to the product is then v itself, token by token, times these numbers.
    """
    hidden = trace.hidden[0]
    if not hidden.requires_grad:
        return False
    probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad(hidden, [product.leaf], probe, retain_graph=True, allow_unused=True)
    if gradient is None:
        return False
    rows = gradient.movedim(product.leaf_dim, -1).reshape(-1, hidden.shape[-1])
    sizes = rows.abs().sum(-1)
    # Where a gate is all but closed, rounding is all there is. Experts see the tokens in an order of their own.
    used = rows[(sizes > 0) & (sizes > 1e-3 * sizes.max())]
    cosines: Tensor = F.normalize(used, dim=-1) @ F.normalize(probe.flatten(0, -2), dim=-1).T
    return len(used) > 0 and bool((cosines.abs().amax(-1) > 1 - _TOLERANCE).all())
