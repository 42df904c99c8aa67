"""A causal LM in two halves, the body and the head, so that logits need not all exist at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from llmprune.errors import ModelError

# Largest difference of logits by both ways, relative to the largest logit: more than rounding in 16 bits.
_TOLERANCE = 0.02


class Halves:
    """The two halves of a model, which share its parameters.

    The model's own code is run for both, with its body replaced by given hidden states for the head, so that whatever
    it does to logits (scaling, soft-capping) is included.

    Args:
        model: a causal LM.

    Raises:
        ModelError: logits computed in two halves are not those of the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        problems = []
        # A causal LM calls its base model, or the decoder inside; some name another as their base.
        inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
        for body in {id(body): body for body in (model.base_model, model.get_decoder(), *inside)}.values():
            self._body = body
            if not (problem := self._problem()):
                return
            problems.append(problem)
        raise ModelError(
            f"the logits of {type(model).__name__} cannot be computed from its hidden states alone: {problems[0]}",
            expected="a causal LM whose head reads nothing else, one position at a time",
            fix="train it in a loop of your own with llmprune.keep_zeros",
        )

    def body(self, ids: Tensor) -> Tensor:
        """Hidden states [sequences, positions, hidden] of token ids [sequences, positions]."""
        hidden: Tensor = self._body(input_ids=ids, use_cache=False)[0]
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [positions, vocabulary] of hidden states [positions, hidden], each by itself."""
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with self._replaced(hidden[None]):
            # Not `self.model(...)`: a trainer may have replaced or wrapped the forward of this object.
            logits: Tensor = type(self.model).forward(self.model, input_ids=ids, use_cache=False).logits
        return logits[0]

    @contextmanager
    def _replaced(self, hidden: Tensor) -> Iterator[None]:
        known = "forward" in vars(self._body)
        before = self._body.forward
        self._body.forward = lambda *args, **options: _Final(last_hidden_state=hidden)
        try:
            yield
        finally:
            if known:
                self._body.forward = before
            else:
                del self._body.forward

    @torch.no_grad()
    def _problem(self) -> str:
        """Why this body does not do; empty if it does."""
        training = self.model.training
        self.model.eval()
        ids = torch.arange(8, device=next(self.model.parameters()).device)[None]
        try:
            whole = type(self.model).forward(self.model, input_ids=ids, use_cache=False).logits[0].float()
            # In two parts: no position may read another.
            halves = torch.cat([self.head(part) for part in self.body(ids)[0].split((3, 5))]).float()
            same = halves.shape == whole.shape
            same = same and bool((halves - whole).abs().max() <= _TOLERANCE * whole.abs().max())
            return "" if same else "they differ from the model's own"
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self.model.train(training)


class _Final(BaseModelOutputWithPast):  # type: ignore[misc] # transformers is not typed
    """The output of a body; what a model asks of it beyond hidden states is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None
