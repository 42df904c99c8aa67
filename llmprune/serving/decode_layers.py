"""Decoder layers that take one token in two calls of the CPU library, with the key-value cache between them.

A layer of a small model makes some thirty calls of torch for a token, which take longer than its weights take to be
read. Layers with the parts of a Llama are candidates: an RMS norm, attention with rotary embedding, a gated MLP with
SiLU. Whether that is all they do is not inferred from their names: what the library makes of two tokens is compared
with what the layer itself makes of them, in 16 bits by a copy in float32 as well: roundings would hide other
differences.

Whatever asks for more than the result is left to the ordinary forward pass: hooks, replaced modules, gradients,
several tokens, another attention or float64. Once hidden states or attentions were requested, transformers leaves hooks
in the layers, which then stay ordinary ones.
"""

import contextlib
import copy
import functools
import inspect
import warnings
import weakref
from collections.abc import Sequence
from operator import is_, itemgetter
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmprune.devices import return_freed_memory
from llmprune.kernels import cpu
from llmprune.kernels.cpu import Norm, TokenLayer, Weights, is_plain, is_transformed
from llmprune.serving.cpu_forms import CpuForm
from llmprune.serving.dense_product import DenseLinear
from llmprune.serving.sparse_linear import SparseLinear

_NORMS = ("input_layernorm", "post_attention_layernorm")
_OF_HEADS = ("q_norm", "k_norm")
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")

# What a model passes to a layer that means nothing to one token whose cosines and sines are given.
_IDLE = {"position_ids", "use_cache"}

# What is asked of a module before each token: its hooks, and the numbers that the library was given.
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NUMBERS = ("variance_epsilon", "eps", "head_dim")

# Sums in another order, relative to what a layer adds to a token: SmolLM2's differ by up to 6e-6 of it, and by up to
# 3e-4, 22 times the rounding, where int8 weights round activations to 16 bits.
_TOLERANCE, _ROUNDINGS = 5e-5, 64

# The same where 16 bits are rounded to, in units of the last place: up to 6 were seen (SmolLM2, bfloat16).
_ROUNDED = 16

# Tokens before the two that are compared.
_PROMPT = 3

