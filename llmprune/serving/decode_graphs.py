"""CUDA graphs for `generate`: a step of one token is recorded once for each batch size, and then replayed.

A pruned model computes a token in less time than it takes to launch its kernels one by one. transformers' generation
code is unchanged: the prompt goes through the model as usual, with a growing cache and its fast attention; before the
first step, the keys and values are moved to memory with fixed addresses, where the steps are replayed.

Attention reads all of the memory that a step was recorded with. So the memory grows by doubling, and there is one graph
for each combination of batch size and 256, 512, 1024, ... tokens. It serves one call of `generate` at a time.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmprune.errors import ModelError
from llmprune.serving.forms import Unpacked
from llmprune.serving.graph_memory import GraphCache, Memory, is_adoptable
from llmprune.serving.quantizer import sparse_layers

# Tokens in the smallest cache.
SMALLEST = 256

# How often a step runs before it is recorded: kernels are compiled, and libraries allocate their workspaces.
_WARM_UP_RUNS = 3

# Arguments that a recorded step handles or may ignore. With any other argument set, a step is not replayed.
_KNOWN = {"input_ids", "position_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep"}


class Capture(Protocol):
    """A way to run the same work again without its Python code."""

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run a function, and return a function that repeats its work on the same tensors.

        Args:
            function: without arguments; may be run several times, and does the same each time.

        Returns:
            A function that returns the same tensor each time, with new contents.
        """


