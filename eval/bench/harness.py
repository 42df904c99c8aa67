"""The overhead of `llmprune eval` over lm-eval itself, on the same model and tasks.

    python -m llmprune.eval.bench.harness --json harness.json

Both load the model, load the tasks and answer; times only count if the scores are equal to the last digit. The two
alternate in one process, after a warm-up run of each.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate

from llmprune.devices import resolve_device
from llmprune.measuring.bench.machine import commit, device_name, versions
from llmprune.measuring.tasks import OFFLINE_TASKS, HarnessSettings, run_tasks
from llmprune.measuring.tasks.tasks import Tasks
from llmprune.storage.files import write_json
from llmprune.storage.hub import resolve_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Time both, print the medians, and write JSON."""
    args = _parse(arguments)
    ways = {"hf": _by_hf, "llmprune": _by_us}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.repeats + 1):
        scores = {}
        for name, way in ways.items():
            start = time.perf_counter()
            scores[name] = way(args)
            if turn:
                seconds[name].append(time.perf_counter() - start)
        if scores["hf"] != scores["llmprune"]:
            raise SystemExit(f"the scores differ: {scores}")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    added = medians["llmprune"] / medians["hf"] - 1
    for name, times in seconds.items():
        print(f"{name}: median {medians[name]:.3f} s of {len(times)} runs, {min(times):.3f} to {max(times):.3f}")
    print(f"overhead: {added:+.1%}; scores are equal")
    if args.json:
        header = {"device": device_name(resolve_device(args.device)), "versions": versions(), "commit": commit()}
        what = {"model": args.model, "tasks": args.tasks, "limit": args.limit, "batch_size": args.batch_size}
        write_json(args.json, {**header, **what, "seconds": seconds, "medians": medians, "added": added})


def _by_us(args: argparse.Namespace) -> Any:
    settings = HarnessSettings(args.limit, args.batch_size, device=args.device, quiet=True)
    return run_tasks(args.model, args.tasks, settings=settings).results["results"]


def _by_hf(args: argparse.Namespace) -> Any:
    tasks = Tasks(args.tasks)
    return simple_evaluate(
        "hf",
        model_args={"pretrained": str(resolve_model(args.model))},
        tasks=tasks.names,
        batch_size=args.batch_size,
        device=args.device,
        limit=args.limit,
        task_manager=tasks,
    )["results"]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed")
    parser.add_argument("--tasks", type=lambda text: tuple(text.split(",")), default=OFFLINE_TASKS)
    parser.add_argument("--limit", type=int, help="documents per task")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
