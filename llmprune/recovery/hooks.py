"""Hooks of a context in which a model trains: put on together, taken off together, one context at a time.

A Trainer that ends by an exception, as Ctrl-C is in a notebook, tells its callbacks nothing. What such a run leaves on
must not mask the gradients of the next one.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from llmprune.errors import LlmpruneError

# Those that are on. The hooks of torch's optimizers hold them anyway.
_LIVE: list["Hooks"] = []


class Hooks:
    """Hooks on weights, of one context.

    Args:
        name: of the context, as a user calls it.
        weights: that it masks.
        raised: the class of its errors.
    """

    def __init__(self, name: str, weights: Iterable[nn.Parameter], raised: type[LlmpruneError]) -> None:
        self._name, self._raised = name, raised
        self._weights = {id(weight) for weight in weights}
        self._handles: list[RemovableHandle] = []
        self._run: object = None

    def begin(self, run: object = None) -> None:
        """Take off what is left of an earlier run, on these weights, before any of these are put on.

        Args:
            run: stands for a run of a Trainer, whose end may not be told; None: the context is a `with`.

        Raises:
            LlmpruneError: another context is in use on the same weights.
        """
        self.end()
        for other in [other for other in _LIVE if other._weights & self._weights]:
            if other._run is None or other._run is run:
                raise self._raised(
                    f"{self._name} on weights that {other._name} is in use on",
                    expected="one of them at a time: each masks the gradients of all of its weights",
                    fix=f"end {other._name} first, and pass its masks on: keep_zeros(model, other.masks)",
                )
            other.end()
        self._run = run
        _LIVE.append(self)

    def require_in(self, model: nn.Module | None) -> None:
        """Refuse a Trainer's model that has none of these weights, if there are any: structures alone leave no zeros.

        Raises:
            LlmpruneError: it would train without masks.
        """
        here = model is None or any(id(weight) in self._weights for weight in model.parameters())
        if self._weights and not here:
            raise self._raised(
                f"{self._name} was made for another model than the one that the Trainer trains",
                expected=f"the same model in both: Trainer(model, ..., callbacks=[{self._name}(model)])",
                fix="make it anew where the model was loaded again; pass a model to the Trainer in place of model_init",
            )

    def add(self, *handles: RemovableHandle) -> None:
        """Hooks that were put on."""
        self._handles += handles

    def end(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self in _LIVE:
            _LIVE.remove(self)


class ForwardHook:
    """A hook of a module's forward pass that stays with it: in copies and pickles of the module, it does nothing.

    torch.compile calls it as it is, between the graphs that it makes.

    Args:
        hook: what `register_forward_pre_hook` would take.
    """

    def __init__(self, hook: Callable[[nn.Module, Any], None]) -> None:
        self._hook: Callable[[nn.Module, Any], None] = torch.compiler.disable(hook)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Call the hook."""
        self._hook(module, inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (_nothing,)


def _nothing(module: nn.Module, inputs: Any) -> None:
    pass
