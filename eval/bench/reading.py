"""What reading the next layer ahead gains where files are not in the system's cache: seconds with it and without.

    python -m llmprune.eval.bench.reading llama-8b --layers 8 --work DIR --json reading-cpu.json

The files of a random bfloat16 checkpoint are dropped from the cache before each run; the two kinds of run take turns,
and medians are compared. `load` is what a run waits for layers, `total` the whole run.
"""

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llmprune.eval.bench.large import write_model
from llmprune.eval.bench.prune import SHAPES, measure
from llmprune.models import checkpoint_source
from llmprune.recipe.recipe import load_recipe
from llmprune.storage.files import write_json

_KINDS = {"ahead": checkpoint_source.read_ahead, "not ahead": lambda tensors: None}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write JSON."""
    args = _parse(arguments)
    folder = write_model(args.shape, args.layers, args.work / "layers", holes=False)
    recipe = load_recipe({"method": args.method, "pattern": "2:4", "batch_size": 1, "evaluation": None, "held_back": 1})
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _KINDS}
    for _ in range(args.repeat):
        for kind, found in runs.items():
            _drop(folder.iterdir())
            with patch.object(checkpoint_source, "read_ahead", _KINDS[kind]):
                found.append(measure(folder, args.work / "pruned", recipe, args.samples, args.length))
            shutil.rmtree(args.work / "pruned")
    seconds = {kind: [run["seconds"] for run in found] for kind, found in runs.items()}
    sizes = {key: getattr(args, key) for key in ("shape", "layers", "method", "samples", "length")}
    shared = {key: runs["ahead"][0][key] for key in ("device", "versions", "compute_dtype")}
    medians = {kind: {key: _median(rows, key) for key in ("load", "total")} for kind, rows in seconds.items()}
    result = {**sizes, **shared, "median_seconds": medians, "seconds": seconds}
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(args.json, result)


def _median(rows: list[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def _drop(files: Iterable[Path]) -> None:
    """Have the system forget what it has read of files; they must have reached the disk."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of the checkpoint")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each kind")
    parser.add_argument("--work", type=Path, required=True, help="a folder with room for the layers, twice")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
