"""Run a model without its weights and record, for each decoder layer, what depends on what.

Each matmul with a weight is cut: its result is replaced by random values at which the autograd graph starts afresh, so
that neither the weight nor anything before it matters. All other parameters of a layer are replaced by random values,
so that none of them happens to be zero.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from llmprune.errors import ModelError
from llmprune.models.decoder import Decoder, Matrix, prunable_matrices
from llmprune.models.source import eager_experts
from llmprune.stream.observation import PRODUCTS
from llmprune.stream.variants import nested_tensors

# Prime, so that no size of a model equals the number of tokens; enough that hardly any ReLU is inactive for all.
_TOKENS = 37
_SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}
_STATISTICS = {
    torch.mean, torch.Tensor.mean, torch.var, torch.Tensor.var, torch.std, torch.Tensor.std, torch.norm,
    torch.Tensor.norm, torch.linalg.vector_norm,
}  # fmt: skip
# A parameter or argument, and one of its dimensions; OUT is the output dimension of a matrix.
Axis = tuple[str, int]
OUT = -1
# A layer's own number, which does not change what it computes.
OWN_NUMBER = ("layer_idx", "layer_id", "layer_number", "layer_index")


@dataclass
class Product:
    """A matmul with a weight that was cut: its input, and the random leaf that replaces its result.

    Attributes:
        parameter: name of the weight inside its layer.
        read: the input, float32 [*, tokens, in] or [*, in, tokens]; its autograd graph leads back to the leaves of this
            layer on which it depends.
        read_dim: the dimension of `read` along the matrix's inputs, -1 or -2.
        leaf: [*, tokens, out] or [*, out, tokens], random; later operations depend on it, and it depends on nothing.
        leaf_dim: the dimension of `leaf` along the matrix's outputs.
    """

    parameter: str
    read: Tensor
    read_dim: int
    leaf: Tensor
    leaf_dim: int


@dataclass
class Trace:
    """One decoder layer's forward: an autograd graph between cut matmuls, with stand-ins for everything else.

    Names are those inside the layer. Fields that hold a part of the graph (products, selections, arguments, hidden and
    other_outputs) are emptied once the layer has been visited.

    Attributes:
        matrices: parameter -> the matrices in it: one, or one per expert or block.
        shapes: parameter -> its shape, for all parameters.
        small: parameter that is not a matrix (gain, bias, convolution), or float buffer -> the leaf that replaces it:
            random for parameters, the actual values for buffers.
        fixed: the buffers among them that are not saved: computed from the config, they cannot shrink with a group.
        biases: matrix parameter -> the parameter that was added to its product.
        products: every matmul with one of the matrices, in execution order; a matrix that is used twice, or for several
            experts, has several.
        selections: inputs of each top-k over the experts, [*, experts], which depend on the router's rows.
        arguments: "argument NAME" -> the leaf that replaces a float tensor passed to the layer in addition to its
            hidden states (rotary cosines, masks, keys of other layers).
        hidden: the hidden states that the layer returns, [1, tokens, hidden]; a list of one.
        other_outputs: everything else it passes on that depends on its leaves: other outputs that a later layer reads,
            and what it wrote into its arguments (caches).
        grouped: whether a router selects groups of experts before experts.
        settings: (module, class, attribute, value) of all plain values in the layer's modules.
    """

    matrices: dict[str, list[Matrix]]
    shapes: dict[str, torch.Size]
    small: dict[str, Tensor] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    biases: dict[str, str] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    selections: list[Tensor] = field(default_factory=list)
    arguments: dict[str, Tensor] = field(default_factory=dict)
    hidden: list[Tensor] = field(default_factory=list)
    other_outputs: list[Tensor] = field(default_factory=list)
    grouped: bool = False
    settings: tuple[object, ...] = ()

    def signature(self) -> tuple[object, ...]:
        """A key that is equal for layers with the same computation but different weights."""
        products = tuple((p.parameter, p.read.shape[-1], p.read.requires_grad) for p in self.products if p.leaf.numel())
        arguments = tuple((name, tuple(leaf.shape)) for name, leaf in self.arguments.items())
        outputs = len(self.other_outputs), len(self.selections), self.grouped
        return self.settings, tuple(dict.fromkeys(products)), tuple(self.shapes.items()), arguments, outputs

    def experts(self) -> set[int]:
        """The numbers of matrices in fused parameters, by which routers are recognised."""
        return {matrices[0].experts for matrices in self.matrices.values()} - {1}

    def inputs(self, consumer: str) -> list[tuple[Tensor, int]]:
        """A matrix's inputs that depend on this layer's leaves, each with the dimension along its input features."""
        found = [(p.read, p.read_dim) for p in self.products if p.parameter == consumer]
        return [(read, dim) for read, dim in found if read.requires_grad and read.numel()]

    def sources(self) -> list[tuple[Axis, Tensor, int]]:
        """Everything that a consumer may depend on: (axis, leaf, dimension of the leaf)."""
        sources = [((p.parameter, OUT), p.leaf, p.leaf_dim % p.leaf.dim()) for p in self.products]
        for name, leaf in (*self.small.items(), *self.arguments.items()):
            sources += [((name, dim), leaf, dim) for dim in range(leaf.dim())]
        return sources


class _LastLayerDone(Exception):
    """Ends the forward."""


class TracedForward(TorchFunctionMode):
    """One forward of the model with stand-ins for its weights; passes each layer's trace to a visitor.

    Args:
        decoder: the causal LM.
        frozen: hold the statistics of norms constant.

    Attributes:
        handed_on: layers that return more than hidden states to a later layer.
    """

    def __init__(self, decoder: Decoder, *, frozen: bool) -> None:
        super().__init__()
        self._decoder, self._model, self._layers, self._frozen = decoder, decoder.model, decoder.layers, frozen
        self._random = torch.Generator().manual_seed(0)
        self._parameter_of: dict[int, str] = {}
        self._trace: Trace | None = None
        self._returned: dict[int, int] = {}
        self.handed_on: set[int] = set()

    def each(self, visit: Callable[[int, Trace], Any]) -> list[Any]:
        """Run the model; returns the visitor's result for each layer's trace."""
        results: list[Any] = []
        # A single number expanded to a whole weight: nothing of the model's size is allocated, and each parameter still
        # has its own storage, by which its matmuls are recognised. The values of matrices never matter: their matmuls
        # are cut.
        tensors = {name: torch.full((1,), 0.01).expand(p.shape) for name, p in self._model.named_parameters()}
        tensors |= {name: buffer.detach().cpu() for name, buffer in self._model.named_buffers()}
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(_TOKENS)[None] % vocabulary
        # Nothing after the layers is needed, and the LM head's matmul is the largest of all.
        with ExitStack() as stack, suppress(_LastLayerDone):
            for index, layer in enumerate(self._layers):
                trace = self._open(layer, self._decoder.layer_name(index), tensors)
                stack.callback(layer.register_forward_pre_hook(self._enter(trace), with_kwargs=True).remove)
                leave = self._leave(index, trace, visit, results)
                stack.callback(layer.register_forward_hook(leave, with_kwargs=True).remove)
            with self:
                torch.func.functional_call(self._model, tensors, kwargs={"input_ids": ids, "use_cache": False})
        if len(results) < len(self._layers):
            raise ModelError(f"{type(self._model).__name__} called {len(results)} of {len(self._layers)} layers")
        return results

    def _open(self, layer: nn.Module, name: str, tensors: dict[str, Tensor]) -> Trace:
        """Install stand-ins for a layer's tensors: constants without memory for matrices, else random values."""
        matrices: dict[str, list[Matrix]] = {}
        for matrix in prunable_matrices(layer, name):
            matrices.setdefault(matrix.parameter, []).append(matrix)
        trace = Trace(matrices, {parameter: p.shape for parameter, p in layer.named_parameters()})
        trace.settings = _settings(layer)
        for parameter in trace.shapes:
            full = f"{name}.{parameter}"
            if parameter in matrices:
                # Views of the parameter (an expert's slice, a transpose) share its storage.
                self._parameter_of[storage_of(tensors[full])] = parameter
            else:
                # A gain or bias of 0, as in a freshly initialised model, would hide its influence.
                trace.small[parameter] = tensors[full] = self._leaf(tensors[full])
        # Buffers keep their values: random rotary frequencies or masks would change the computation.
        for buffer, value in layer.named_buffers():
            if value.is_floating_point():
                owner, _, leaf_name = buffer.rpartition(".")
                if leaf_name in layer.get_submodule(owner)._non_persistent_buffers_set:
                    trace.fixed.add(buffer)
                trace.small[buffer] = tensors[f"{name}.{buffer}"] = value.detach().cpu().float().requires_grad_()
        return trace

    def _leaf(self, like: Tensor) -> Tensor:
        values = torch.randn(like.shape, generator=self._random)
        # Keep scales away from zero.
        return (values if like.dim() > 1 else 1 + 0.2 * values.clamp(-2, 2)).requires_grad_()

    def _enter(self, trace: Trace) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # Random hidden states without a graph: a layer's trace must not depend on the layers before it.
            hidden = args[0] if args else kwargs.pop(next(iter(kwargs)))
            rest = [self._opened(trace, value, str(place)) for place, value in enumerate(args[1:], 1)]
            kwargs = {name: self._opened(trace, value, name) for name, value in kwargs.items()}
            self._trace = trace
            return (torch.randn(hidden.shape, generator=self._random), *rest), kwargs

        return hook

    def _opened(self, trace: Trace, value: Any, label: str) -> Any:
        """Replace the float tensors of an argument by leaves of the layer's graph; a mapping is updated in place."""
        if isinstance(value, Tensor) and value.is_floating_point():
            # An earlier layer may have returned this very tensor; -1 means that it comes from outside the layers.
            self.handed_on.add(self._returned.get(storage_of(value), -1))
            # A mask keeps its values, including -inf; a tensor with NaN or without finite values becomes random.
            unknown = not bool(value.isfinite().any()) or bool(value.isnan().any())
            leaf = torch.randn(value.shape, generator=self._random) if unknown else value.detach().clone().float()
            trace.arguments[f"argument {label}"] = leaf.requires_grad_()
            return leaf
        if isinstance(value, MutableMapping):
            value.update({key: self._opened(trace, item, f"{label}.{key}") for key, item in value.items()})
        elif isinstance(value, list | tuple):
            items = [self._opened(trace, item, f"{label}.{place}") for place, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        return value

    def _leave(
        self, index: int, trace: Trace, visit: Callable[[int, Trace], Any], results: list[Any]
    ) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            self._trace = None
            # Which outputs matter is known only once a later layer has read them, hence `handed_on` of an earlier run.
            hidden, *others = _floats(output)
            trace.hidden = [hidden]
            self._returned.update({storage_of(tensor): index for tensor in others})
            written = [*(others if index in self.handed_on else ()), *_floats(args[1:]), *_floats(kwargs)]
            trace.other_outputs = [t for t in written if t.requires_grad and not t.is_leaf]
            results.append(visit(index, trace))
            for known in (trace.products, trace.selections, trace.arguments, trace.hidden, trace.other_outputs):
                known.clear()  # frees the layer's graph
            if index == len(self._layers) - 1:
                raise _LastLayerDone
            return _detached(output)

        return hook

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Cut the graph at matmuls with a weight, record top-k selections, and hold statistics constant."""
        kwargs = kwargs or {}
        if self._trace is None:
            return func(*args, **kwargs)
        with torch.enable_grad():
            # Some models run parts of a layer under no_grad; the result must not depend on that.
            product = self._product(self._trace, func, args, kwargs)
        if product is not None:
            return product
        if func in (torch.topk, torch.Tensor.topk):
            self._note_selection(self._trace, args[0])
        # Routers may select experts without gradients.
        with torch.enable_grad():
            experts = self._trace.experts()
            return _with_constants(func, args, kwargs, experts) if self._frozen else func(*args, **kwargs)

    def _note_selection(self, trace: Trace, scores: Tensor) -> None:
        if scores.shape[-1] in trace.experts() and scores.requires_grad:
            trace.selections.append(scores)
        elif scores.dim() > 2 and scores.shape[-2] > 1 and scores.shape[-2] * scores.shape[-1] in trace.experts():
            trace.grouped = True

    def _product(self, trace: Trace, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if func is F.linear:
            left, right, bias = (*args, *kwargs.values(), None)[:3]
            right = right.mT
        elif func in PRODUCTS:
            first = PRODUCTS[func]
            left, right = (*args, None, None)[first:][:2]
            bias = args[0] if first else None
        else:
            return None
        if not (isinstance(left, Tensor) and isinstance(right, Tensor) and min(left.dim(), right.dim()) > 1):
            return None
        # Which side is the weight: x @ w for most, w @ x for grouped or transposed ones, with inputs along rows (-2).
        of_left = self._parameter_of.get(storage_of(left))
        parameter = of_left or self._parameter_of.get(storage_of(right))
        if parameter is None:
            return None
        weight, read, dim = (left, right, -2) if of_left else (right.mT, left, -1)
        if tuple(weight.shape[-2:]) != trace.matrices[parameter][0].shape:
            raise ModelError(
                f"the layout of {parameter} is unknown: it is multiplied as {tuple(weight.shape[-2:])}",
                expected=f"{trace.matrices[parameter][0].shape} (out, in)",
            )
        shape = *torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1]
        # The cut. The graph starts afresh here, so that a consumer's inputs depend on the last matmuls before it and on
        # nothing earlier: gradients identify exactly the producers. Random values take no special path through the
        # layer, as zeros would (inactive ReLUs, uniform softmaxes), and small ones keep exponentials and products in
        # range.
        leaf = (0.5 * torch.randn(shape, generator=self._random)).requires_grad_()
        trace.products.append(Product(parameter, read, dim, leaf, dim))
        if bias is not None:
            self._note_bias(trace, parameter, bias)
        return leaf * 1  # the leaf itself must not be written to

    def _note_bias(self, trace: Trace, parameter: str, bias: Tensor) -> None:
        """Record a bias: it is removed with its matrix's rows even if it has no influence (keys in a softmax)."""
        for name, leaf in trace.small.items():
            if storage_of(leaf) == storage_of(bias) and leaf.shape[-1:] == bias.shape[-1:]:
                trace.biases[parameter] = name
                return
        raise ModelError(f"the bias of {parameter} is not a parameter of its layer")


def _with_constants(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], experts: set[int]) -> Any:
    """Call a function; means, variances, norms and the denominators of routers carry no gradient."""
    # Routers detach the scores by which they select; their rows would then have no influence.
    if func is torch.Tensor.detach:
        return args[0]
    if func in _STATISTICS:
        return func(*args, **kwargs).detach()
    if func is F.layer_norm or func is getattr(F, "rms_norm", None):
        return _norm(func is F.layer_norm, *args, **kwargs)
    if func is F.normalize:
        # Any constant will do: what matters is which entries have an influence, not how large it is.
        return args[0] * (func(*args, **kwargs).norm() / args[0].norm()).detach()
    result = func(*args, **kwargs)
    if func in _SOFTMAX and result.shape[-1] in experts:
        # The sum over all experts is a statistic too: through it, each expert's score would depend on all other rows.
        return args[0].float().exp() * (result / args[0].float().exp()).detach()
    return result


