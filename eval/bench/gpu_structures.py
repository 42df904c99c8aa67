"""The part `structures` of the GPU bench: exact group removal against float64, its time, and a recipe end to end."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmprune.eval.bench.gpu_plan import Plan
from llmprune.eval.bench.gpu_prune import Row, wait
from llmprune.structures.remove.problem import GroupRemoval, RemovalSettings
from llmprune.structures.remove.solver import remove_groups

# The factor by which a search in float32 may exceed float64's loss: a near tie may be decided differently.
_SLACK = 1.02


def structures(plan: Plan, work: Path) -> Iterator[Row]:
    """Removal against float64, its seconds at the sizes of a real layer, and a recipe on the device and on the CPU."""
    yield _check(plan)
    sizes = ((256, 64),) if plan.rehearsal else ((14336, 4096), (4096, 4096))
    for width, rows in sizes:
        yield _time(plan, width, rows)
    yield from _recipe(plan, work)


def _problem(rows: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, width], and the Gram matrix of inputs with correlated channels."""
    torch.manual_seed(0)
    common = torch.randn(2 * width, max(width // 8, 1), device=device)
    x = common @ torch.randn(common.shape[1], width, device=device) + 0.3 * torch.randn(2 * width, width, device=device)
    return torch.randn(rows, width, device=device), x.T @ x


def _check(plan: Plan) -> Row:
    weight, gram = _problem(96, 256, plan.device)
    row: Row = {"name": "removal against float64", "passed": True}
    for size, remove in ((1, 64), (32, 2)):
        settings = RemovalSettings(swaps=8)
        ours = remove_groups(weight, gram, size, remove, settings)
        exact = remove_groups(weight.cpu().double(), gram.cpu().double(), size, remove, settings)
        row[f"groups of {size}"] = {"error": ours.error, "float64": exact.error}
        row["passed"] &= ours.error <= _SLACK * exact.error
    return row


def _time(plan: Plan, width: int, rows: int) -> Row:
    """Seconds to remove a quarter of the channels, without and with exchanges; of the second run of each."""
    weight, gram = _problem(rows, width, plan.device)
    result: Row = {"name": "removal", "width": width, "rows": rows, "remove": width // 4}
    for name, swaps in (("greedy", 0), ("exchanges", 32)):
        for _ in range(2):
            wait(plan.device)
            start = time.perf_counter()
            found: GroupRemoval = remove_groups(weight, gram, 1, width // 4, RemovalSettings(swaps=swaps))
            wait(plan.device)
            result[f"{name}_seconds"] = time.perf_counter() - start
        result[f"{name}_error"] = found.error
    return result


def _recipe(plan: Plan, work: Path) -> Iterator[Row]:
    """The bundled model pruned by a recipe, on the device and on the CPU: the perplexities must agree."""
    from llmprune.pruning.pipeline import prune

    text = {"source": "self", "samples": 4 if plan.rehearsal else 64, "length": 16 if plan.rehearsal else 256}
    recipe: dict[str, Any] = {
        "structures": {"heads": {"remove": 0.25}, "ffn": {"remove": 0.25}, "depth": {"remove": 1}},
        "calibration": text,
        "evaluation": {**text, "seed": 1, "samples": 4, "prompts": []},
        "held_back": 1,
        "compute_dtype": "float32",
    }
    found = {}
    for name in dict.fromkeys((str(plan.device), "cpu")):
        report = prune("testbed", {**recipe, "device": name}, work / f"structures-{name.replace(':', '-')}")
        found[name] = report.pruned_perplexity
        yield {
            "name": "recipe", "device": name, "perplexity": report.pruned_perplexity,
            "speed": report.header["speed"], "seconds": report.header["seconds"],
        }  # fmt: skip
    # Text is sampled on each device: rounding makes the tokens differ despite equal seeds, so only gross errors show.
    first, last = found[str(plan.device)], found["cpu"]
    assert first is not None
    assert last is not None
    yield {"name": "recipe, both devices", "passed": 0.8 < first / last < 1.25, "perplexities": found}
