"""Seconds by stage of a pruning run, compared with the arithmetic floor of this machine.

    python -m llmprune.eval.bench.prune testbed --samples 128 --length 256
    python -m llmprune.eval.bench.prune llama-1.2b --samples 16 --length 512
    python -m llmprune.eval.bench.prune llama-8b --samples 128 --length 2048 --device cuda

The floor is the time of the arithmetic alone: two forward passes of the calibration tokens through the decoder layers
at the measured rate of their compute dtype, and the Gram matrices at the measured rate of exact products with float32
sums.

`llama-1.2b` and `llama-8b` are random models of these shapes, written once to --work.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune.devices import PeakWatch, describe_device
from llmprune.precision import dtype_name, float32_products
from llmprune.pruning.context import Run, versions
from llmprune.pruning.jobs import plan_jobs
from llmprune.pruning.layers import LayerDriver
from llmprune.pruning.writing import Writer
from llmprune.recipe.recipe import load_recipe
from llmprune.storage.files import write_json
from llmprune.storage.hub import resolve_model
from llmprune.storage.output import OutputFolder
from llmprune.text.tokens import Tokens

SHAPES = {
    "llama-1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000,
    },
    "llama-1.2b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
}  # fmt: skip


def random_model(shape: str, work: Path) -> Path:
    """Write a random bfloat16 Llama of this shape, in shards, unless it already exists."""
    folder = work / shape
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, dtype="bfloat16")
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        model.tie_weights()
        for name, parameter in model.named_parameters():
            parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(0, 0.02)
        model.save_pretrained(folder, max_shard_size="2GB")
    return folder


def rate(product: Callable[[], object], flops: float, device: torch.device) -> float:
    """Median FLOP/s of a matmul over several runs, after a warm-up."""
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        product()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return flops / statistics.median(seconds[2:])


def measure_rates(dtype: torch.dtype, device: torch.device, size: int) -> dict[str, float]:
    """FLOP/s of the matmuls of a forward pass and of a Gram matrix, with square matrices of this size."""
    x = torch.randn(size, size, device=device).to(dtype)
    flops = 2.0 * size**3
    forward = rate(lambda: x @ x, flops, device)
    if device.type == "cuda" and dtype != torch.float32:
        return {"forward": forward, "gram": rate(lambda: torch.mm(x, x, out_dtype=torch.float32), flops, device)}
    wide = x.float()
    with float32_products("bf16" if dtype == torch.bfloat16 and device.type == "cpu" else "ieee"):
        return {"forward": forward, "gram": rate(lambda: wide @ wide, flops, device)}


def main() -> None:
    """Prune once without evaluation, print the stages and the floor, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint, or one of " + ", ".join(SHAPES))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--held-back", type=int, default=4)
    parser.add_argument("--pattern", default="0.5")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="folder for random models and outputs")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    folder = random_model(args.model, args.work) if args.model in SHAPES else resolve_model(args.model)
    recipe = load_recipe(
        {
            "pattern": args.pattern,
            "method": args.method,
            "evaluation": None,
            "device": args.device,
            "batch_size": args.batch_size,
            "held_back": args.held_back,
        }
    )
    result = measure(folder, args.work / f"{Path(args.model).name}-pruned", recipe, args.samples, args.length)
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(args.json, result)


def measure(folder: Path, output: Path, recipe, samples: int, length: int) -> dict[str, object]:
    """One run on random tokens, on which the time does not depend."""
    run = Run.begin(recipe)
    with PeakWatch(torch.device("cpu")) as process, PeakWatch(run.device) as memory:
        start = time.perf_counter()
        source = run.open(folder)
        jobs = plan_jobs(source, recipe)
        generator = torch.Generator().manual_seed(0)
        vocabulary = source.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (samples + recipe.held_back, length), generator=generator)
        target = OutputFolder.open(output, {}, resume=False, overwrite=True)
        writer = Writer(source, None, target, run.recipe.format)
        pruned = LayerDriver(run, source, jobs, Tokens(ids, "", {}), writer).drive()
        with run.stages("write"):
            writer.finish()
        total = time.perf_counter() - start
    tokens, sizes = samples * length, pruned.sizes
    forward_flops = 2.0 * 2 * tokens * sum(rows * columns for layer in sizes for rows, columns in layer.shapes)
    gram_flops = 2.0 * tokens * sum(width**2 for layer in sizes for width in layer.gram_widths)
    rates = measure_rates(source.model.dtype, run.device, 1024 if run.device.type == "cpu" else 8192)
    floor = forward_flops / rates["forward"] + gram_flops / rates["gram"]
    return {
        "model": folder.name,
        "device": describe_device(run.device),
        "versions": versions(),
        "compute_dtype": dtype_name(source.model.dtype),
        "tokens": tokens,
        "pattern": str(recipe.pattern),
        "seconds": {"total": total, **run.stages.seconds},
        "tflops_per_second": {name: value / 1e12 for name, value in rates.items()},
        "floor_seconds": floor,
        "floor_share": floor / total,
        "predicted_bytes": pruned.memory["predicted_bytes"],
        "peak_bytes": memory.peak - memory.baseline,
        "peak_process_bytes": process.peak - process.baseline,
    }


if __name__ == "__main__":
    main()