def _norm(
    centred: bool, x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float | None = None
) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    fixed = x.detach()
    mean = fixed.mean(dims, keepdim=True) if centred else torch.zeros(())
    scale = ((fixed - mean).square().mean(dims, keepdim=True) + (eps or 1e-6)).rsqrt()
    result = (x - mean) * scale
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's memory, by which it is recognised; 0 without any."""
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


@contextmanager
def eagerly(model: PreTrainedModel) -> Iterator[None]:
    """Let attention and experts be computed by ordinary operations, where the model has a choice."""
    before = model.config._attn_implementation
    with eager_experts(model), sdpa_kernel(SDPBackend.MATH):
        _choose_attention(model, "eager")
        try:
            yield
        finally:
            _choose_attention(model, before)


def _choose_attention(model: PreTrainedModel, name: str | None) -> None:
    """Set the implementation, without the warning that transformers repeats for models with only one."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model.set_attn_implementation(name)
    finally:
        transformers_logging.set_verbosity(verbosity)


def _floats(value: Any) -> list[Tensor]:
    """All float tensors in nested containers, in order."""
    return [tensor for tensor in nested_tensors(value) if tensor.is_floating_point()]


def _detached(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_detached(item) for item in value)
    return value.detach() if isinstance(value, Tensor) else value


def _settings(layer: nn.Module) -> tuple[object, ...]:
    """The classes of a layer's modules and their plain values."""
    return tuple(
        (name, type(module), key, value)
        for name, module in layer.named_modules()
        for key, value in (("", None), *vars(module).items())
        if type(value) in (bool, int, float, str, type(None)) and key not in OWN_NUMBER
    )
