"""Everything that only a GPU can tell, in one command: correctness first, then speed, written down row by row.

    pip install --no-deps --no-build-isolation -e .       # where there is no network
    python -m llmprune.eval.bench.gpu --json out/gpu.json --seconds 540
    python -m llmprune.eval.bench.gpu --json out/gpu.json --parts linear,block --tune

| part | what |
|---|---|
| checks | tests/kernels on the GPU; every kernel at every shape against float64, twice |
| linear | 2:4 products of the shapes of Llama, Qwen beside cuBLAS and cuSPARSELt |
| block | block-sparse products beside cuBLAS and torch.sparse |
| decode | a random model of Llama-3-8B shape: steps of decode in CUDA graphs and a prefill, dense and 2:4 |
| sweep | SparseGPT's kernel against float64 and beside its reference |
| prune | a random model of Llama-3-8B shape, pruned: seconds by stage beside the arithmetic floor |
| structures | exact group removal against float64, its seconds at 14336 x 4096, a recipe on the GPU and on the CPU |

A product that is wrong is not timed. A part that fails does not keep the others from running; its traceback is in the
results, and the exit code is 1. The file is written after every row, so that a time limit costs one row at most; parts
that an earlier run has left in it stay. Kernel configurations that --tune finds are kept beside it, in kernels.json.

`--rehearse` runs all of it with tiny shapes on a CPU, so that the script itself is known to work.
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
    """A JSON file that is whole after every row.

    Args:
        path: of the file; what other parts have left in it is kept.
        header: device, versions, commit.
        seconds: from now on, after which no further row is begun.
        clock: seconds, ever rising.
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
        """Seconds until no further row is begun."""
        return self._end - self._clock()

    def run(self, name: str, part: Part) -> bool:
        """Run a part to its end, to the end of the time, or to its failure; returns whether all of it was right."""
        if self.left <= 0:
            print(f"{name}: not run, no time left", flush=True)
            return False
        started = self._clock()
        entry: Row = {"status": "running", "rows": [], "run": self._header}
        self.content["parts"][name] = entry
        try:
            rows = part()
            while self.left > 0 and (row := next(rows, None)) is not None:
                json.dumps(row, allow_nan=False)  # what cannot be written must not spoil the file
                entry["rows"].append(row)
                entry["seconds"] = round(self._clock() - started, 3)
                self._write()
                print(f"{name}: {summary(row)}", flush=True)
            entry["status"] = "done" if self.left > 0 else "stopped: no time left"
        except Exception:  # noqa: BLE001 - another part may still tell something; this one is reported as failed
            entry.update(status="failed", traceback=traceback.format_exc())
            print(f"{name}: {entry['traceback']}", flush=True)
        entry["seconds"] = round(self._clock() - started, 3)
        self._write()
        return entry["status"] != "failed" and not any(row.get("passed") is False for row in entry["rows"])

    def _write(self) -> None:
        write_json(self._path, self.content)


def summary(row: Row) -> str:
    """A row on one line: what it is, and its ratios; with what tests have printed where they failed."""
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
    # Before anything looks for measured choices: they come back with the results.
    os.environ.setdefault("LLMPRUNE_CACHE", str(args.json.resolve().parent))
    import torch

    from llmprune.eval.bench.gpu_plan import Plan, rehearsal
    from llmprune.measuring.bench.machine import commit, device_name, versions

    if not args.rehearse and not torch.cuda.is_available():
        print("no GPU here: --rehearse runs the script on a CPU")
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
    """The rows of a part; imported when its turn comes, so that a missing package costs that part alone."""

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
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so long")
    parser.add_argument("--tune", action="store_true", help="search kernel configurations before measuring")
    parser.add_argument("--commit", help="of the code, where it is no git checkout")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU: does the script work?")
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="where `prune` puts its random model")
    parser.add_argument("--shape", default="llama-8b", help="of the model of `prune`")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    return parser.parse_args(arguments)


def _parts(text: str) -> tuple[str, ...]:
    wanted = text.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
    return tuple(name for name in PARTS if name in wanted)


if __name__ == "__main__":
    raise SystemExit(main())
