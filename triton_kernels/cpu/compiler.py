"""Compile the kernels: when the package is installed (setup.py), or on first use.

The compiler is `$CXX`, or else the first of c++, g++ and clang++ on the path. It compiles one file, in a few seconds,
and links neither Python nor torch nor an OpenMP library. This module imports nothing but Python's own library, so that
an installation can run it.
"""

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "source"

# The library that setup.py puts beside this file.
INSTALLED = Path(__file__).parent / "kernels.so"

_NAMES = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off", "-w")
_SECONDS = 300


class CompilerError(Exception):
    """There is no compiler, or it fails; the message says which, and what to do."""


@functools.cache
def source_hash() -> str:
    """The hash of all sources and of how they are compiled."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_compiler() -> list[str]:
    """The command that compiles C++.

    Raises:
        CompilerError: there is none.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))
    names = [wanted[0]] if wanted else list(_NAMES)
    for name in names:
        if found := shutil.which(name):
            return [found, *wanted[1:]]
    where = f"$CXX is {wanted[0]!r}, which is not a program here" if wanted else f"none of {', '.join(_NAMES)} is here"
    raise CompilerError(f"no C++ compiler: {where}; install g++ (Debian: apt install g++) or set CXX")


def compiler_id(compiler: list[str]) -> str:
    """A hash of the compiler's command and version, which decide what it makes of the sources."""
    try:
        run = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except OSError as error:
        raise CompilerError(f"the C++ compiler does not run: {error}; install another, or set CXX") from error
    return hashlib.sha256((shlex.join(compiler) + run.stdout).encode()).hexdigest()[:12]


def compile_library(compiler: list[str], target: Path) -> None:
    """Compile the sources to a shared library, which replaces the target atomically.

    Raises:
        CompilerError: the compiler fails, or the target cannot be written.
    """
    if sys.platform != "linux":
        raise CompilerError(f"the kernels are made for Linux, not for {sys.platform}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="compiling-") as folder:
            made = Path(folder) / target.name
            _run([*compiler, *_FLAGS, f'-DSOURCE_HASH="{source_hash()}"', "-o", str(made), str(SOURCE / "kernels.cpp")])
            made.replace(target)
    except OSError as error:
        raise CompilerError(f"the kernels cannot be compiled: {error}") from error


def _run(command: list[str]) -> None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f"{command[0]} took more than {_SECONDS} s to compile the kernels") from error
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()[-1:]
        said = errors[0] if errors else f"exit status {run.returncode}"
        raise CompilerError(f"{command[0]} does not compile the kernels: {said}; install g++ 11 or newer, or set CXX")
