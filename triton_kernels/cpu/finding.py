"""The compiled library of this process: found, or compiled.

It is looked for beside this file, where an installation puts it, then in the folder `cpu` of the user's cache
(`$LLMPRUNE_CACHE`, by default `~/.cache/llmprune`), named by the hash of its sources and its compiler; otherwise it is
compiled into that folder, once, with a message. A file there that is damaged, or of other sources, is replaced.
`LLMPRUNE_CPU_KERNELS=0` does without it.
"""

import functools
import os
import platform
import sys
from pathlib import Path

import torch

from .. import configurations
from .compiler import INSTALLED, CompilerError, compile_library, compiler_id, find_compiler, is_whole, source_hash
from .library import Library
from .trial import is_right

_MACHINES = ("x86_64", "AMD64")


def unavailable() -> str | None:
    """Why this machine has no CPU kernels, and how to change that; None if it has them. Compiles them on first use."""
    found = _found()
    return found if isinstance(found, str) else None


def library() -> Library:
    """The library; only where `unavailable` is None."""
    found = _found()
    if isinstance(found, str):
        raise RuntimeError(f"no CPU kernels: {found}")
    return found


@functools.cache
def _found() -> Library | str:
    """The library, or why there is none."""
    if os.environ.get("LLMPRUNE_CPU_KERNELS") == "0":
        return "the CPU kernels are disabled: unset LLMPRUNE_CPU_KERNELS, which is 0"
    if platform.machine() not in _MACHINES:
        return f"the CPU kernels need a processor with AVX2 or AVX-512, not {platform.machine()}"
    try:
        loaded = _load_installed() or _load_cached()
    except (CompilerError, OSError) as error:
        return str(error)
    if loaded.level == 0:
        return "the CPU kernels need a processor with AVX2 or AVX-512"
    with torch.device("cpu"):  # whatever the caller's default is
        right = is_right(loaded)
    return loaded if right else "the CPU kernels give wrong results as compiled here: set CXX to another compiler"


def _load_installed() -> Library | None:
    """The library that came with the package, unless its sources have changed since, or it does not load here."""
    if not INSTALLED.exists():
        return None
    try:
        loaded = Library(INSTALLED)
    except (OSError, AttributeError):
        return None
    return loaded if loaded.source == source_hash() else None


def _load_cached() -> Library:
    """The library in the user's cache, compiled if it is not there.

    Raises:
        CompilerError: there is no compiler, it fails, or what it made cannot be written or loaded.
        OSError: there is no cache.
    """
    path = _compiled()
    try:
        return Library(path)
    except OSError as error:
        fix = "delete the file, or set LLMPRUNE_CACHE to a folder whose files may be executed"
        raise CompilerError(f"the compiled CPU kernels {path} do not load: {error}; {fix}") from error


def _compiled() -> Path:
    folder = configurations.cache_file().parent / "cpu"
    try:
        compiler = find_compiler()
    except CompilerError:
        made = [path for path in sorted(folder.glob(f"{source_hash()}-*.so")) if is_whole(path)]
        if not made:
            raise
        return made[0]
    path = folder / f"{source_hash()}-{compiler_id(compiler)}.so"
    if not is_whole(path):
        sys.stderr.write(f"llmprune: compiling the CPU kernels with {compiler[0]}, once, into {folder}\n")
        try:
            compile_library(compiler, path)
        except OSError as error:
            fix = "set LLMPRUNE_CACHE to a folder that can be written"
            raise CompilerError(f"the CPU kernels cannot be compiled into {path}: {error}; {fix}") from error
    return path