# What a layer is called with.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class DecodeLayer:
    """The forward pass of a decoder layer: one token by the library, anything else by the layer's own class.

    It stands in the layer's `__dict__`, where it is neither module nor parameter, and leaves it by `del layer.forward`.
    A copy of the layer is an ordinary one: what has been changed in it since would be seen by nobody.

    Args:
        layer: with the parts of a Llama.

    Attributes:
        dtype: of tokens, when it was made.

    Raises:
        ValueError: it has others, or weights that the library does not multiply.
    """

    def __init__(self, layer: nn.Module) -> None:
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        parts = {*_ATTENTION, *_OF_HEADS} if "q_norm" in attention._modules else {*_ATTENTION}
        parents = ((layer, {"self_attn", "mlp", *_NORMS}), (attention, parts), (mlp, {*_MLP, "act_fn"}))
        for parent, names in parents:
            if parent._modules.keys() != names or any(one is not None for one in parent._parameters.values()):
                raise ValueError(f"{type(parent).__name__} has other parts than {sorted(names)}")
        if not all(hasattr(attention, name) for name in ("config", "layer_idx", "scaling", "head_dim")):
            raise ValueError("not the attention of a Llama")
        # The layer holds this object: were it held in turn, a model that is dropped would stay until a collection.
        self._layer = weakref.ref(layer)
        self._attention = attention
        self._siblings = [parent._modules for parent, _ in parents]
        self._modules = {name: one for some in self._siblings for name, one in some.items() if one is not None}
        if not (found := self._seen()):
            raise ValueError("a module with hooks or a forward pass of its own")
        self._found = found
        self._built: tuple[TokenLayer, list[Tensor | None]] | None = self._build()
        self.dtype = self._built[0].dtype

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.layer, "forward")  # the copy, which has none in its `__dict__` yet: that of its class

    @property
    def layer(self) -> nn.Module:
        """The layer itself."""
        layer = self._layer()
        assert layer is not None, "a decoder layer that is gone was called"
        return layer

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the layer's class."""
        return inspect.signature(MethodType(type(self.layer).forward, self.layer))

    @property
    def tolerance(self) -> float:
        """By how much results may differ, as a share of what the layer adds to a token."""
        forms = [getattr(module, "form", None) for module in self._modules.values()]
        tolerance = _TOLERANCE + _ROUNDINGS * max(getattr(form, "rounding", 0.0) for form in forms)
        return tolerance if self.dtype is torch.float32 else tolerance + _ROUNDED * torch.finfo(self.dtype).eps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's class."""
        if len(args) == 1 and (y := self.decode(args[0], **kwargs)) is not None:
            return y
        layer = self.layer
        return type(layer).forward(layer, *args, **kwargs)

    def decode(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> Tensor | None:
        """What the library makes of a token [1, 1, hidden], whose keys and values the cache takes; None if it cannot.

        Args:
            x: the token.
            position_embeddings: cosines and sines, [1, 1, features of a head] of each.
            attention_mask: as the layer's attention takes it.
            past_key_values: the cache.
            others: what the model passes besides.
        """
        if position_embeddings is None or not _is_token(x) or not others.keys() <= _IDLE:
            return None
        if (token := self._current()) is None:
            return None
        try:
            q, keys, values = token.begin(x, *position_embeddings)
        except ValueError:  # of another shape or dtype, or damaged: the ordinary layer says so, if it is wrong
            return None
        attention = self._attention
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, attention.layer_idx)
        scale: float = attention.scaling
        if attention_mask is None and token.fits(keys, values):
            return token.attend(x, q, keys, values, scale)
        attended, _ = sdpa_attention_forward(attention, q, keys, values, attention_mask, scaling=scale)
        return token.end(x, attended)

    def _current(self) -> TokenLayer | None:
        """The library's layer, of the weights that the layer has now; None if it is no longer what was found."""
        if (
            self.layer.training
            or self._attention.config._attn_implementation != "sdpa"
            or not _are_same(self._seen(), self._found)
        ):
            return None
        built = self._built
        if built is None or not (_are_same(self._tensors(), built[1]) and built[0].is_current()):
            built = None
            with contextlib.suppress(ValueError):
                built = self._build()
            self._built = built
        # What was compared: the dtype of then, and float32 always.
        return built[0] if built is not None and built[0].dtype in (self.dtype, torch.float32) else None

    def _seen(self) -> list[object]:
        """All by whose identity the layer is known; nothing if a module has hooks or a forward pass of its own."""
        kind = type(self.layer)
        seen: list[object] = [kind, kind.forward]
        for siblings in self._siblings:
            seen += siblings.values()
        for module in self._modules.values():
            own, kind = module.__dict__, type(module)
            if "forward" in own or any(_HOOKS(own)):
                return []
            seen += (kind, kind.forward, *map(own.get, _NUMBERS))
        return seen

    def _tensors(self) -> list[Tensor | None]:
        return [one for module in self._modules.values() for one in module._parameters.values()]

    def _build(self) -> tuple[TokenLayer, list[Tensor | None]]:
        """The library's layer, and the parameters that it is made of."""
        tensors = self._tensors()
        norms = [_norm(self._modules.get(name)) for name in (*_NORMS, *_OF_HEADS)]
        dtype = None if norms[0] is None else norms[0].weight.dtype
        weights = [_weights(self._modules[name], dtype) for name in (*_ATTENTION, *_MLP)]
        return TokenLayer(cpu.library(), weights, norms, self._attention.head_dim), tensors


