"""How two models that were built without weights differ: the one comparison of skeletons.

Whoever compares them has changed something on purpose: sizes, places or classes. `Expected` says what should become of
each tensor and number then, and what is reported is the rest: no shape, no buffer (rotary frequencies), no number in a
module (a scale, an epsilon) may change by the way.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Shape = tuple[int, ...]

# Attributes of modules that are compared; others hold modules, tensors and configs.
_PLAIN = (bool, int, float, str, tuple, type(None))


@dataclass(frozen=True, slots=True)
class Expected:
    """What should become of one skeleton in another; by default all of it stays.

    Attributes:
        parameter: (name, shape before, shape after, empty where it is missing) -> the shape that it should have.
        buffer: (name, shape before) -> the shape that it should have; where that stays, its values must stay, too.
        value: (name of an attribute of a module, value before, value after) -> whether that is as it should be; None
            stands for an attribute that is not there.
        kind: what modules have in common that stand for one another.
        inside: whether a dotted name is looked at.
    """

    parameter: Callable[[str, Shape, Shape], Shape] = lambda name, before, after: before
    buffer: Callable[[str, Shape], Shape] = lambda name, before: before
    value: Callable[[str, Any, Any], bool] = lambda key, before, after: bool(before == after)
    kind: Callable[[nn.Module], object] = type
    inside: Callable[[str], bool] = lambda name: True


def differences(before: nn.Module, after: nn.Module, expected: Expected) -> Iterator[str]:
    """What is not as expected, a phrase each: in the modules and their buffers first, then in the parameters."""
    yield from module_differences(before, after, expected)
    yield from shape_differences(before, after, expected)


def shape_differences(before: nn.Module, after: nn.Module, expected: Expected) -> Iterator[str]:
    """Parameters that are missing, new, or of another shape than expected; no value is read.

    Args:
        before: parameters may be on the meta device; of those that are tied, one name is compared.
        after: the same.
        expected: what should have become of them.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in after.named_parameters()}
    for name, parameter in before.named_parameters():
        shape = shapes.pop(name, None)
        if expected.inside(name):
            wanted = expected.parameter(name, tuple(parameter.shape), shape or ())
            if shape != wanted:
                yield f"{name} would be {'missing' if shape is None else list(shape)}, not {list(wanted)}"
    yield from (f"{name} would be new" for name in shapes if expected.inside(name))


def module_differences(before: nn.Module, after: nn.Module, expected: Expected) -> Iterator[str]:
    """Modules of another kind, numbers in them, and buffers that are not as expected.

    Args:
        before: its buffers must be in memory.
        after: the same.
        expected: what should have become of them.
    """
    others = dict(after.named_modules())
    for name, module in before.named_modules():
        other = others.pop(name, None)
        if not expected.inside(name):
            continue
        if other is None or expected.kind(other) != expected.kind(module):
            found = "missing" if other is None else f"a {type(other).__name__}"
            yield f"{name or 'it'} would be {found}, not a {type(module).__name__}"
            continue
        for key in vars(module) | vars(other):
            value, new = vars(module).get(key), vars(other).get(key)
            if type(value) in _PLAIN and not expected.value(key, value, new):
                yield f"{name}.{key} would be {new}, not {value}".lstrip(".")
        yield from _buffer_differences(name, module, other, expected)
    yield from (f"{name} would be new" for name in others if expected.inside(name))


def _buffer_differences(name: str, before: nn.Module, after: nn.Module, expected: Expected) -> Iterator[str]:
    """A module's own buffers, and not those of its children."""
    others = dict(after.named_buffers(name, recurse=False))
    for full, buffer in before.named_buffers(name, recurse=False):
        other = others.pop(full, None)
        shape = tuple(buffer.shape)
        wanted = expected.buffer(full, shape)
        fits = other is not None and tuple(other.shape) == wanted
        # What has shrunk has other values; they come from the checkpoint.
        if not fits or (other is not None and wanted == shape and not torch.equal(buffer, other)):
            yield f"the buffer {full} would change"
    yield from (f"the buffer {full} would be new" for full in others)
