"""A one-shot method of `llmprune prune` at the beginning of each stage, on the model in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from llmprune.progress import Progress, Watcher
from llmprune.pruning.pipeline import prune
from llmprune.text.tokens import TextSpec
from llmprune.training.recipe import TrainRecipe
from llmprune.training.subjects.causal import CausalSubject


def solver_for(recipe: TrainRecipe, subject: CausalSubject, text: TextSpec, watch: Watcher) -> Callable[[float], None]:
    """A function that prunes the subject's model in place to a sparsity.

    Args:
        recipe: has the method.
        subject: whose model is pruned.
        text: that it is trained on, of which the method reads the first sequences that fit.
        watch: told about every step.
    """

    def solve(sparsity: float) -> None:
        settings = recipe.pruning(sparsity, text.source, subject.token_count, str(subject.device))
        spec = replace(text, samples=recipe.calibration_samples, length=subject.token_count)
        settings = settings.model_copy(update={"calibration": spec})
        gradients = {name: parameter.requires_grad for name, parameter in subject.model.named_parameters()}
        with _own_forward(subject.model), torch.autocast(subject.device.type, enabled=False):
            prune(subject.model, settings, tokenizer=subject.tokenizer, watch=_renamed(watch, sparsity))
        for name, parameter in subject.model.named_parameters():
            parameter.requires_grad_(gradients[name])

    return solve


@contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """Undo, for a while, what replaces the forward of this object."""
    hidden = {key: vars(model).pop(key) for key in ("forward", "_original_forward") if key in vars(model)}
    try:
        yield
    finally:
        vars(model).update(hidden)


def _renamed(watch: Watcher, sparsity: float) -> Watcher:
    def tell(progress: Progress) -> None:
        watch(Progress(f"pruning to {sparsity:.1%}", progress.layer, progress.layers, progress.step))

    return tell
