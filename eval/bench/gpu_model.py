"""The part `decode` of the GPU bench: a whole model of random weights, dense against 2:4, in the same CUDA graphs.

A step is one token for every sequence of the batch, attending to a full static cache; the rest of generation (sampling,
stopping) is left out for both.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from llmprune.eval.bench.gpu_plan import Plan
from llmprune.eval.bench.gpu_products import build_layer, random_24
from llmprune.serving.fusion import fuse
from llmprune.timing import Timing, time_calls

Row = dict[str, Any]


def decode(plan: Plan) -> Iterator[Row]:
    """A row per batch size for the dense model, the unfused 2:4 model and the fused one, with the speed-ups.

    The dense model is not fused, so the unfused 2:4 model is the like-for-like comparison.
    """
    model = random_model(plan)
    dense: dict[str, Timing] = {}
    for key, timing in _times(model, plan):
        dense[key] = timing
        yield {"model": "dense", "step": key, "weight_bytes": weight_bytes(model), **timing.to_dict()}
    prune_24(model, plan)
    for key, timing in _times(model, plan):
        ratio = round(dense[key].median / timing.median, 4)
        yield {"model": "2:4, not fused", "step": key, **timing.to_dict(), "ratio": ratio}
    fused = fuse(model, input_ids=torch.zeros(1, 1, dtype=torch.long, device=plan.device))
    yield {"model": "2:4", "fused": len(fused), "example": fused[:2]}
    for key, timing in _times(model, plan):
        ratio = round(dense[key].median / timing.median, 4)
        row = {"model": "2:4", "step": key, "weight_bytes": weight_bytes(model), **timing.to_dict(), "ratio": ratio}
        if key.startswith("decode"):
            row["tokens_per_second"] = round(int(key.split()[-1]) / timing.median, 1)
        yield row


def random_model(plan: Plan) -> PreTrainedModel:
    """A random bfloat16 Llama on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(**plan.model, dtype="bfloat16", tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=plan.device)
    # Rotary frequencies are computed, not stored: to_empty has lost them.
    with torch.device(plan.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(0, 0.02)
    return model.eval().requires_grad_(False)


def prune_24(model: PreTrainedModel, plan: Plan) -> None:
    """Replace the linear layers in the decoder layers by 2:4 layers with new random weights, one at a time."""
    linears = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    for name in linears:
        linear = model.model.get_submodule(name)
        layout, stored = random_24(tuple(linear.weight.shape), plan.device)
        model.model.set_submodule(name, build_layer(layout, stored, plan))
    del linear
    gc.collect()
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, shared ones once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def _times(model: PreTrainedModel, plan: Plan) -> Iterator[tuple[str, Timing]]:
    for batch in plan.batches:
        yield (
            f"decode, batch {batch}",
            time_calls([decode_step(model, batch, plan)], plan.device, 4 * plan.effort.seconds),
        )
    ids = torch.randint(plan.model["vocab_size"], (1, plan.prompt), device=plan.device)

    def prefill() -> object:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    yield f"prefill of {plan.prompt}", time_calls([prefill], plan.device, 4 * plan.effort.seconds, captured=False)


def decode_step(model: PreTrainedModel, batch: int, plan: Plan) -> Callable[[], object]:
    """One decode step on fixed buffers, at a half-full cache; it may be repeated any number of times."""
    device, full = plan.device, plan.context // 2
    cache = StaticCache(config=model.config, max_cache_len=plan.context)
    ids = torch.randint(plan.model["vocab_size"], (batch, 1), device=device)
    with torch.inference_mode():
        model(input_ids=ids.repeat(1, full), past_key_values=cache, use_cache=True, logits_to_keep=1)
    # One tensor for the lengths of all layers, so that one launch undoes what a step adds to them.
    lengths = torch.full((len(cache.layers),), full, device=device)
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.cumulative_length = length
    mask = (torch.arange(plan.context, device=device) <= full).expand(batch, 1, 1, plan.context)
    position = torch.full((batch, 1), full, device=device)

    def step() -> object:
        lengths.fill_(full)
        return model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).logits

    return step
