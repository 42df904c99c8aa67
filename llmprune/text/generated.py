"""Text that a model writes itself: calibration that needs no data set, from the distribution that pruning must keep."""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from llmprune.errors import NumericsError
from llmprune.text.tokens import TextSpec


@torch.no_grad()
def generate_text(
    model: nn.Module, spec: TextSpec, bos_token_id: int | None, *, batch: int = 64
) -> Int64[Tensor, "samples length"]:
    """Sample text from a causal LM, token by token from its own distribution.

    A sample starts with the beginning-of-sequence token, or with a random token of the vocabulary where there is none.
    It does not stop at an end-of-sequence token (of the model's generation config): the next document follows, behind
    its own beginning-of-sequence token. The draws come from one seeded CPU generator, so they depend on neither the
    batch, the device nor the global random state, and leave that state alone. The model samples in evaluation mode.

    Args:
        model: a transformers causal LM, in memory.
        spec: samples, length (at most the model's positions), seed and temperature are used.
        bos_token_id: the tokenizer's beginning-of-sequence token.
        batch: samples that are generated side by side; bounds the memory of the key-value cache.

    Returns:
        [samples, length] on the CPU.

    Raises:
        NumericsError: the logits are not finite; names the weight that is not, where it is one.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    draws = torch.rand(spec.samples, spec.tokens, generator=generator, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        parts = [_sample(model, part, bos_token_id, spec.temperature) for part in draws.split(batch)]
    except NumericsError as error:
        raise _located(error, model) from error
    finally:
        model.train(training)
    return torch.cat(parts)


def _located(error: NumericsError, model: nn.Module) -> NumericsError:
    """The error, with the first weight that is not finite where there is one."""
    damaged = next((name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()), None)
    if damaged is None:
        return error
    return NumericsError(
        f"{damaged} holds NaN or infinity: {error.what}",
        expected="finite weights",
        fix="check the source checkpoint, or download it again",
    )


def _sample(
    model: nn.Module, draws: Float[Tensor, "samples length"], bos_token_id: int | None, temperature: float
) -> Int64[Tensor, "samples length"]:
    """Turn uniform draws in [0, 1) into tokens, one draw a token."""
    config: Any = model.config
    device: Any = model.device
    draws = draws.to(device)
    ends = _document_ends(model, bos_token_id).to(device)
    ids = torch.empty(draws.shape, dtype=torch.int64, device=device)
    vocabulary = config.get_text_config().vocab_size
    ids[:, 0] = (draws[:, 0] * vocabulary).long() if bos_token_id is None else bos_token_id
    cache: dict[str, Any] = {}
    for position in range(1, draws.shape[1]):
        # A model that returns no cache reads its whole prefix again: slow, but the same distribution.
        unread = ids[:, position - 1 : position] if cache else ids[:, :position]
        output = model(input_ids=unread, use_cache=True, **cache)
        state = getattr(output, "past_key_values", None)
        cache = {} if state is None else {"past_key_values": state}
        token = _draw(output.logits[:, -1], draws[:, position], temperature)
        if bos_token_id is not None:
            token = token.masked_fill(torch.isin(ids[:, position - 1], ends), bos_token_id)
        ids[:, position] = token
    return ids.cpu()


def _document_ends(model: nn.Module, bos_token_id: int | None) -> Int64[Tensor, " ends"]:
    """The tokens that a beginning-of-sequence token must follow."""
    settings: Any = model.generation_config
    ends = settings.eos_token_id if settings.eos_token_id is not None else []
    ends = [ends] if isinstance(ends, int) else ends
    # Where one token is both (GPT-2), it has opened the next document already; forcing it would repeat it for ever.
    return torch.tensor([end for end in ends if end != bos_token_id], dtype=torch.int64)


def _draw(
    logits: Float[Tensor, "samples vocabulary"], draws: Float[Tensor, " samples"], temperature: float
) -> Int64[Tensor, " samples"]:
    """Invert the cumulative distribution; float64, so that the tail of a large vocabulary keeps its share."""
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise NumericsError(
            f"the logits of {int((~torch.isfinite(total)).sum())} of {len(total)} samples are not finite",
            fix="check the model's weights and dtype, or raise the temperature",
        )
    return torch.searchsorted(cumulative, draws[:, None] * total, right=True).squeeze(1)
