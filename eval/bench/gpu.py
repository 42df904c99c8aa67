"""Everything about pruning that only a GPU can tell, in one command: correctness first, then seconds by stage.

    python -m llmprune.eval.bench.gpu --work /tmp/bench --json results.json

1. The sweep kernel against its reference, the Gram of bfloat16 rows and SparseGPT on the GPU against float64.
2. The sweep with the kernel against the sweep with the reference: milliseconds for one matrix.
3. A random model of Llama-3-8B shape, 128 x 2048 tokens: seconds by stage beside the arithmetic floor.

Nothing is timed if a check fails.
"""

import argparse
import time
from pathlib import Path

import torch

from llmprune.checkpoint import write_json
from llmprune.eval.bench.prune import measure, random_model
from llmprune.kernels.obs_sweep import kernel as sweep_kernel
from llmprune.kernels.obs_sweep.reference import sweep_block_reference
from llmprune.methods import SparseGPT
from llmprune.patterns import parse
from llmprune.recipe import load_recipe
from llmprune.statistics import Gram


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """||ours - exact|| / ||exact||, in float64."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def check() -> dict[str, float]:
    """Compare with float64; raises AssertionError where the GPU is wrong."""
    torch.manual_seed(0)
    errors: dict[str, float] = {}
    rows = torch.randn(4096, 1024, device="cuda").to(torch.bfloat16)
    gram = Gram.empty(1024, "cuda")
    gram.update(rows)
    errors["gram"] = relative(gram.products, rows.double().T @ rows.double())
    assert errors["gram"] < 1e-6, errors
    upper = torch.linalg.cholesky(gram.products[:128, :128]).T.contiguous()
    inputs = [torch.randn(128, 999, device="cuda"), torch.randn(128, 999, device="cuda"), upper]
    keep = torch.rand(128, 999, device="cuda") > 0.5
    for group in (None, (2, 4), (4, 8)):
        ours, mask = sweep_kernel.sweep_block_triton(*inputs, upper.diagonal().square(), keep, group)
        exact, expected = sweep_block_reference(
            *(t.double() for t in inputs), upper.diagonal().square().double(), keep, group
        )
        assert (mask != expected).float().mean() < 1e-4, group
        errors[f"sweep {group}"] = relative(ours.where(mask == expected, 0.0), exact.where(mask == expected, 0.0))
        assert errors[f"sweep {group}"] < 1e-5, errors
    weight = torch.randn(512, 1024, device="cuda")
    for pattern in ("0.5", "2:4", "0.5@64x64"):
        ours = SparseGPT()(weight, gram, parse(pattern))
        exact = SparseGPT()(weight.double().cpu(), Gram(gram.products.double().cpu(), gram.tokens), parse(pattern))
        lost = [
            float(((e := weight.double().cpu() - p.weight.double().cpu()) @ gram.products.double().cpu() * e).sum())
            for p in (ours, exact)
        ]
        errors[f"sparsegpt {pattern}"] = abs(lost[0] / lost[1] - 1)
        assert errors[f"sparsegpt {pattern}"] < 1e-2, errors
    return errors


def time_sweep(rows: int, width: int, pattern: str) -> dict[str, object]:
    """Milliseconds of SparseGPT on one matrix, the factor ready, with the kernel and with the reference."""
    weight, x = torch.randn(rows, width, device="cuda"), torch.randn(2 * width, width, device="cuda")
    gram = Gram.empty(width, "cuda")
    gram.update(x)
    gram.factor(0.01)
    result: dict[str, object] = {"rows": rows, "width": width, "pattern": pattern}
    for name, implementation in (("kernel", sweep_kernel.sweep_block_triton), ("reference", sweep_block_reference)):
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            _sweep_with(implementation, weight, gram, pattern)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        result[f"{name}_ms"] = sorted(times[1:])[1]
    return result


def _sweep_with(implementation, weight: torch.Tensor, gram: Gram, pattern: str) -> None:
    from llmprune.methods import sparsegpt

    before = sparsegpt.sweep_block
    sparsegpt.sweep_block = implementation
    try:
        SparseGPT()(weight, gram, parse(pattern))
    finally:
        sparsegpt.sweep_block = before


def main() -> None:
    """Check, time, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="where the random model goes")
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    args = parser.parse_args()
    results: dict[str, object] = {"checks": check()}
    print(results["checks"], flush=True)
    results["sweeps"] = [time_sweep(4096, width, p) for width in (4096, 14336) for p in ("0.5", "2:4")]
    print(results["sweeps"], flush=True)
    for pattern in ("0.5", "2:4"):
        recipe = load_recipe(
            {"pattern": pattern, "method": "sparsegpt", "evaluation": None, "device": "cuda", "held_back": 0}
        )
        folder = random_model(args.shape, args.work)
        results[pattern] = measure(folder, args.work / "pruned", recipe, args.samples, args.length)
        print(results[pattern], flush=True)
        write_json(args.json, results)


if __name__ == "__main__":
    main()
