"""Self-generated text: calibration without a dataset, from the very distribution that pruning must preserve."""

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

    A sequence starts with the BOS token, or with a random token of the vocabulary if there is none. It does not stop at
    an EOS token (of the model's generation config): the next document follows, after its own BOS token. All draws come
    from one seeded CPU generator, so they do not depend on the batch size, the device or the global random state, and
    leave that state unchanged. The model samples in evaluation mode.

    Args:
        model: a transformers causal LM, in memory.
        spec: samples, length (at most the model's positions), seed and temperature are used.
        bos_token_id: the tokenizer's BOS token.
        batch: sequences that are generated at a time; bounds the memory of the key-value cache.

    Returns:
        [samples, length] on the CPU.

    Raises:
        NumericsError: the logits are not finite; if a weight is not finite, names it.
    """
    # All draws are made before anything is batched: which number decides which token then depends on the seed alone, so
    # that a GPU with less memory, and a smaller batch, samples the same text (up to rounding of the logits).
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
    """The error, with the first weight that is not finite, if there is one."""
    damaged = next((name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()), None)
    if damaged is None:
        return error
    return NumericsError(
        f"{damaged} contains NaN or infinity: {error.what}",
        expected="finite weights",
        fix="check the source checkpoint, or download it again",
    )


def _sample(
    model: nn.Module, draws: Float[Tensor, "samples length"], bos_token_id: int | None, temperature: float
) -> Int64[Tensor, "samples length"]:
    """Turn uniform draws in [0, 1) into tokens, one draw per token."""
    config: Any = model.config
    device: Any = model.device
    draws = draws.to(device)
    ends = _document_ends(model, bos_token_id).to(device)
    ids = torch.empty(draws.shape, dtype=torch.int64, device=device)
    vocabulary = config.get_text_config().vocab_size
    ids[:, 0] = (draws[:, 0] * vocabulary).long() if bos_token_id is None else bos_token_id
    cache: dict[str, Any] = {}
    for position in range(1, draws.shape[1]):
        # A model that returns no cache rereads its whole prefix: slow, but the same distribution.
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
    """The EOS tokens, after which a BOS token must follow."""
    settings: Any = model.generation_config
    ends = settings.eos_token_id if settings.eos_token_id is not None else []
    ends = [ends] if isinstance(ends, int) else ends
    # If one token is both (GPT-2), it has already opened the next document; forcing a BOS would repeat it forever.
    return torch.tensor([end for end in ends if end != bos_token_id], dtype=torch.int64)


def _draw(
    logits: Float[Tensor, "samples vocabulary"], draws: Float[Tensor, " samples"], temperature: float
) -> Int64[Tensor, " samples"]:
    """Invert the cumulative distribution; float64, so that the tail of a large vocabulary keeps its share."""
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise NumericsError(
            f"the logits of {int((~torch.isfinite(total)).sum())} of {len(total)} sequences are not finite",
            fix="check the model's weights and dtype, or raise the temperature",
        )
    return torch.searchsorted(cumulative, draws[:, None] * total, right=True).squeeze(1)
