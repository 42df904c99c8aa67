"""The parts `sweep` and `prune` of the GPU bench: SparseGPT's kernel, and a random model pruned, seconds by stage."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmprune.eval.bench.gpu_plan import Plan
from llmprune.kernels.obs_sweep.reference import sweep_block_reference
from llmprune.methods import SparseGPT, sparsegpt
from llmprune.patterns import parse
from llmprune.statistics import Gram

Row = dict[str, Any]


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """||ours - exact|| / ||exact||, in float64."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def sweep(plan: Plan) -> Iterator[Row]:
    """Gram matrix, column loop and SparseGPT against float64; then the kernel's time and the reference's."""
    errors = _sweep_errors(plan)
    yield {"name": "errors", "passed": True, **errors}
    widths = (64,) if plan.rehearsal else (4096, 14336)
    for width in widths:
        for pattern in ("0.5", "2:4"):
            yield _time_sweep(64 if plan.rehearsal else 4096, width, pattern, plan.device)


def prune(plan: Plan, work: Path, shape: str, samples: int, length: int) -> Iterator[Row]:
    """A random model of this shape, pruned with random tokens; a row for each pattern."""
    from llmprune.eval.bench import gpu_model
    from llmprune.eval.bench.prune import measure, random_model
    from llmprune.recipe.recipe import load_recipe

    if plan.rehearsal:
        folder = work / "tiny"
        gpu_model.random_model(plan).save_pretrained(folder)
    else:
        folder = random_model(shape, work)
    for pattern in ("0.5", "2:4"):
        settings = {"pattern": pattern, "method": "sparsegpt", "evaluation": None, "held_back": 0}
        recipe = load_recipe({**settings, "device": str(plan.device)})
        yield measure(folder, work / "pruned", recipe, samples, length)


def _sweep_errors(plan: Plan) -> dict[str, float]:
    """Compare with float64; raises AssertionError if the device computes wrong results.

    Tensor cores sum long rows slightly less precisely than float32, and a near tie that is decided differently changes
    the rest of its row: only rows with identical masks are compared.
    """
    torch.manual_seed(0)
    device, rows_seen = plan.device, 512 if plan.rehearsal else 4096
    errors: dict[str, float] = {}
    rows = torch.randn(rows_seen, 256 if plan.rehearsal else 1024, device=device).to(torch.bfloat16)
    width = rows.shape[1]
    gram = Gram.empty(width, device)
    gram.update(rows)
    errors["gram"] = relative(gram.products, rows.double().T @ rows.double())
    assert errors["gram"] < 2e-5, errors
    upper = torch.linalg.cholesky(gram.products[:128, :128]).T.contiguous()
    inputs = [torch.randn(128, 999, device=device), torch.randn(128, 999, device=device), upper]
    keep = torch.rand(128, 999, device=device) > 0.5
    for group in (None, (2, 4), (4, 8)):
        operands = [*inputs, upper.diagonal().square()]
        ours, mask = operands[0].clone(), keep.clone()
        _kernel(device)(ours, *operands[1:], mask, group)
        (exact, *wide), expected = [tensor.double() for tensor in operands], keep.clone()
        sweep_block_reference(exact, *wide, expected, group)
        agreed = (mask == expected).all(0)
        assert agreed.float().mean() > 0.99, group
        errors[f"sweep {group}"] = relative(ours[:, agreed], exact[:, agreed])
        assert errors[f"sweep {group}"] < 1e-5, errors
    weight = torch.randn(width // 2, width, device=device)
    products = gram.products.double().cpu()
    for pattern in ("0.5", "2:4", "0.5@64x64"):
        ours = SparseGPT()(weight, gram, parse(pattern))
        exact = SparseGPT()(weight.double().cpu(), Gram(products, gram.tokens), parse(pattern))
        lost = []
        for pruned in (ours, exact):
            difference = weight.double().cpu() - pruned.weight.double().cpu()
            lost.append(float((difference @ products * difference).sum()))
        errors[f"sparsegpt {pattern}"] = abs(lost[0] / lost[1] - 1)
        assert errors[f"sparsegpt {pattern}"] < 1e-2, errors
    return errors


def _time_sweep(rows: int, width: int, pattern: str, device: torch.device) -> Row:
    """Milliseconds of SparseGPT on one matrix, without the factorisation, with the kernel and with the reference."""
    weight, x = torch.randn(rows, width, device=device), torch.randn(2 * width, width, device=device)
    gram = Gram.empty(width, device)
    gram.update(x)
    gram.factor(0.01)
    result: Row = {"rows": rows, "width": width, "pattern": pattern}
    for name, implementation in (("kernel", _kernel(device)), ("reference", sweep_block_reference)):
        times = []
        for _ in range(4):
            wait(device)
            start = time.perf_counter()
            _sweep_with(implementation, weight, gram, pattern)
            wait(device)
            times.append(1e3 * (time.perf_counter() - start))
        result[f"{name}_ms"] = sorted(times[1:])[1]
    return result


def _kernel(device: torch.device):
    if device.type != "cuda":
        return sweep_block_reference
    from llmprune.kernels.obs_sweep.kernel import sweep_block_triton

    return sweep_block_triton


def _sweep_with(implementation, weight: torch.Tensor, gram: Gram, pattern: str) -> None:
    before = sparsegpt.sweep_block
    sparsegpt.sweep_block = implementation
    try:
        SparseGPT()(weight, gram, parse(pattern))
    finally:
        sparsegpt.sweep_block = before


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
