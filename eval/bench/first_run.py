"""The first run of a new user: a model pruned with only its name and --output, against the same run on a dataset.

    python -m llmprune.eval.bench.first_run MODEL --dataset calibration.jsonl --heldout heldout.jsonl --json FILE

Protocol: `llmprune prune MODEL --output DIR` in a process of its own; its seconds are wall clock, from starting the
process to its end, with the report written. Then the same command with --dataset, and as many calibration sequences of
the same length as the first run chose. Perplexity of the dense and of both pruned models is that of `llmprune
perplexity` on the first sequences of the held-out text, of the length that calibration has. --set goes to both runs.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llmprune
from llmprune.devices import resolve_device
from llmprune.measuring.bench.machine import commit, device_name, versions
from llmprune.storage.files import write_json
from llmprune.stream.stream import StreamSettings
from llmprune.text.tokens import TextSpec

_LLMPRUNE = (sys.executable, "-c", "from llmprune.cli import main; main()")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both, measure all three models, print the rows, write the JSON."""
    args = _parse(arguments)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        result = measure(args, Path(work))
    for row in result["rows"]:
        seconds = f", {row['seconds']:.0f} s" if "seconds" in row else ""
        print(f"{row['calibration']}: perplexity {row['perplexity']:.3f}{seconds}")
    print(f"self-generated against {args.dataset.name}: x{result['ratio']:.4f}")
    if args.json:
        write_json(args.json, result)


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The two runs and the three perplexities, with what they were measured on.

    Args:
        args: as `main` reads them.
        work: an existing folder for both checkpoints.
    """
    plain = [option for setting in args.set for option in ("--set", setting)]
    first = _prune("self-generated", args.model, work / "first", plain)
    text = first.pop("text")
    same = ["--num-samples", str(text["samples"]), "--max-seq-length", str(text["length"])]
    second = _prune(args.dataset.name, args.model, work / "second", [*plain, "--dataset", str(args.dataset), *same])
    del second["text"]
    spec = TextSpec(str(args.heldout), samples=args.heldout_samples, length=text["length"], order="text")
    dense = {"calibration": "dense", "sparsity": 0.0}
    for row, model in ((dense, args.model), (first, work / "first"), (second, work / "second")):
        row |= _perplexity(model, spec)
    # A folder of this machine tells others nothing.
    name = args.name or (Path(args.model).name if Path(args.model).is_dir() else args.model)
    return {
        "model": name,
        "device": device_name(resolve_device("auto")),
        "cores": os.cpu_count(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join(["llmprune", "prune", name, "--output", "DIR", *plain]),
        "calibration": {"samples": text["samples"], "length": text["length"], "dataset": args.dataset.name},
        "heldout": {"file": args.heldout.name, "samples": spec.samples, "length": spec.length},
        "ratio": first["perplexity"] / second["perplexity"],
        "rows": [dense, first, second],
    }


def _prune(calibration: str, model: str, output: Path, options: list[str]) -> dict[str, Any]:
    """One run in a process of its own, as a row, with the calibration text of its recipe."""
    command = [*_LLMPRUNE, "prune", model, "--output", str(output), "--quiet", *options]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"llmprune prune failed:\n{done.stderr}")
    header = json.loads((output / "report.json").read_text("utf-8"))
    return {
        "calibration": calibration,
        "sparsity": header["summary"]["sparsity"],
        "seconds": seconds,
        "stages": header["seconds"],
        "text": header["recipe"]["calibration"],
    }


def _perplexity(model: str | Path, text: TextSpec) -> dict[str, Any]:
    found = llmprune.perplexity(model, text, StreamSettings(resolve_device("auto")))
    return {"perplexity": found.perplexity, "nats_stderr": found.nats_stderr, "tokens": found.tokens_digest}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", type=Path, required=True, help="calibration text: jsonl with a text column")
    parser.add_argument("--heldout", type=Path, required=True, help="held-out text: jsonl with a text column")
    parser.add_argument("--heldout-samples", type=int, default=64, help="sequences of it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="recipe key for both runs")
    parser.add_argument("--name", help="what the figures call the model, if it is a local folder: its hub id")
    parser.add_argument("--work", type=Path, help="where both checkpoints are kept meanwhile")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