def _is_token(x: Tensor) -> bool:
    """Whether x is one token of floats, and only the result is wanted. The cheapest first: a prompt ends here."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dim() != 3 or x.numel() != x.shape[2]:
        return False
    return (
        x.dtype in cpu.TYPES
        and x.is_cpu
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        and is_plain(x)
        and not is_transformed()
        and not _has_any_global_hook()
        and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    )


def _are_same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _weights(module: nn.Module, dtype: torch.dtype | None) -> Weights:
    name = "weight"
    if type(module) is SparseLinear:
        name = "packed" if isinstance(module.form, CpuForm) else name
    elif type(module) not in (nn.Linear, DenseLinear):
        raise ValueError(f"{type(module).__name__} is no linear layer that the library knows")
    matrix, bias = module._parameters.get(name), module._parameters.get("bias")
    if type(matrix) is not nn.Parameter or type(bias) not in (nn.Parameter, type(None)):
        raise ValueError(f"{name} and bias are {type(matrix).__name__} and {type(bias).__name__}")
    if name == "packed" and matrix.dtype is not dtype:
        raise ValueError(f"packed weights for {matrix.dtype}")
    return Weights(matrix, name == "packed", bias, (module.out_features, module.in_features))


def _norm(module: nn.Module | None) -> Norm | None:
    if module is None:
        return None
    eps, weight = getattr(module, "variance_epsilon", getattr(module, "eps", None)), module._parameters.get("weight")
    if type(weight) is not nn.Parameter or len(module._parameters) != 1 or not isinstance(eps, float):
        raise ValueError(f"{type(module).__name__} is no RMS norm")
    return Norm(weight, eps)


def attach(model: PreTrainedModel) -> int:
    """Let the library take single tokens of the decoder layers that do what it computes.

    Args:
        model: settled, on a CPU where there are kernels.

    Returns:
        How many layers those are.
    """
    found = []
    for layer in model.modules():
        with contextlib.suppress(AttributeError, KeyError, ValueError):
            if "self_attn" in layer._modules and "forward" not in layer.__dict__:
                found.append(DecodeLayer(layer))
    equal = _equal(model, found) if found else []
    for decoding in equal:
        decoding.layer.forward = decoding  # in its __dict__, as `DecodeLayer` says
    if any(decoding.dtype is not torch.float32 for decoding in found):
        return_freed_memory()  # of the copies in float32
    return len(equal)


@torch.no_grad()
def _equal(model: PreTrainedModel, layers: list[DecodeLayer]) -> list[DecodeLayer]:
    """Those that give what their layers give: for a token behind a few, and for one at the last position of all."""
    calls: dict[DecodeLayer, list[_Call]] = {one: [] for one in layers}
    equal: dict[DecodeLayer, list[bool]] = {one: [] for one in layers}

    def compare(one: DecodeLayer, *args: Any, **kwargs: Any) -> Any:
        if one.dtype is not torch.float32:
            calls[one].append((args, _apart(kwargs, one)))
        ours = one.decode(*args, **_apart(kwargs, one)) if len(args) == 1 else None
        own = type(one.layer).forward(one.layer, *args, **kwargs)
        equal[one].append(_is_near(ours, own, args[0], one.tolerance))
        return own

    # Whatever the model asks for beyond token ids and positions: nothing is known of its layers then.
    try:
        vocabulary, generator = len(model.get_input_embeddings().weight), torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (1, _PROMPT + 2), generator=generator, device="cpu")
        last = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _PROMPT + 2
        cache = model(ids[:, :_PROMPT], use_cache=True).past_key_values
        for one in layers:
            one.layer.forward = functools.partial(compare, one)
        for place, position in ((_PROMPT, _PROMPT), (_PROMPT + 1, last - 1)):
            positions = torch.tensor([[position]], device="cpu")
            model(ids[:, place, None], past_key_values=cache, position_ids=positions, use_cache=True)
    except Exception:  # noqa: BLE001
        return []
    finally:
        for one in layers:
            one.layer.__dict__.pop("forward", None)
    return [one for one in layers if equal[one] == [True, True] and _agrees(one, calls.pop(one))]


def _agrees(decoding: DecodeLayer, calls: list[_Call]) -> bool:
    """Whether the same is true of a copy of the layer in float32, since roundings to 16 bits hide other differences."""
    if decoding.dtype is torch.float32:
        return True
    try:
        config = decoding._attention.config
        layer = copy.deepcopy(decoding.layer, {id(config): config}).float()
        wide, agrees = DecodeLayer(layer), True
        for args, kwargs in (_widened(call, wide) for call in calls):
            ours = wide.decode(*args, **_apart(kwargs, wide))
            agrees &= _is_near(ours, type(layer).forward(layer, *args, **kwargs), args[0], wide.tolerance)
    except Exception as error:  # noqa: BLE001 - whatever the code of a model raises: it works, only slower
        name = type(decoding.layer).__name__
        message = f"{name} takes single tokens as an ordinary layer: it could not be compared in float32: {error!r}"
        warnings.warn(message, stacklevel=2)
        return False
    return agrees


def _apart(kwargs: dict[str, Any], decoding: DecodeLayer) -> dict[str, Any]:
    """The same, with a cache that takes a layer's keys and values in place of the original."""
    if (cache := kwargs.get("past_key_values")) is None:
        return kwargs
    twin, place = copy.copy(cache), decoding._attention.layer_idx
    twin.layers = list(cache.layers)
    twin.layers[place] = copy.deepcopy(cache.layers[place])
    return kwargs | {"past_key_values": twin}


def _widened(call: _Call, decoding: DecodeLayer) -> _Call:
    """The same in float32."""
    args, kwargs = call[0], _apart(call[1], decoding)
    if (cache := kwargs.get("past_key_values")) is not None:
        held = cache.layers[decoding._attention.layer_idx]
        held.keys, held.values = held.keys.float(), held.values.float()
    floats = {name: one.float() for name, one in kwargs.items() if isinstance(one, Tensor) and one.is_floating_point()}
    angles = tuple(one.float() for one in kwargs.get("position_embeddings") or ())
    return tuple(one.float() for one in args), kwargs | floats | {"position_embeddings": angles or None}


def _is_near(ours: Tensor | None, own: Any, x: Tensor, tolerance: float) -> bool:
    """Whether results are equal but for rounding: feature by feature, since some are thousands of times the others."""
    if ours is None or type(own) is not Tensor or ours.shape != own.shape or own.dtype is not ours.dtype:
        return False
    ours, own, x, eps = ours.double(), own.double(), x.double(), torch.finfo(own.dtype).eps
    added = (own - x).abs()
    allowed = tolerance * (added + added.mean()) + 8 * eps * x.abs()
    return bool(((ours - own).abs() <= allowed).all())
