"""The part `checks` of the GPU bench: the tests of the kernels, then every kernel at every shape against float64."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmprune.eval.bench.gpu_plan import Plan
from llmprune.eval.bench.gpu_products import random_24, random_blocks
from llmprune.measuring.bench.products import is_right, relative_error
from llmprune.serving.forms import FORMS, Form
from llmprune.storage.formats import Layout

Row = dict[str, Any]

_TESTS = Path(__file__).resolve().parents[2] / "tests" / "kernels"
_TEST_SECONDS = 400
_TAIL = 4000

# Rows of the exact result at a time: float64 copies of the largest matrices would take minutes and gigabytes.
_ROWS = 4096


def checks(plan: Plan) -> Iterator[Row]:
    """A row for the tests, and one for each kernel and shape; `passed` is the outcome."""
    yield _tests(plan)
    forms = {form.name: form for form in FORMS}
    for name, shape in plan.shapes.items():
        layout, stored = random_24(shape, plan.device)
        for form in ("fragments", "portable"):
            yield {"name": name, **_check(forms[form], layout, stored, plan)}
    for size in plan.blocks:
        for name in plan.block_shapes:
            for balanced in (True, False):
                blocks, stored = random_blocks(plan.shapes[name], size, 0.7, balanced, plan.device)
                case = {"name": name, "block": size, "balanced": balanced}
                yield {**case, **_check(forms["blocks"], blocks, stored, plan)}


def _tests(plan: Plan) -> Row:
    """Run tests/kernels in a separate process; in a rehearsal only collect the tests."""
    command = [sys.executable, "-m", "pytest", str(_TESTS), "-q", "-p", "no:cacheprovider"]
    # Tests of ahead-of-time compilation need no GPU, and run elsewhere.
    command += ["-W", "default", "-k", "not sass and not compile"]
    command += ["--collect-only"] * plan.rehearsal
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    row: Row = {"name": "tests/kernels", "command": " ".join(command[1:])}
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=_TEST_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        seen = (error.stdout or b"").decode(errors="replace")[-_TAIL:]
        return {**row, "passed": False, "output": f"{seen}\nnot finished after {_TEST_SECONDS} s"}
    return {**row, "passed": run.returncode == 0, "output": (run.stdout + run.stderr)[-_TAIL:]}


@torch.inference_mode()
def _check(form: Form, layout: Layout, stored: dict[str, Tensor], plan: Plan) -> Row:
    """Every number of tokens, twice: correct, finite and bit-identical both times, with and without a bias."""
    held, weight = form.build(layout, stored), layout.unpack(stored)
    bias = torch.randn(layout.shape[0], device=plan.device, dtype=weight.dtype)
    errors, wrong = {}, []
    for tokens in plan.checked_tokens:
        x = torch.randn(tokens, layout.shape[1], device=plan.device, dtype=weight.dtype)
        given = bias if tokens % 2 else None
        exact = _exact(x, weight, given)
        first, second = (form.multiply(layout, held, x, given) for _ in range(2))
        error, allowed = relative_error(first, exact), relative_error(F.linear(x, weight, given), exact)
        errors[str(tokens)] = repr(error)
        if not is_right(error, allowed, weight.dtype):
            wrong.append(f"{tokens} tokens: relative error {error:.3g}, of the dense matmul {allowed:.3g}")
        if not torch.equal(first, second):
            wrong.append(f"{tokens} tokens: different bits the second time")
    return {"form": form.name, "shape": list(layout.shape), "errors": errors, "passed": not wrong, "wrong": wrong}


def _exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    parts = [F.linear(x.double(), part.double()) for part in weight.split(_ROWS)]
    exact = torch.cat(parts, dim=-1)
    return exact if bias is None else exact + bias.double()


def failed(rows: list[Row]) -> list[str]:
    """The rows that did not pass, as JSON lines without the output of the tests."""
    return [
        json.dumps({key: value for key, value in row.items() if key != "output"})
        for row in rows
        if row.get("passed") is False
    ]
