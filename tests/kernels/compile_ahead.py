"""Compile kernels ahead of time, without a GPU, and count what came out.

Triton decides between compiler and interpreter when a kernel is defined, so tests, where the interpreter rules, call
`compile_all`, which starts this file as a process of its own; a script without the interpreter calls `compile_ahead`.
"""

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from typing_extensions import NotRequired, TypedDict

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


class Job(TypedDict):
    """One compilation, in JSON: the arguments of `compile_ahead`, with "module:name" for the kernel."""

    kernel: str
    capability: int
    arguments: dict[str, str]
    constants: dict[str, Any]
    warps: int
    options: NotRequired[dict[str, Any]]


def compile_all(jobs: list[Job]) -> list[dict[str, Any]]:
    """Run `compile_ahead` for each job, in another process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", __file__]
    run = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr)
    results: list[dict[str, Any]] = json.loads(run.stdout)
    return results


def compile_ahead(
    kernel: Any,
    capability: int,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    warps: int,
    **options: Any,
) -> dict[str, Any]:
    """Compile for an NVIDIA GPU and return its resources and instructions.

    Args:
        kernel: what `triton.jit` made.
        capability: 80, 90, 100...
        arguments: name -> Triton type such as "*bf16" or "i32"; pointers are taken to be aligned to 16 bytes.
        constants: name -> value of the constants of the compilation, and of arguments that are None.
        warps: warps of a program.
        options: others of Triton's compile options.

    Returns:
        REG, STACK, LOCAL and SHARED as cuobjdump prints them; `instructions` and `loop`: opcode -> count in the whole
        kernel and in its longest loop; `conversions`: layout conversions inside the loops of the last high-level form.
    """
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else arguments[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n, kind in arguments.items() if kind.startswith("*")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **options})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [_TOOLS / "cuobjdump", "-res-usage", "-sass", cubin]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", listing)}
    code = [(int(place, 16), opcode, rest) for place, opcode, rest in _INSTRUCTION.findall(listing)]
    loop = max(_loops(code), key=len, default=[])
    return {
        **found,
        "instructions": _count(code),
        "loop": _count(loop),
        "conversions": sum("convert_layout" in line for line in _loop_lines(compiled.asm["ttgir"])),
    }


def _count(code: list[tuple[int, str, str]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for _, opcode, _ in code:
        counts[opcode] = counts.get(opcode, 0) + 1
    return counts


def _loops(code: list[tuple[int, str, str]]) -> Iterator[list[tuple[int, str, str]]]:
    """What lies between a backward branch and its target; the branch to itself at the end of every kernel is none."""
    for place, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if opcode.startswith("BRA") and target and int(target[1], 16) < place:
            yield [line for line in code if int(target[1], 16) <= line[0] <= place]


def _loop_lines(text: str) -> Iterator[str]:
    """The lines inside `scf.for` and `scf.while`, by indentation."""
    depth: list[int] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        while depth and indent <= depth[-1] and line.strip():
            depth.pop()
        if depth:
            yield line
        if "scf.for" in line or "scf.while" in line:
            depth.append(indent)


def _kernel(job: Job) -> Any:
    module, _, name = job["kernel"].partition(":")
    return getattr(importlib.import_module(module), name)


def _run(job: Job) -> dict[str, Any]:
    kernel = _kernel(job)
    options = job.get("options", {})
    return compile_ahead(kernel, job["capability"], job["arguments"], job["constants"], warps=job["warps"], **options)


if __name__ == "__main__":
    jobs: list[Job] = json.load(sys.stdin)
    for job in jobs:
        _kernel(job)  # imported once, before the processes part
    with multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, 8)) as pool:
        json.dump(pool.map(_run, jobs, chunksize=1), sys.stdout)