class CudaCapture:
    """CUDA graphs that share their memory."""

    def __init__(self, device: torch.device) -> None:
        # One pool: only one graph runs at a time, so that all of them can share memory for intermediate results.
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.cuda.device(self._device):
            # On a separate stream, as PyTorch requires of the runs before a capture; each stream waits for the other.
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_RUNS):
                    function()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as a server's, may use the device during the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class DecodeGraphs:
    """Makes a model's `generate` replay its steps; available afterwards as `model.decode_graphs`.

    Greedy search, sampling and beam search are replayed. Calls with the caller's own cache, and steps that return
    attentions or hidden states, go through the model as usual.

    Args:
        model: a causal LM on one device, in evaluation mode.
        capture: how steps are recorded; default: as CUDA graphs.
        smallest: tokens in the smallest cache.

    Raises:
        ModelError: the model keeps more than keys and values from token to token, or cannot be recorded.
    """

    def __init__(self, model: PreTrainedModel, capture: Capture | None = None, smallest: int = SMALLEST) -> None:
        _require_recordable(model)
        self._model, self._smallest = model, smallest
        self._capture = capture or CudaCapture(model.device)
        self._memory = Memory()
        self._steps: dict[tuple[int, int], _Step] = {}
        # Addresses of the weights when the steps were recorded: a graph refers to addresses, not to parameters.
        self._weights: list[int] = []
        self._callers_cache: object = None
        # Three methods of this one instance are wrapped, but no samplers, beams or stopping criteria: `generate`
        # shows whether the cache is the caller's, inputs are prepared between the prompt and the first step, and
        # `forward` is what a replay replaces.
        self._forward, self._prepare = model.forward, model.prepare_inputs_for_generation
        self._names = list(inspect.signature(self._forward).parameters)
        model.forward = _in_place_of(self._forward, self._forward_or_replay)
        model.prepare_inputs_for_generation = _in_place_of(self._prepare, self._prepare_or_adopt)
        model.generate = _in_place_of(model.generate, functools.partial(self._note_cache, model.generate))
        model.decode_graphs = self

    @property
    def recorded(self) -> list[tuple[int, int]]:
        """(batch size, tokens) of each recorded step, oldest first."""
        return list(self._steps)

    @torch.no_grad()
    def warm(self, batch_sizes: Iterable[int], tokens: int = SMALLEST) -> None:
        """Record the steps for some batch sizes now, so that no call of `generate` has to.

        Args:
            batch_sizes: numbers of sequences, including beams.
            tokens: the largest total of prompt and generated tokens for which steps are recorded.
        """
        # From large to small: a larger batch moves the memory to new addresses and forces re-recording.
        for batch in sorted(set(batch_sizes), reverse=True):
            ids = torch.zeros(batch, 1, dtype=torch.int64, device=self._model.device)
            past = DynamicCache(config=self._model.config.get_text_config())
            self._forward(input_ids=ids, past_key_values=past, use_cache=True)
            cache = self._adopt(past)
            self._grow(cache, tokens)
            # One step for each size that a shorter call would use, all in the memory of the largest.
            while cache.room >= self._smallest:
                cache.length = 1
                self._forward_or_replay(input_ids=ids, past_key_values=cache)
                cache.room //= 2

    def _note_cache(self, generate: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """`generate`; a cache that the caller passes is left to the caller."""
        self._callers_cache = named.get("past_key_values")
        try:
            return generate(*args, **named)
        finally:
            self._callers_cache = None

    def _prepare_or_adopt(self, *args: Any, **inputs: Any) -> dict[str, Any]:
        """`prepare_inputs_for_generation`; before the first step, the cache is moved to fixed addresses."""
        past = inputs.get("past_key_values")
        # A prompt of one token is not a step.
        is_step = inputs.get("next_sequence_length") == 1 and not inputs.get("is_first_iteration")
        if is_step and past is not self._callers_cache and is_adoptable(past):
            inputs["past_key_values"] = self._adopt(past)
        prepared: dict[str, Any] = self._prepare(*args, **inputs)
        return prepared

    def _adopt(self, past: Any) -> GraphCache:
        batch, length = past.layers[0].keys.shape[0], past.get_seq_length()
        room = self._smallest
        while room <= length:
            room *= 2
        weights = [parameter.data_ptr() for parameter in self._model.parameters()]
        moved, self._weights = weights != self._weights, weights
        if self._memory.reserve(past, batch, room) or moved:
            self._steps.clear()
        cache = GraphCache(self._memory, batch, length, room)
        cache.fill(past)
        return cache

    def _grow(self, cache: GraphCache, tokens: int) -> None:
        if cache.grow(tokens):
            self._steps.clear()

    def _forward_or_replay(self, *args: Any, **named: Any) -> Any:
        """`forward`; a step of one token over a `GraphCache` is replayed."""
        inputs = {**dict(zip(self._names, args, strict=False)), **named}
        cache = inputs.get("past_key_values")
        if not isinstance(cache, GraphCache):
            return self._forward(**inputs)
        cache.require_memory()
        tokens = next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None).shape[1]
        self._grow(cache, cache.length + tokens)
        # A recorded step reads this from the device; a Python number would be recorded as a constant.
        self._memory.length.fill_(cache.length)
        output = self._replay(cache, inputs) if tokens == 1 and _is_plain(inputs) else self._run(cache, inputs)
        cache.length += tokens
        return output

    def _replay(self, cache: GraphCache, inputs: dict[str, Any]) -> CausalLMOutputWithPast:
        key = cache.batch, cache.room
        step = self._steps.get(key) or _Step(self._memory.cache(*key), "position_ids" in self._names)
        step.fill(inputs, cache.length)
        if step.replay is None:
            # Stored only once it is recorded, so that a failure leaves no incomplete step behind.
            step.replay = self._record(step)
            self._steps[key] = step
        # A copy, because the next step overwrites the result of this one.
        return CausalLMOutputWithPast(logits=step.replay().clone(), past_key_values=cache)

    def _record(self, step: "_Step") -> Callable[[], Tensor]:
        try:
            # Tensors created in inference mode could not be modified outside it.
            with torch.inference_mode(False), torch.no_grad():
                return self._capture.record(lambda: self._forward(**step.inputs, use_cache=True).logits)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _refusal(
                f"a step of {type(self._model).__name__} cannot be recorded: {str(error).strip().splitlines()[0]}"
            ) from error

    def _run(self, cache: GraphCache, inputs: dict[str, Any]) -> Any:
        """Run several tokens, or one with special arguments, through the model itself, in the same memory."""
        # The model writes to layers of fixed size; `generate` continues with the cache that counts the tokens.
        inner = self._memory.cache(cache.batch, cache.room)
        output = self._forward(**{**inputs, "past_key_values": inner})
        if isinstance(output, tuple):
            return tuple(cache if part is inner else part for part in output)
        output.past_key_values = cache
        return output


