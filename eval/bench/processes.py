"""Seconds of a pruning run in one process and in two, with one thread each, and how far the results agree.

    python -m llmprune.eval.bench.processes testbed --samples 128 --length 256 --json processes.json
    python -m llmprune.eval.bench.processes llama-1.2b --samples 16 --length 512 --json processes.json

Each run is `llmprune prune` in a process of its own; one process and several take turns, and medians are compared.
`statistics` are forward passes and Gram matrices, `talking` is what the processes spend on adding sums and handing over
matrices, waiting for each other included. Masks and perplexities of the last two runs are compared, and those of one
process with another batch size beside them, since sums in another order alone decide ties otherwise. A random model has
no tokenizer: without one in its folder it samples its text, which takes minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from llmprune.eval.bench.prune import SHAPES, random_model
from llmprune.models.checkpoint_source import open_checkpoint
from llmprune.storage.files import write_json
from llmprune.storage.hub import resolve_model
from llmprune.storage.report import load_report

_STAGES = {"statistics": ("forward", "gram"), "solve": ("solve",), "talking": ("merge", "exchange")}


def run(folder: Path, output: Path, processes: int, arguments: argparse.Namespace, batch_size: int) -> dict[str, float]:
    """Prune once; the seconds of the stages, and all after the text was read."""
    command = [
        sys.executable,
        "-m",
        "llmprune",
        "prune",
        str(folder),
        "--output",
        str(output),
        "--overwrite",
        "--quiet",
    ]
    text = f"{{source: {arguments.calibration}, samples: {arguments.samples}, length: {arguments.length}}}"
    settings = {
        "calibration": text, "evaluation": "null", "batch_size": batch_size, "held_back": 4, "device": "cpu",
        "method": arguments.method, "pattern": arguments.pattern,
    }  # fmt: skip
    if arguments.heldout:
        settings["evaluation"] = (
            f"{{source: {arguments.heldout}, samples: 64, length: {arguments.length}, prompts: []}}"
        )
    command += ["--recipe", "sparsegpt-2of4"]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command += ["--processes", str(processes)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    seconds = load_report(output).header["seconds"]
    found = {name: sum(seconds.get(stage, 0.0) for stage in stages) for name, stages in _STAGES.items()}
    return {**found, "pruning": sum(found.values()) + seconds["load"] + seconds["write"]}


def agreement(one: Path, other: Path) -> dict[str, float]:
    """The share of equal places in the masks of two results, by layer; and their perplexities, if measured."""
    sources = [open_checkpoint(folder, torch.device("cpu"), "float32") for folder in (one, other)]
    same, total = 0, 0
    for index in range(len(sources[0].layers)):
        for source in sources:
            source.load_layer(index, torch.device("cpu"))
        weights = [dict(source.layers[index].named_parameters()) for source in sources]
        for name, weight in weights[0].items():
            if weight.dim() == 2:
                same += int(((weight == 0) == (weights[1][name] == 0)).sum())
                total += weight.numel()
        for source in sources:
            source.free_layer(index)
    return {"masks": same / total}


def perplexity(folder: Path) -> float | None:
    """What the run has measured, if it has."""
    return load_report(folder).pruned_perplexity


def main() -> None:
    """Take turns, print the ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint, or one of " + ", ".join(SHAPES))
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--heldout", help="text for perplexities; without one none are measured")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--other-batches", action=argparse.BooleanOptionalAction, default=True,
        help="also compare with one process and another batch size, in a run more",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("out/bench"))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    folder = random_model(args.model, args.work) if args.model in SHAPES else resolve_model(args.model)
    places = {1: args.work / "alone", args.processes: args.work / "together"}
    runs: dict[int, list[dict[str, float]]] = {count: [] for count in places}
    for _ in range(args.repeats):
        for count, output in places.items():
            runs[count].append(run(folder, output, count, args, args.batch_size))
    alone, together = places.values()
    same, results = agreement(alone, together), [alone, together]
    if args.other_batches:
        other = args.work / "other-batches"
        run(folder, other, 1, args, max(args.batch_size // 2, 1))
        same["masks_other_batch_size"] = agreement(alone, other)["masks"]
        results.append(other)
    medians = {
        count: {name: statistics.median(each[name] for each in found) for name in found[0]}
        for count, found in runs.items()
    }
    result: dict[str, Any] = {
        "model": args.model,
        "tokens": args.samples * args.length,
        "method": args.method,
        "pattern": args.pattern,
        "processes": args.processes,
        "seconds": medians,
        "all_seconds": runs,
        "faster": {name: medians[1][name] / medians[args.processes][name] for name in ("statistics", "pruning")},
        "talking_share": medians[args.processes]["talking"] / medians[args.processes]["pruning"],
        "same": same,
        "perplexity": [perplexity(folder) for folder in results],
        "device": load_report(alone).header["device"],
        "versions": load_report(alone).header["version"],
    }
    print(json.dumps({key: value for key, value in result.items() if key != "all_seconds"}, indent=2))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
