"""Compile the kernels: when the package is installed (setup.py), or on first use.

The compiler is `$CXX`, or else the first of c++, g++ and clang++ on the path. It compiles one file, in a few seconds,
and links neither Python nor torch nor an OpenMP library. This module imports nothing but Python's own library, so that
an installation can run it.
"""

import contextlib
import functools
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "source"

# The library that setup.py puts beside this file.
INSTALLED = Path(__file__).parent / "kernels.so"

_NAMES = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off", "-w")

# What a compiler is given at most, for its version and for the kernels.
_VERSION_SECONDS, _SECONDS = 30, 300


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
    given = os.environ.get("CXX", "")
    try:
        wanted = shlex.split(given)
    except ValueError as error:
        raise CompilerError(f"$CXX is {given!r}, which is no command: {error}; correct or unset it") from error
    names = [wanted[0]] if wanted else list(_NAMES)
    for name in names:
        if found := shutil.which(name):
            return [found, *wanted[1:]]
    where = f"$CXX is {wanted[0]!r}, which is not a program here" if wanted else f"none of {', '.join(_NAMES)} is here"
    raise CompilerError(f"no C++ compiler: {where}; install g++ (Debian: apt install g++) or set CXX")


def compiler_id(compiler: list[str]) -> str:
    """A hash of the compiler's command and version, which decide what it makes of the sources.

    Raises:
        CompilerError: it does not run.
    """
    version = _run([*compiler, "--version"], _VERSION_SECONDS).stdout
    return hashlib.sha256((shlex.join(compiler) + version).encode(errors="surrogateescape")).hexdigest()[:12]


def compile_library(compiler: list[str], target: Path) -> None:
    """Compile the sources to a shared library, which replaces the target atomically.

    Raises:
        CompilerError: the compiler fails.
        OSError: the target cannot be written.
    """
    if sys.platform != "linux":
        raise CompilerError(f"the kernels are made for Linux, not for {sys.platform}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="compiling-") as folder:
        made = Path(folder) / target.name
        source, output = str(SOURCE / "kernels.cpp"), str(made)
        run = _run([*compiler, *_FLAGS, f'-DSOURCE_HASH="{source_hash()}"', "-o", output, source], _SECONDS)
        _require_compiled(compiler[0], run)
        with made.open("r+b") as file:
            digest = _digest(file.read())
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        made.replace(target)


def is_whole(library: Path) -> bool:
    """Whether a file is what `compile_library` made of these sources: to open part of a library can end the process."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return content[-size:] == _digest(content[:-size])


def _digest(library: bytes) -> bytes:
    """What follows a library in its file, which no loader reads."""
    return hashlib.sha256(source_hash().encode() + library).digest()


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    # A session of its own: a compiler starts others, which would be waited for if only the first one were killed.
    try:
        run = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )
    except OSError as error:
        raise CompilerError(f"the C++ compiler does not run: {error}; install another, or set CXX") from error
    with run:
        try:
            output, errors = run.communicate(timeout=seconds)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            said = f"{command[0]} has not finished after {seconds:g} s; set CXX to another compiler"
            raise CompilerError(said) from error
    return subprocess.CompletedProcess(command, run.returncode, output, errors)


def _require_compiled(compiler: str, run: subprocess.CompletedProcess[str]) -> None:
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()[-1:]
        said = errors[0] if errors else f"exit status {run.returncode}"
        raise CompilerError(f"{compiler} does not compile the kernels: {said}; install g++ 11 or newer, or set CXX")
