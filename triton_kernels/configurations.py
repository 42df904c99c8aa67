"""Look up a kernel's configuration: the choice that was measured on this machine, or else none.

A choice is looked up by operation, device and exact shape in the file where tuning records what it measured:
`kernels.json` in the folder `$LLMPRUNE_CACHE`, by default `~/.cache/llmprune`. It is read once per process. If the file
lacks the shape, `measured` returns None and the operation uses its own calculated default. A choice belongs to the
versions of torch, Triton and our kernels that it was measured with: others do not find it. Where the file cannot be
written, choices last as long as the process.
"""

import functools
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

# What one measurement decides, named by the operation; for a kernel the fields of its configuration.
Choice = dict[str, int | float | str]

Configuration = TypeVar("Configuration")

# Increase it when a kernel changes so much that earlier measurements no longer apply.
KERNELS_VERSION = 1

# What could not be written, for this process: (operation, device, shape) -> choice.
_unwritten: dict[tuple[str, str, str], Choice] = {}


def measured(op: str, device: torch.device, **shape: int) -> Choice | None:
    """Look up the choice that was measured as the fastest.

    Args:
        op: name of the operation, such as "linear_24".
        device: the device that it runs on.
        shape: named sizes; only a choice recorded under exactly these is found.

    Returns:
        The choice, not to be modified; None if this was never measured.
    """
    return _choices().get((op, device_key(device), _shape_key(shape)))


def measured_as(
    make: Callable[..., Configuration], op: str, device: torch.device, **shape: int
) -> Configuration | None:
    """Look up the choice that was measured as the fastest, as a configuration.

    Args:
        make: takes the settings of the choice by name; raises TypeError or ValueError if no kernel can run with them.
        op: as for `measured`.
        device: as for `measured`.
        shape: as for `measured`.

    Returns:
        What `make` returned; None if nothing was measured or, with a warning, if `make` refused it.
    """
    choice = measured(op, device, **shape)
    if choice is None:
        return None
    try:
        return make(**choice)
    except (TypeError, ValueError) as error:
        warnings.warn(
            f"{op}, {_shape_key(shape)}: the measured choice {choice} is not used: {error}\n"
            "expected: a choice that this version of the kernels can run; a calculated default runs instead\n"
            f"fix: tune again, which replaces it in {cache_file()}",
            stacklevel=2,
        )
        return None


def dispatch_limit(op: str, device: torch.device, highest: int, **shape: int) -> int:
    """The number of tokens from which an operation takes the dense path instead of its decode kernel.

    Args:
        op: name of the operation; the measured limit is the choice {"limit": tokens} of `<op>.dispatch`.
        device: the device that it runs on.
        highest: most tokens that the decode kernel accepts. Without a measurement it runs for all of them: it moves
            0.56 of the dense bytes, while the dense path moves 0.56 + 1 + 1 of them.
        shape: named sizes, without the tokens.
    """
    limit = measured_as(_limit, f"{op}.dispatch", device, **shape)
    return highest + 1 if limit is None else min(limit, highest + 1)


def record(op: str, device: torch.device, choice: Choice, **shape: int) -> None:
    """Write a measured choice to the cache file; from then on `measured` finds it, also in later processes.

    The file is replaced atomically. If two processes record at the same moment, one choice may be lost.

    Raises:
        TypeError: a value of the choice is not an int, a float or a string.
        OSError: the cache folder cannot be written; this process finds the choice all the same.
    """
    if not _is_choice(choice):
        raise TypeError(f"choice {choice!r} for {op}: expected a dict with str keys and int, float or str values")
    key = op, device_key(device), _shape_key(shape)
    try:
        _write(*key, dict(choice))
        _unwritten.pop(key, None)
    except OSError:
        _unwritten[key] = dict(choice)
        raise
    finally:
        _choices.cache_clear()


def hold(op: str, device: torch.device, choice: Choice, **shape: int) -> None:
    """Let this process alone find a choice: one that was measured while other programs disturbed it."""
    _unwritten[op, device_key(device), _shape_key(shape)] = dict(choice)
    _choices.cache_clear()


def _write(op: str, device: str, shape: str, choice: Choice) -> None:
    path = cache_file()
    content = _read(path)
    content.setdefault(_versions(), {}).setdefault(device, {}).setdefault(op, {})[shape] = choice
    _replace(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def forget() -> None:
    """Read the cache file again at the next look-up, and forget what could not be written."""
    _unwritten.clear()
    _choices.cache_clear()


def cache_file() -> Path:
    """The file in which measured choices are stored; it need not exist.

    Raises:
        OSError: its folder would be in a home folder that the user does not have.
    """
    folder = os.environ.get("LLMPRUNE_CACHE") or "~/.cache/llmprune"
    try:
        return Path(folder).expanduser() / "kernels.json"
    except RuntimeError as error:
        raise FileNotFoundError(f"{folder} for the cache: {error}; set LLMPRUNE_CACHE to another folder") from error


@functools.cache
def device_key(device: torch.device) -> str:
    """The device's name as its driver gives it, such as "NVIDIA H200"; for the CPU `processor_name`."""
    if device.type == "cpu":
        return processor_name()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def processor_name() -> str:
    """The processor's model name, or its architecture if the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or f"{platform.machine()} CPU"


@functools.cache
def sm_count(device: torch.device) -> int:
    """Count the multiprocessors of a GPU; 1 for other devices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _choices() -> dict[tuple[str, str, str], Choice]:
    try:
        cached = _read(cache_file()).get(_versions(), {})
    except OSError:  # a user without a home folder has no cache either
        cached = {}
    written = {
        (op, device, shape): choice
        for device, operations in cached.items()
        for op, shapes in operations.items()
        for shape, choice in shapes.items()
    }
    return written | _unwritten


def _read(path: Path) -> dict[str, Any]:
    """Versions -> device -> operation -> shape -> choice; empty, with a warning, if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _check(content)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(
            f"{path} cannot be read: {error}\n"
            "expected: the measured kernel configurations that tuning wrote; calculated defaults run instead\n"
            "fix: delete the file, or tune again, which replaces it",
            stacklevel=2,
        )
        return {}
    return dict(content)


def _check(content: Any, depth: int = 4) -> None:
    """Raise ValueError unless `content` is `depth` levels of nested dicts around choices."""
    if depth == 0:
        if not _is_choice(content):
            raise ValueError(f"{str(content)[:60]} is not a choice")
        return
    if not isinstance(content, dict):
        raise ValueError(f"{str(content)[:60]} is not an object")
    for inner in content.values():
        _check(inner, depth - 1)


def _is_choice(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(setting, int | float | str) for name, setting in value.items()
    )


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _limit(limit: int) -> int:
    return int(limit)


def _shape_key(shape: dict[str, int]) -> str:
    return " ".join(f"{name}={shape[name]}" for name in sorted(shape))


@functools.cache
def _versions() -> str:
    try:
        import triton  # type: ignore[import-untyped]
    except ImportError:
        compiler = "no triton"
    else:
        compiler = f"triton {triton.__version__}"
    return f"torch {torch.__version__}, {compiler}, kernels {KERNELS_VERSION}"
