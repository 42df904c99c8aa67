"""The tests of the CPU kernels under the address sanitizer: an access outside a tensor ends the process.

    python -m llmprune.eval.bench.cpu_addresses

The kernels are compiled anew with `-fsanitize=address` into a temporary folder. Before the tests, a read beyond a
tensor has to be caught: otherwise their success would mean nothing. Needs g++ with its sanitizer library, and a source
tree.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_FLAGS = "-fsanitize=address -fno-omit-frame-pointer -g"

_TESTS = tuple(f"test_cpu_{part}.py" for part in ("library", "linear", "int8", "halves", "layers", "pruning"))

# What an installation compiled has no sanitizer, and is not taken.
_WITHOUT_INSTALLED = """
import sys
from pathlib import Path
from llmprune.kernels.cpu import finding
finding.INSTALLED = Path("none")
"""

_BEYOND = f"""{_WITHOUT_INSTALLED}
import torch
floats = torch.ones(64)
library = finding.library()
library._stream(floats.data_ptr(), 64 * 5, 1)
"""

_PYTEST = f"""{_WITHOUT_INSTALLED}
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tests; further arguments are pytest's."""
    chosen = list(sys.argv[1:] if arguments is None else arguments)
    tests = Path(__file__).resolve().parents[2] / "tests" / "kernels"
    if not tests.is_dir():
        raise SystemExit("there are no tests here: run this from a source tree")
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "CXX": f"{compiler} {_FLAGS}",
            "LLMPRUNE_CACHE": cache,
            # With the exceptions of C++, or the first one that torch throws would end the process.
            "LD_PRELOAD": f"{_library(compiler, 'libasan.so')} {_library(compiler, 'libstdc++.so.6')}",
            # Python itself keeps memory until it ends.
            "ASAN_OPTIONS": "detect_leaks=0",
        }
        _require_caught(environment)
        command = [sys.executable, "-c", _PYTEST, *(str(tests / name) for name in _TESTS), *chosen]
        raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)


def _library(compiler: str, name: str) -> str:
    """A library that has to be loaded before all others."""
    command = [*compiler.split(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"{compiler} has no {name}: install its address sanitizer (libasan) and C++ library")
    return path


def _require_caught(environment: Mapping[str, str]) -> None:
    """Read beyond a tensor on purpose."""
    run = subprocess.run([sys.executable, "-c", _BEYOND], env=environment, capture_output=True, text=True, check=False)
    if run.returncode == 0 or "heap-buffer-overflow" not in run.stderr:
        raise SystemExit(f"the address sanitizer does not catch a read beyond a tensor:\n{run.stderr[-2000:]}")
    print("a read beyond a tensor is caught; now the tests")


if __name__ == "__main__":
    main()