class _Step:
    """One token of each sequence: the inputs at fixed addresses, and the function that replays the model on them."""

    def __init__(self, cache: Cache, takes_positions: bool) -> None:
        batch, _, room, _ = cache.layers[0].keys.shape
        device = cache.layers[0].device
        with torch.inference_mode(False):
            self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self._positions = torch.zeros_like(self._ids)
            # 1 means no padding; which positions are still empty follows from the cache's length.
            self._mask = torch.ones(batch, room, dtype=torch.int64, device=device)
        self.inputs = {"input_ids": self._ids, "attention_mask": self._mask, "past_key_values": cache}
        if takes_positions:
            self.inputs["position_ids"] = self._positions
        self.replay: Callable[[], Tensor] | None = None

    def fill(self, inputs: dict[str, Any], length: int) -> None:
        """Copy the inputs of a step to where the recorded step reads them."""
        self._ids.copy_(inputs["input_ids"])
        if inputs.get("position_ids") is None:
            self._positions.fill_(length)
        else:
            self._positions.copy_(inputs["position_ids"])
        mask = inputs.get("attention_mask")
        if mask is None:
            self._mask.fill_(1)
        else:
            self._mask[:, : mask.shape[1]].copy_(mask)


def _is_plain(inputs: dict[str, Any]) -> bool:
    """Whether a step requests only logits."""
    # A replay returns logits in one tensor: no tuple, no hidden states, no gradients.
    others = {name: value for name, value in inputs.items() if name not in _KNOWN and value is not None}
    if inputs.get("input_ids") is None or others.pop("return_dict", True) is False or torch.is_grad_enabled():
        return False
    mask = inputs.get("attention_mask")
    return not any(value is not False for value in others.values()) and (mask is None or mask.dim() == 2)


def _in_place_of(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement, with the original's signature, which transformers inspects."""

    @functools.wraps(original)
    def call(*args: Any, **named: Any) -> Any:
        return replacement(*args, **named)

    return call


def _require_recordable(model: PreTrainedModel) -> None:
    """Raise `ModelError` for a model whose steps do not do the same work each time."""
    name, attention = type(model).__name__, model.config._attn_implementation
    # transformers' own static cache shows what each layer keeps from token to token; only keys and values, of all
    # tokens or of a window, are moved to fixed addresses here.
    try:
        layers = StaticCache(config=model.config, max_cache_len=1).layers
    except KeyError as error:
        raise _refusal(f"transformers has no static cache for {name} ({error.args[0]})") from error
    other = {type(layer) for layer in layers} - {StaticLayer, StaticSlidingWindowLayer}
    if other:
        raise _refusal(f"the cache of {name} has layers of other kinds: {', '.join(sorted(k.__name__ for k in other))}")
    if not model._can_compile_fullgraph:
        raise _refusal(f"transformers says that {name} cannot be compiled")
    if attention not in ("sdpa", "eager"):
        raise _refusal(f"{name} uses the attention implementation {attention!r}")
    for path, layer in sparse_layers(model):
        if layer.form is None or isinstance(layer.form, Unpacked):
            raise _refusal(f"{path} is unpacked on each call, which a recorded step cannot repeat")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise _refusal(f"{name} is on several devices")


def _refusal(reason: str) -> ModelError:
    return ModelError(
        f"no CUDA graphs: {reason}",
        expected="plain or sliding-window attention (sdpa or eager), and a model on one device",
        fix="load it without graphs",
    )
