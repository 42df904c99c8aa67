"""Models larger than memory: the plan for all of a model, and some of its layers really pruned, one process on the CPU.

    python -m llmprune.eval.bench.large llama-70b --layers 2 --method sparsegpt --json large-70b.json
    python -m llmprune.eval.bench.large llama-8b --layers 32 --method wanda --samples 2 --length 64 --json large-8b.json

Two checkpoints of random bfloat16 weights are written to --work: one with --layers decoder layers, which is pruned as a
whole; and one with all layers whose weights are holes in its files, which the dry run plans and nothing reads.
`whole_seconds` extrapolates what the layers took to all of them. One method a process, since the heap of a run before
would hide what the next one takes; the JSON keeps the other methods.
"""

import argparse
import json
import math
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune.eval.bench.prune import SHAPES, measure
from llmprune.pruning.forecast.forecast import dry_run
from llmprune.recipe.recipe import load_recipe
from llmprune.storage.files import INDEX_NAME, write_json, write_shard
from llmprune.storage.hub import resolve_model

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the checkpoints, plan, prune, and write JSON."""
    args = _parse(arguments)
    chosen = {"pattern": args.pattern, "method": args.method, "batch_size": args.batch_size}
    recipe = load_recipe({**chosen, "evaluation": None, "held_back": 1})
    whole = write_model(args.shape, SHAPES[args.shape]["num_hidden_layers"], args.work / "plan", holes=True)
    sizes = [f"calibration.samples={args.samples}", f"calibration.length={args.length}"]
    plan = dry_run(whole, recipe, sizes)
    some = write_model(args.shape, args.layers, args.work / "layers", holes=False)
    result = measure(some, args.work / "pruned", recipe, args.samples, args.length)
    shutil.rmtree(args.work / "pruned")
    row = {"method": args.method, **_figures(args, plan.to_dict(), result)}
    print(json.dumps(row, indent=2))
    if args.json:
        before = json.loads(args.json.read_text()) if args.json.exists() else []
        write_json(args.json, [*(one for one in before if one["method"] != args.method), row])


def _figures(args: argparse.Namespace, plan: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    layers = SHAPES[args.shape]["num_hidden_layers"]
    return {
        "shape": args.shape,
        "layers": args.layers,
        "of_layers": layers,
        "tokens": result["tokens"],
        "pattern": args.pattern,
        "memory": {
            "planned_bytes": plan["memory"]["peak"],
            "predicted_bytes": result["predicted_bytes"],
            "measured_bytes": result["peak_bytes"],
            "above_imports_bytes": result["peak_process_bytes"],
        },
        "seconds": result["seconds"],
        "whole_seconds": result["seconds"]["total"] * layers / args.layers,
        "plan": {"seconds": plan["seconds"], "disk_bytes": plan["disk_bytes"]},
        **{key: result[key] for key in ("device", "versions", "compute_dtype")},
    }


def write_model(shape: str, layers: int, work: Path, *, holes: bool) -> Path:
    """Write a random model of this shape and as many layers, a shard each, unless it already exists.

    Args:
        shape: a key of `SHAPES`.
        layers: decoder layers.
        work: the folder that gets it.
        holes: whether the files have the right size, and nothing in them.
    """
    folder = work / f"{shape}-{layers}"
    if (folder / INDEX_NAME).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        **{**SHAPES[shape], "num_hidden_layers": layers}, max_position_embeddings=8192, dtype="bfloat16"
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[2] if name.startswith("model.layers.") else "ends"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tuple(parameter.shape)
    for number, (file, shapes) in enumerate(shards.items()):
        _write_holes(folder / file, shapes) if holes else write_shard(folder / file, dict(_random(shapes, number)))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in _TOKENIZER:
        shutil.copy(resolve_model("testbed") / name, folder / name)
    names = {name: file for file, shapes in shards.items() for name in shapes}
    write_json(folder / INDEX_NAME, {"metadata": {}, "weight_map": names})
    return folder


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        yield name, tensor.fill_(1.0) if "norm" in name else tensor.normal_(0, 0.02, generator=generator)


def _write_holes(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file whose values take no space on disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + end)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=2, help="decoder layers that are really pruned")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--work", type=Path, required=True, help="a folder with room for the layers, twice")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
