"""How two models built without weights differ.

The caller has changed something on purpose: sizes, positions or classes. `Expected` says what each tensor and number
should then be, and everything else is reported: no other shape, buffer (rotary frequencies) or number in a module (a
scale, an epsilon) may change as a side effect.
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
    """What should have changed between two skeletons; by default nothing.

    Attributes:
        parameter: (name, shape before, shape after or () if missing) -> the shape that it should have.
        buffer: (name, shape before) -> the shape that it should have; if unchanged, its values must be unchanged too.
        value: (name of a module's attribute, value before, value after) -> whether the new value is right; None means
            that the attribute is missing.
        kind: what must be equal for two modules to correspond.
        inside: whether a dotted name is compared.
    """

    parameter: Callable[[str, Shape, Shape], Shape] = lambda name, before, after: before
    buffer: Callable[[str, Shape], Shape] = lambda name, before: before
    value: Callable[[str, Any, Any], bool] = lambda key, before, after: bool(before == after)
    kind: Callable[[nn.Module], object] = type
    inside: Callable[[str], bool] = lambda name: True


def differences(before: nn.Module, after: nn.Module, expected: Expected) -> Iterator[str]:
    """Describe each difference in a phrase: modules and their buffers first, then parameters."""
    yield from module_differences(before, after, expected)
    yield from shape_differences(before, after, expected)


def shape_differences(before: nn.Module, after: nn.Module, expected: Expected) -> Iterator[str]:
    """Parameters that are missing, new, or of an unexpected shape; no values are read.

    Args:
        before: parameters may be on the meta device; tied parameters are compared under one name.
        after: likewise.
        expected: what should have changed.
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
    """Modules of another kind, and numbers and buffers in them that are not as expected.

    Args:
        before: its buffers must be in memory.
        after: likewise.
        expected: what should have changed.
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
    """Compare a module's own buffers, not those of its children."""
    others = dict(after.named_buffers(name, recurse=False))
    for full, buffer in before.named_buffers(name, recurse=False):
        other = others.pop(full, None)
        shape = tuple(buffer.shape)
        wanted = expected.buffer(full, shape)
        fits = other is not None and tuple(other.shape) == wanted
        # A buffer that shrank has different values, which are read from the checkpoint.
        if not fits or (other is not None and wanted == shape and not torch.equal(buffer, other)):
            yield f"the buffer {full} would change"
    yield from (f"the buffer {full} would be new" for full in others)
