"""How long a pruned model writes what the dense one would write.

Perplexity and likelihoods are measured with the right text in front of every token. A model without some of its layers
can do well there and still lose the thread when it reads its own words. So both models continue the same openings
greedily, and what counts is how many tokens agree before the first difference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from llmprune.models.boundary import one_line
from llmprune.models.skeleton import quiet_transformers

# Openings that are continued, and tokens of an opening and of its continuation, at most.
PROMPTS, OPENING, TOKENS = 8, 64, 64


@dataclass(frozen=True, slots=True)
class Continuations:
    """What comparing the continuations of both models has shown.

    Attributes:
        opening: tokens of each opening.
        tokens: tokens of each continuation.
        matched: for each opening, how many tokens agree before the first difference, in [0, tokens].
        skipped: why nothing was compared; empty if something was.
    """

    opening: int = 0
    tokens: int = 0
    matched: tuple[int, ...] = ()
    skipped: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON, with the share of agreeing tokens and how many continuations are identical."""
        if self.skipped:
            return {"skipped": self.skipped}
        return {
            "skipped": "",
            "prompts": len(self.matched),
            "opening": self.opening,
            "tokens": self.tokens,
            "matched": list(self.matched),
            "agreement": sum(self.matched) / (len(self.matched) * self.tokens),
            "identical": sum(count == self.tokens for count in self.matched),
        }


def openings_of(ids: Tensor) -> tuple[Tensor, int]:
    """The beginnings of some sequences, and how many tokens may follow: together no longer than the sequences.

    Args:
        ids: [samples, length].

    Returns:
        [at most 8, opening], and the number of tokens of a continuation; both are 0 if the sequences have one token.
    """
    opening = min(OPENING, ids.shape[1] // 2)
    return ids[:PROMPTS, :opening], min(TOKENS, ids.shape[1] - opening) if opening else 0


def continue_greedily(model: PreTrainedModel, openings: Tensor, tokens: int) -> Tensor:
    """Continue openings of the same length greedily.

    Args:
        model: in evaluation mode.
        openings: [prompts, opening].
        tokens: how many to write, whether or not the model would end before.

    Returns:
        The new tokens [prompts, tokens], on the CPU.
    """
    inputs = openings.to(model.device)
    settings = GenerationConfig(do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)
    with torch.no_grad(), quiet_transformers():
        written: Any = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings)
    return torch.as_tensor(written)[:, openings.shape[1] :].cpu()


def compare_continuations(openings: Tensor, tokens: int, *sides: Callable[[], Tensor]) -> Continuations:
    """Compare the continuations of the dense and the pruned model; what fails is said, because the run itself is done.

    Args:
        openings: as from `openings_of`.
        tokens: likewise.
        sides: the dense and the pruned model's continuations [prompts, tokens].
    """
    if not tokens:
        return Continuations(skipped="the sequences are too short to be continued")
    try:
        dense, pruned = (side() for side in sides)
    except Exception as error:  # noqa: BLE001 - whatever a model's own `generate` raises must not end a finished run
        return Continuations(skipped=f"the models could not write: {one_line(error)}")
    # The running product is 1 up to the first difference, and 0 from there on.
    matched = (dense == pruned).long().cumprod(1).sum(1)
    return Continuations(openings.shape[1], tokens, tuple(matched.tolist()))
