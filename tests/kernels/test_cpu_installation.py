"""Installing the package compiles the CPU kernels if it can, and never fails because of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cpu_matrices import needs_kernels

from llmprune.kernels.cpu.compiler import source_hash
from llmprune.kernels.cpu.library import Library

ROOT = Path(__file__).parents[2]


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )


@pytest.mark.slow
@needs_kernels
def test_the_kernels_are_installed(tmp_path):
    build(tmp_path)
    (made,) = tmp_path.rglob("*.so")
    assert made.relative_to(tmp_path) == Path("llmprune/kernels/cpu/kernels.so")
    assert Library(made).source == source_hash()


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "reason"), [("no-such-compiler", "no C++ compiler"), ("g++ '", "bad string")])
def test_an_installation_without_a_compiler_succeeds(tmp_path, compiler, reason):
    run = build(tmp_path, CXX=compiler)
    assert f"the CPU kernels are not compiled: {reason}" in run.stdout + run.stderr
    assert list(tmp_path.rglob("*.so")) == []
