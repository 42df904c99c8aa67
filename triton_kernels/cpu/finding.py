"""The compiled library of this process: found, or compiled.

It is looked for beside this file, where an installation puts it, then in the folder `cpu` of the user's cache
(`$LLMPRUNE_CACHE`, by default `~/.cache/llmprune`), named by the hash of its sources and its compiler; otherwise it is
compiled into that folder, once, with a message. `LLMPRUNE_CPU_KERNELS=0` does without it.
"""

import functools
import os
import platform
import sys
from pathlib import Path

import torch

from .. import configurations
from .compiler import INSTALLED, CompilerError, compile_library, compiler_id, find_compiler, source_hash
from .library import TYPES, Described, Library

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
        loaded = _load_installed() or Library(_compiled())
    except (CompilerError, OSError, AttributeError, RuntimeError) as error:
        return str(error)
    if loaded.level == 0:
        return "the CPU kernels need a processor with AVX2 or AVX-512"
    with torch.device("cpu"):  # whatever the caller's default is
        right = _is_right(loaded)
    return loaded if right else "the CPU kernels give wrong results as compiled here: set CXX to another compiler"


def _is_right(loaded: Library) -> bool:
    """Whether small products are right: what a compiler makes of the kernels is not taken on trust."""
    generator = torch.Generator().manual_seed(0)
    for dtype in TYPES:
        weight = torch.randn(24, 6, generator=generator).to(dtype)
        x = torch.randn(3, 6, generator=generator).to(dtype)
        y = torch.empty(3, 24, dtype=dtype)
        mask = torch.full((24, 1), 0b101101, dtype=torch.uint8)
        kept = torch.tensor([True, False, True, True, False, True])
        found = Described("bitmask", dtype, (24, 6), 24 * 4, 0, dtype)
        packed = loaded.pack(found, mask, weight[:, kept], None, dtype)
        loaded.multiply([packed], x, None, y)
        exact = x.double() @ (weight * kept).double().T
        # Sums of four products, each below 16.
        if not bool(((y.double() - exact).abs() <= 64 * torch.finfo(dtype).eps).all()):
            return False
    return True


def _load_installed() -> Library | None:
    """The library that came with the package, unless its sources have changed since, or it does not load here."""
    if not INSTALLED.exists():
        return None
    try:
        loaded = Library(INSTALLED)
    except (OSError, AttributeError):
        return None
    return loaded if loaded.source == source_hash() else None


def _compiled() -> Path:
    """The library in the user's cache, compiled if it is not there."""
    folder = configurations.cache_file().parent / "cpu"
    try:
        compiler = find_compiler()
    except CompilerError:
        made = sorted(folder.glob(f"{source_hash()}-*.so"))
        if not made:
            raise
        return made[0]
    path = folder / f"{source_hash()}-{compiler_id(compiler)}.so"
    if not path.exists():
        sys.stderr.write(f"llmprune: compiling the CPU kernels with {compiler[0]}, once, into {folder}\n")
        compile_library(compiler, path)
    return path
