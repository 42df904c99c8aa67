"""Seconds of SparseGPT for one matrix: the factorisation of its Gram matrix, and the column updates.

    python -m llmprune.eval.bench.column_updates --json column-updates.json

Weights and inputs are random. For comparison, the time of the long-range matmuls alone is given: rows x width^2
operations at the measured rate of float32 matmuls. If the output error differs from that of the same run in float64 by
more than 0.1 %, nothing is timed.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llmprune.devices import resolve_device
from llmprune.measuring.bench.machine import commit, device_name, measure_rates, versions
from llmprune.methods import SparseGPT
from llmprune.patterns import parse
from llmprune.statistics import Gram
from llmprune.storage.files import write_json
from llmprune.timing import Effort

_CASES = (
    (8192, 2048, "0.5"), (2048, 8192, "0.5"), (2048, 2048, "0.5"), (8192, 2048, "2:4"), (2048, 8192, "2:4"),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every case, print it, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", type=_case, default=_CASES, metavar="ROWSxWIDTH,PATTERN")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args(arguments)
    device = resolve_device(args.device)
    rate = measure_rates(device, torch.float32, Effort()).matmul
    rows = []
    for height, width, pattern in args.cases:
        check(pattern, device)
        row = measure(height, width, pattern, args.repeats, device) | {"products": height * width**2 / rate}
        rows.append({"rows": height, "width": width, "pattern": pattern, **row})
        print(
            f"{height} x {width}, {pattern}: factor {row['factor']:.2f} s; column updates {row['best']:.2f} to "
            f"{row['worst']:.2f} s, of which matmuls {row['products']:.2f} s"
        )
    if args.json:
        header = {"device": device_name(device), "versions": versions(), "commit": commit()}
        write_json(args.json, {**header, "products_per_second": rate, "rows": rows})


def measure(height: int, width: int, pattern: str, repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of one factorisation, and of the fastest and the slowest of several runs of SparseGPT."""
    weight, gram = _operands(height, width, device)
    factor = _seconds(lambda: gram.factor(0.01), device)
    sweeps = [_seconds(lambda: SparseGPT()(weight, gram, parse(pattern)), device) for _ in range(repeats)]
    return {"factor": factor, "best": min(sweeps), "worst": max(sweeps)}


def check(pattern: str, device: torch.device) -> None:
    """Compare the output error of a small run in float32 with that of the same run in float64."""
    weight, gram = _operands(96, 256, device)
    products, lost = gram.products.double().cpu(), []
    exact = SparseGPT()(weight.double().cpu(), Gram(products, gram.tokens), parse(pattern))
    for pruned in (SparseGPT()(weight, gram, parse(pattern)), exact):
        difference = weight.double().cpu() - pruned.weight.double().cpu()
        lost.append(float((difference @ products * difference).sum()))
    assert abs(lost[0] / lost[1] - 1) < 1e-3, lost


def _operands(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, Gram]:
    torch.manual_seed(0)
    gram = Gram.empty(width, device)
    gram.update(torch.randn(width // 2, width, device=device))
    return torch.randn(height, width, device=device), gram


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _case(text: str) -> tuple[int, int, str]:
    shape, pattern = text.split(",")
    height, width = map(int, shape.split("x"))
    return height, width, pattern


if __name__ == "__main__":
    main()
