"""Find the attention and MLP sub-blocks of each decoder layer, and run a layer without some of them.

A sub-block is the outermost module that reads the hidden states once and returns what is added to the residual stream,
found around the matrices that compute the structures' outputs. This is tested: with every matmul inside it silenced,
its output must not depend on its arguments; a module that adds the residual itself is refused.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.errors import ModelError
from llmprune.models.boundary import one_line
from llmprune.models.decoder import Decoder, prunable_matrices
from llmprune.models.uneven import (
    UNBUILDABLE,
    remove_blocks,
)
from llmprune.stream.observation import PRODUCTS
from llmprune.structures.find.discovery import Structure, find_structures
from llmprune.structures.find.tracing import Trace, TracedForward, eagerly

Part = Literal["attention", "mlp"]

PARTS: tuple[Part, ...] = ("attention", "mlp")


@dataclass(frozen=True, slots=True)
class SubBlock:
    """The attention or the MLP of one decoder layer.

    Attributes:
        part: which of the two.
        modules: dotted name inside the layer -> number of values that the module returns; usually one module. Empty if
            refused.
        tensors: names, inside the layer, of the parameters and saved buffers that are removed with it.
        refusal: why it cannot be removed exactly; None if it can.
    """

    part: Part
    modules: Mapping[str, int]
    tensors: tuple[str, ...] = ()
    refusal: str | None = None


# The sub-blocks of one decoder layer.
SubBlocks = dict[Part, SubBlock]


def find_subblocks(decoder: Decoder, found: Sequence[Sequence[Structure]] | None = None) -> list[SubBlocks]:
    """Find the attention and the MLP of every decoder layer, without reading any weights.

    Args:
        decoder: a causal LM; meta tensors suffice. Left unchanged.
        found: the structures of each layer, if already known.

    Returns:
        For each layer, its two sub-blocks; refused if the layer has none or if anything else depends on it.

    Raises:
        ModelError: a matrix is used in an unknown layout.
    """
    found = find_structures(decoder) if found is None else found
    layers = decoder.layers
    wanted = [
        {part: _modules_around(layer, structures, part) for part in PARTS}
        for layer, structures in zip(layers, found, strict=True)
    ]
    returned, read_later = _tried(decoder, [_names(parts) for parts in wanted])
    blocks = [
        {part: _block(layer, part, parts[part], returned[index], read_later[index]) for part in PARTS}
        for index, (layer, parts) in enumerate(zip(layers, wanted, strict=True))
    ]
    return _confirmed(decoder, blocks)


@contextmanager
def without(layer: nn.Module, number: int, blocks: Iterable[SubBlock]) -> Iterator[None]:
    """Run a decoder layer in memory without some of its sub-blocks.

    Args:
        layer: the decoder layer.
        number: its index in the model.
        blocks: sub-blocks of this layer, none of them refused.
    """
    modules = {name: returns for block in blocks for name, returns in block.modules.items()}
    before = {name: layer.get_submodule(name) for name in modules}
    remove_blocks(layer, number, modules)
    try:
        yield
    finally:
        for name, module in before.items():
            layer.set_submodule(name, module)


def _modules_around(layer: nn.Module, structures: Sequence[Structure], part: Part) -> list[list[str]]:
    """For each consumer of a sub-block, the modules that might be the sub-block, outermost first.

    A matrix that is a direct child of the layer (OPT's fc2) is listed with its producers, all to be removed together,
    as one comma-separated name.
    """
    heads = {structure.consumer for structure in structures if structure.kind == "heads"}
    mixers = {structure.consumer for structure in structures if structure.kind == "mixer"}
    own = {s.consumer: s for s in structures if (s.consumer in heads) == (part == "attention")}
    others = {structure.consumer for structure in structures} - own.keys() | mixers
    found = []
    for consumer in own.keys() - mixers:
        *modules, _ = consumer.split(".")
        # Outermost first: removing the largest of nested modules also removes its norms and biases.
        around = [".".join(modules[: depth + 1]) for depth in range(len(modules))]
        # A module that also holds a consumer of the other part is too large: the layer's only one, or parallel blocks.
        around = [name for name in around if not any(other.startswith(f"{name}.") for other in others)]
        # A module with one matrix is the consumer itself; its producers would be kept and computed in vain.
        found.append([name for name in around if _matrices(layer, name) > 1] or [_bare(layer, own[consumer])])
    return sorted(names for names in found if names != [""])


def _matrices(layer: nn.Module, name: str) -> int:
    return sum(1 for _ in prunable_matrices(layer.get_submodule(name), ""))


def _bare(layer: nn.Module, structure: Structure) -> str:
    """The matrices of a structure, joined by commas, if all are direct children of the layer; empty otherwise."""
    owners = dict.fromkeys(part.name.rpartition(".")[0] for part in structure.slices)
    return ",".join(owners) if all("." not in owner and _matrices(layer, owner) == 1 for owner in owners) else ""


def _names(parts: Mapping[Part, list[list[str]]]) -> dict[str, Part]:
    """All modules to try, and which part they might be."""
    return {name: part for part, around in parts.items() for names in around for name in names if "," not in name}


def _block(
    layer: nn.Module,
    part: Part,
    around: list[list[str]],
    returned: Mapping[str, int | str],
    read_later: set[str],
) -> SubBlock:
    """Choose the outermost removable module around each consumer."""
    if not around:
        return SubBlock(part, {}, refusal=f"the layer has no separate {part}")
    modules: dict[str, int] = {}
    for names in around:
        if "," in names[0]:
            modules |= dict.fromkeys(names[0].split(","), 1)
            continue
        results = [(name, returned.get(name, "is not called as a module")) for name in names]
        fitting = [(name, values) for name, values in results if isinstance(values, int)]
        if not fitting:
            return SubBlock(part, {}, refusal=f"{results[0][0]} {results[0][1]}")
        modules |= dict(fitting[:1])
    # Keys that later layers attend to must be computed even if the layer's own attention is removed.
    if handed := [name for name in modules if name in read_later]:
        return SubBlock(part, {}, refusal=f"later layers read what {handed[0]} computes")
    tensors = [name for name in layer.state_dict() if name.startswith(tuple(f"{module}." for module in modules))]
    return SubBlock(part, modules, tuple(tensors))


def _tried(decoder: Decoder, wanted: Sequence[Mapping[str, Part]]) -> tuple[list[dict[str, int | str]], list[set[str]]]:
    """Run the model with its candidate modules silenced, and then unmodified.

    Returns:
        For each layer, the result for each module (how many values it returns, or why it is not a sub-block), and the
        modules from which later layers read anything other than hidden states.
    """
    results: list[dict[str, int | str]] = [{} for _ in decoder.layers]
    leaves: list[dict[str, list[Tensor]]] = [{name: [] for name in names} for names in wanted]
    with torch.enable_grad(), eagerly(decoder.model):
        # The first run shows which modules are sub-blocks; the second, which outputs other than hidden states depend on
        # them. Which of these outputs are read at all is known at the end of the first.
        silent, usual = (TracedForward(decoder, frozen=False) for _ in range(2))
        with ExitStack() as stack:
            for layer, names, forms in zip(decoder.layers, wanted, results, strict=True):
                for name, part in names.items():
                    stack.enter_context(_wrapped(layer.get_submodule(name), _Silenced(name, part, forms)))
            # The visitor does nothing: results are recorded while the modules are called.
            silent.each(lambda index, trace: None)
        usual.handed_on = silent.handed_on
        with ExitStack() as stack:
            for layer, opened in zip(decoder.layers, leaves, strict=True):
                for name, known in opened.items():
                    stack.enter_context(_wrapped(layer.get_submodule(name), _Opened(known)))
            return results, usual.each(lambda index, trace: _read_later(trace, leaves[index]))


def _read_later(trace: Trace, opened: Mapping[str, list[Tensor]]) -> set[str]:
    """The modules that influence what the layer passes on in addition to its hidden states."""
    found = set()
    for name, leaves in opened.items():
        # A module's influence shows both at its inputs and at its cut matmuls.
        own = [*leaves, *(p.leaf for p in trace.products if p.parameter.startswith(f"{name}."))]
        if trace.other_outputs and own:
            weights = [torch.ones_like(tensor) for tensor in trace.other_outputs]
            gradients = torch.autograd.grad(trace.other_outputs, own, weights, retain_graph=True, allow_unused=True)
            if any(gradient is not None and bool(gradient.any()) for gradient in gradients):
                found.add(name)
        leaves.clear()
    return found


@contextmanager
def _wrapped(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Temporarily replace a module's forward by `call(forward, ...)`."""
    forward, own = module.forward, vars(module).get("forward")
    module.forward = functools.partial(call, forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class _Opened:
    """Calls a module with detached copies of its arguments, and records these leaves."""

    def __init__(self, leaves: list[Tensor]) -> None:
        self._leaves = leaves

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args = tuple(map(self._open, args))
        return forward(*args, **{key: self._open(value) for key, value in kwargs.items()})

    def _open(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            self._leaves.append(value.detach().clone().requires_grad_())
            return self._leaves[-1]
        return value


class _Silenced:
    """Calls a module with all its matmuls returning zeros, and records the form of its output."""

    def __init__(self, name: str, part: Part, forms: dict[str, int | str]) -> None:
        self._name, self._part, self._forms = name, part, forms

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves: list[Tensor] = []
        # With all matmuls zero, a sub-block returns zeros and biases; if its output still depends on its arguments, it
        # adds the residual, which must not be removed with it.
        with _Silence():
            output = _Opened(leaves)(forward, *args, **kwargs)
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        form = _form(output, first, leaves)
        if self._part == "mlp" and isinstance(output, tuple) and any(value is None for value in output):
            # A None in the tuple is the place of a state, as in RWKV's channel mixing: such an MLP mixes tokens.
            form = "passes a state from token to token"
        self._forms[self._name] = "is called more than once" if self._name in self._forms else form
        return output


def _form(output: Any, read: Tensor | None, leaves: list[Tensor]) -> int | str:
    """How many values a silenced module returns, or why it is not a sub-block."""
    first, *others = output if isinstance(output, tuple) and output else (output,)
    if not isinstance(first, Tensor):
        return f"returns a {type(first).__name__}"
    if read is None or first.shape != read.shape:
        return "does not return a tensor of the shape of its first input"
    if first.requires_grad and leaves:
        gradients = torch.autograd.grad(first.sum(), leaves, retain_graph=True, allow_unused=True)
        if any(gradient is not None and bool(gradient.any()) for gradient in gradients):
            return "adds the residual itself"
    return 1 + len(others)


class _Silence(TorchFunctionMode):
    """Lets every matmul return zeros."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return torch.zeros_like(result) if func is F.linear or func in PRODUCTS else result


def _confirmed(decoder: Decoder, found: list[SubBlocks]) -> list[SubBlocks]:
    """Refuse all sub-blocks of a kind if the model does not run without them."""
    result: list[SubBlocks] = [dict(blocks) for blocks in found]
    for part in PARTS:
        try:
            with ExitStack() as stack, torch.enable_grad(), eagerly(decoder.model):
                for index, (layer, blocks) in enumerate(zip(decoder.layers, found, strict=True)):
                    # All at once: which of them are removed is decided later, and any of them may be.
                    stack.enter_context(without(layer, index, [blocks[part]]))
                TracedForward(decoder, frozen=False).each(lambda index, trace: None)
        # The model's own code may access a removed sub-block (its cache, its window) anywhere in the forward.
        except (*UNBUILDABLE, ModelError) as error:
            for blocks in result:
                if blocks[part].refusal is None:
                    blocks[part] = SubBlock(part, {}, refusal=f"the model does not run without it: {one_line(error)}")
    return result
