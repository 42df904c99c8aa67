"""How much of what 2:4 has cost the bundled model comes back when it is trained on the calibration text alone.

    python -m llmprune.eval.bench.recovery --calibration calibration.jsonl --heldout heldout.jsonl \
        --folder out/recovery --json recovery-testbed-cpu.json
    python -m llmprune.eval.bench.recovery --calibration calibration.jsonl --heldout heldout.jsonl --methods sparsegpt \
        --adapters none lora shira low-rank --epochs 1 --folder out/adapters --json recovery-adapters-testbed-cpu.json

Each method prunes a checkpoint on the first 128 packed sequences of 256 tokens (the layout `pack-bare`, as in the
quality bench). `recover` then trains on all packed sequences of the same text, of which one in 16 is held back to
choose among the states of the weights; the held-out text is read once, in the end: perplexity on its first 400 packed
sequences of 256 tokens, of the dense, the pruned and the recovered checkpoint, as they are stored.

The second command trains adapters, and all weights beside them, from one pruned checkpoint, in as many steps each.

The knobs were chosen on a split of the calibration documents (see LOG.md); the learning rate of adapters is the first
that was tried. CPU seconds are those of all threads; wall
time on a machine that is shared says little. An interrupted run goes on.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmprune.progress import Progress
from llmprune.pruning.pipeline import prune
from llmprune.recovery.options import RecoveryOptions
from llmprune.recovery.recover import recover
from llmprune.text.tokens import TextSpec

LENGTH, CALIBRATED = 256, 128
KNOBS = {"learning_rate": 3e-4, "epochs": 4.0, "batch_size": 8, "evaluations": 4}
ADAPTER_RATE = 1e-3


def measure(
    method: str, calibration: Path, heldout: Path, folder: Path, options: RecoveryOptions, samples: int = 400
) -> dict[str, Any]:
    """Prune with a method if that has not been done yet, recover, and measure.

    Args:
        method: as in recipes.
        calibration: text to prune and to train with.
        heldout: text to measure on.
        folder: where checkpoints are written.
        options: of the training.
        samples: held-out sequences.
    """
    pruned = folder / method
    recovered = folder / f"{method}-{'recovered' if options.adapter == 'none' else options.adapter}"
    text = {"length": LENGTH, "order": "text", "layout": "pack-bare"}
    if not (pruned / "report.json").exists():
        recipe = {"pattern": "2:4", "method": method, "evaluation": None, "batch_size": 16}
        chosen = {"source": str(calibration), "samples": CALIBRATED, **text}
        prune("testbed", {**recipe, "calibration": chosen}, pruned, resume=pruned.exists())
    began = time.process_time()
    report = recover(
        pruned,
        recovered,
        TextSpec(str(calibration), length=LENGTH),
        "testbed",
        options,
        evaluation=TextSpec(str(heldout), samples=samples, length=LENGTH, order="text", layout="pack-bare"),
        resume=recovered.exists(),
        watch=_say,
    )
    recovery = report.header["recovery"]
    kept = ("options", "sequences", "held_back", "length", "steps", "best_step", "zeros", "perplexity", "gap_closed")
    evaluation = report.header["evaluation"]
    return {
        "method": method,
        "adapter": options.adapter,
        "pattern": "2:4",
        **{key: recovery[key] for key in (*kept, "scores")},
        "kl_divergence": evaluation["kl_divergence"],
        "agreement": evaluation["agreement"],
        "seconds": report.header["seconds"],
        "cpu_seconds": time.process_time() - began,
        "memory": report.header["memory"],
        "versions": report.header["version"],
        "device": report.header["device"],
    }


def _say(progress: Progress) -> None:
    if progress.unit == "step" and progress.layer % 10 == 0:
        print(f"{progress.stage}: step {progress.layer} of {progress.layers}, {progress.step}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Measure each method, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--heldout", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoints")
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "wanda"])
    parser.add_argument("--adapters", nargs="+", default=["none"], help="none: train all weights")
    parser.add_argument("--learning-rate", type=float, default=KNOBS["learning_rate"], help="of all weights")
    parser.add_argument("--adapter-rate", type=float, default=ADAPTER_RATE, help="the learning rate of adapters")
    parser.add_argument("--epochs", type=float, default=KNOBS["epochs"])
    parser.add_argument("--batch-size", type=int, default=KNOBS["batch_size"])
    parser.add_argument("--samples", type=int, default=400, help="held-out sequences")
    parser.add_argument("--json", type=Path, help="where to write the figures; other rows in it are kept")
    args = parser.parse_args(arguments)
    table = Table("method", "adapter", "dense", "pruned", "recovered", "gap closed", "zeros", "CPU minutes")
    for method, adapter in itertools.product(args.methods, args.adapters):
        rate = args.learning_rate if adapter == "none" else args.adapter_rate
        knobs = {"learning_rate": rate, "epochs": args.epochs, "batch_size": args.batch_size, "adapter": adapter}
        options = RecoveryOptions.read({**KNOBS, **knobs})
        row = measure(method, args.calibration, args.heldout, args.folder, options, args.samples)
        if args.json:
            rows = json.loads(args.json.read_text()) if args.json.exists() else []
            rows = [one for one in rows if (one["method"], one.get("adapter", "none")) != (method, adapter)] + [row]
            args.json.write_text(json.dumps(rows, indent=2) + "\n")
        figures = [f"{row['perplexity'][name]:.2f}" for name in ("dense", "pruned", "recovered")]
        closed = "" if row["gap_closed"] is None else f"{row['gap_closed']:.1%}"
        minutes = f"{row['cpu_seconds'] / 60:.1f}"
        table.add_row(method, adapter, *figures, closed, f"{row['zeros']['after']:,}", minutes)
    Console().print(table)


if __name__ == "__main__":
    main()
