"""Every check and benchmark that needs a GPU, in one command: first correctness, then speed, saved row by row.

    pip install --no-deps --no-build-isolation -e .       # without a network
    python -m llmprune.eval.bench.gpu --json out/gpu.json --seconds 540
    python -m llmprune.eval.bench.gpu --json out/gpu.json --parts linear,block --tune

| part | what |
|---|---|
| checks | tests/kernels on the GPU; every kernel at every shape against float64, twice |
| linear | 2:4 matmuls in the shapes of Llama and Qwen, compared with cuBLAS and cuSPARSELt |
| block | block-sparse matmuls, compared with cuBLAS and torch.sparse |
| decode | a random model of Llama-3-8B shape: decode steps in CUDA graphs and a prefill, dense and 2:4 |
| sweep | SparseGPT's kernel against float64, and its speed compared with its reference |
| prune | a random model of Llama-3-8B shape, pruned: seconds by stage compared with the arithmetic floor |
| structures | exact group removal against float64, its seconds at 14336 x 4096, a recipe on the GPU and on the CPU |

A matmul with a wrong result is not timed. A failing part does not stop the others; its traceback is in the results, and
the exit code is 1. The file is written after every row, so that a time limit costs one row at most; parts from an
earlier run are kept. Kernel configurations that --tune finds are stored next to it, in kernels.json.

`--rehearse` runs everything with tiny shapes on a CPU, to check the script itself.
"""

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmprune.storage.files import read_json, write_json

Row = dict[str, Any]
Part = Callable[[], Iterator[Row]]

PARTS = ("checks", "linear", "block", "decode", "sweep", "prune", "structures")


class Results:
    """A JSON file that is complete after every row.

    Args:
        path: of the file; the results of other parts in it are kept.
        header: device, versions, commit.
        seconds: from now, after which no further row is started.
        clock: returns seconds, monotonically.
    """

    def __init__(self, path: Path, header: Row, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._end = clock() + seconds
        self._header = header
        earlier = read_json(path).get("parts", {}) if path.exists() else {}
        self.content: Row = {**header, "parts": dict(earlier)}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    @property
    def left(self) -> float:
        """Seconds until no further row is started."""
        return self._end - self._clock()

    def run(self, name: str, part: Part) -> bool:
        """Run a part until it ends, time is up, or it fails; returns whether everything passed."""
        if self.left <= 0:
            print(f"{name}: not run, no time left", flush=True)
            return False
        started = self._clock()
        entry: Row = {"status": "running", "rows": [], "run": self._header}
        self.content["parts"][name] = entry
        try:
            rows = part()
            while self.left > 0 and (row := next(rows, None)) is not None:
                json.dumps(row, allow_nan=False)  # a row that cannot be written must not spoil the file
                entry["rows"].append(row)
                entry["seconds"] = round(self._clock() - started, 3)
                self._write()
                print(f"{name}: {summary(row)}", flush=True)
            entry["status"] = "done" if self.left > 0 else "stopped: no time left"
        except Exception:  # noqa: BLE001 - other parts may still succeed; this one is reported as failed
            entry.update(status="failed", traceback=traceback.format_exc())
            print(f"{name}: {entry['traceback']}", flush=True)
        entry["seconds"] = round(self._clock() - started, 3)
        self._write()
        return entry["status"] != "failed" and not any(row.get("passed") is False for row in entry["rows"])

    def _write(self) -> None:
        write_json(self._path, self.content)


def summary(row: Row) -> str:
    """A row on one line: what it is, and its ratios; with the output of tests that failed."""
    shown = {key: row[key] for key in row if key in _SHOWN}
    if "comparisons" in row:
        shown["ratios"] = {c["tokens"]: c.get("ratio", "WRONG") for c in row["comparisons"]}
    if row.get("passed") is False:
        shown["output"] = row.get("output", "")
    return "  ".join(f"{key} {value}" for key, value in shown.items()) or str(row)


_SHOWN = (
    "name", "form", "block", "sparsity", "balanced", "peer", "tokens", "passed", "wrong", "model", "step", "median_us",
    "ratio", "tokens_per_second", "refused", "captured", "rows", "width", "pattern", "kernel_ms", "reference_ms",
    "seconds", "floor_share", "fused", "cusparselt",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit code."""
    args = _parse(arguments)
    # Before anything looks up measured choices, so that they are written next to the results.
    os.environ.setdefault("LLMPRUNE_CACHE", str(args.json.resolve().parent))
    import torch

    from llmprune.eval.bench.gpu_plan import Plan, rehearsal
    from llmprune.measuring.bench.machine import commit, device_name, versions

    if not args.rehearse and not torch.cuda.is_available():
        print("this machine has no GPU: --rehearse runs the script on a CPU")
        return 1
    plan = replace(rehearsal() if args.rehearse else Plan(), tune=args.tune)
    header = {
        "device": device_name(plan.device),
        "versions": versions(),
        "commit": args.commit or commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rehearsal": args.rehearse,
    }
    print(header, flush=True)
    results = Results(args.json, header, args.seconds)
    passed = [results.run(name, _part(name, plan, args)) for name in args.parts]
    print(f"{sum(passed)} of {len(passed)} parts without a failure; figures in {args.json}")
    return 0 if all(passed) else 1


def _part(name: str, plan: Any, args: argparse.Namespace) -> Part:
    """The rows of a part; imported only when it runs, so that a missing package fails only that part."""

    def rows() -> Iterator[Row]:
        if name == "checks":
            from llmprune.eval.bench.gpu_checks import checks

            return checks(plan)
        if name in ("linear", "block"):
            from llmprune.eval.bench import gpu_products

            return gpu_products.PARTS[name](plan)
        if name == "decode":
            from llmprune.eval.bench.gpu_model import decode

            return decode(plan)
        if name == "structures":
            from llmprune.eval.bench.gpu_structures import structures

            return structures(plan, args.work)
        from llmprune.eval.bench import gpu_prune

        if name == "sweep":
            return gpu_prune.sweep(plan)
        return gpu_prune.prune(plan, args.work, args.shape, args.samples, args.length)

    return rows


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--parts", type=_parts, default=PARTS, help=f"some of {','.join(PARTS)}, in this order")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after this time")
    parser.add_argument("--tune", action="store_true", help="search kernel configurations before measuring")
    parser.add_argument("--commit", help="of the code, if it is not a git checkout")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU, to check the script itself")
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="folder for the random model of `prune`")
    parser.add_argument("--shape", default="llama-8b", help="of the model of `prune`")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    return parser.parse_args(arguments)


def _parts(text: str) -> tuple[str, ...]:
    wanted = text.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]}; choose from {', '.join(PARTS)}")
    return tuple(name for name in PARTS if name in wanted)


if __name__ == "__main__":
    raise SystemExit(main())
