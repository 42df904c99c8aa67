"""Whole models on a CPU, batch 1: packed and dense ones, and the dense one as transformers runs it.

    python -m llmprune.eval.bench.cpu_models llama-1.1b --json FILE

The model is one of the random shapes of `llmprune.eval.bench.prune` or a checkpoint, in bfloat16. On a processor
without instructions for that, it is computed in float32, as `llmprune.load` does, and that of transformers is in
float32. Its linear layers outside the LM head lose their smallest weights and are packed, once, into --work. All
models are in memory together and generate in turns. Packed logits have to be those of the same zeros multiplied
densely: otherwise nothing is timed.
"""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
from llmprune.eval.bench.prune import SHAPES, random_model
from llmprune.kernels import cpu
from llmprune.measuring.bench.decoding import measure_decoding
from llmprune.measuring.bench.machine import commit, device_name, versions
from llmprune.measuring.bench.products import relative_error
from llmprune.patterns import parse
from llmprune.precision import computed_in
from llmprune.pruning.packing import pack
from llmprune.storage.files import write_json
from llmprune.storage.hub import resolve_model

STOCK, DENSE = "transformers", "dense"

# Packed logits may differ from those of the unpacked weights by the order of sums in bfloat16, layer after layer.
_LOGIT_ERROR = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the checkpoints, check and measure the models, print and write the rows."""
    args = _parse(arguments)
    if reason := cpu.unavailable():
        raise SystemExit(reason)
    dense = random_model(args.model, args.work) if args.model in SHAPES else resolve_model(args.model)
    packed = {pattern: prepare(dense, pattern, args.work / dense.name) for pattern in args.patterns}
    if args.prepare:
        return
    result = {
        "model": dense.name,
        "threads": torch.get_num_threads(),
        "device": device_name(torch.device("cpu")),
        "versions": versions(),
        "commit": commit(),
        "kernels": cpu.LEVELS[cpu.library().level],
        "rows": measure(dense, packed, args.lengths, args.seconds),
    }
    for row in result["rows"]:
        print(
            f"{row['model']}, {row['prompt_tokens']} prompt tokens: {row['tokens_per_second']:.1f} tokens/s "
            f"({row['over_dense']:.2f} of dense, {row['over_transformers']:.2f} of transformers), "
            f"first token {row['first_token']['median_us'] / 1e6:.2f} s ({row['first_over_dense']:.2f} of dense)"
        )
    if args.json:
        write_json(args.json, result)


def prepare(dense: Path, pattern: str, work: Path) -> Path:
    """The packed checkpoint of a pattern, made unless it already exists; magnitudes decide, quality does not matter."""
    pruned, packed = work / f"{pattern.replace(':', 'of')}", work / f"{pattern.replace(':', 'of')}-packed"
    if not packed.exists():
        model = _stock(dense)
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
                    layer.weight *= parse(pattern).mask(layer.weight.abs().float())
        model.save_pretrained(pruned)
        del model
        gc.collect()
        pack(pruned, packed)
    return packed


def measure(dense: Path, packed: dict[str, Path], lengths: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """A row for each model and prompt length.

    Raises:
        SystemExit: a packed model computes something else.
    """
    models = {STOCK: _stock(dense), DENSE: _load(dense)}
    for pattern, folder in packed.items():
        models[pattern] = _load(folder)
        require_right(models[pattern], folder)
    rows = []
    for length in lengths:
        found = dict(zip(models, measure_decoding(list(models.values()), 1, seconds, length), strict=True))
        for name, decoding in found.items():
            ratios = {f"over_{other}": _ratio(found[other], decoding) for other in (DENSE, STOCK)}
            first = found[DENSE].first_token.median / decoding.first_token.median
            rows.append({"model": name, **decoding.to_dict(), **ratios, "first_over_dense": round(first, 3)})
    return rows


@torch.inference_mode()
def require_right(model: PreTrainedModel, folder: Path) -> None:
    """Compare the logits with those of the same checkpoint served dense."""
    ids = torch.arange(1, 9)[None]
    exact = llmprune.load(folder, device="cpu", served="dense")(ids).logits.float()
    for count in (1, 8):  # both products of a layer
        error = relative_error(model(ids[:, :count]).logits.float(), exact[:, :count])
        if not error <= _LOGIT_ERROR:
            raise SystemExit(f"{folder.name}: the packed model's logits are off by {error:.3f}")


def _ratio(slow: Any, fast: Any) -> float:
    return round(fast.tokens_per_second / slow.tokens_per_second, 3)


def _stock(folder: Path) -> PreTrainedModel:
    dtype = computed_in(torch.bfloat16, torch.device("cpu"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()


def _load(folder: Path) -> PreTrainedModel:
    return llmprune.load(folder, device="cpu")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint, or one of " + ", ".join(SHAPES))
    parser.add_argument("--patterns", type=lambda text: tuple(text.split(",")), default=("0.5", "2:4"))
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split(","))), default=(128,))
    parser.add_argument("--seconds", type=float, default=8.0, help="for each model and length")
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="folder for the checkpoints")
    parser.add_argument("--prepare", action="store_true", help="only make the checkpoints")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
