"""The machine of a measurement: the device's name, the versions, and the two rates that bound every matmul."""

import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from llmprune import __version__
from llmprune.devices import cpu_threads
from llmprune.kernels.configurations import processor_name
from llmprune.precision import computed_in
from llmprune.timing import Effort, time_calls

_PACKAGES = ("torch", "triton", "transformers", "nvidia-cusparselt-cu13", "nvidia-cublas")

# Bytes of the buffer that is copied, and the size of the square matrices that are multiplied.
_COPIED = {"cuda": 1 << 30, "cpu": 256 << 20}
_MULTIPLIED = {"cuda": 8192, "cpu": 1024}
# Where a CPU takes seconds for a matrix of that size, in a dtype that it lacks.
_EMULATED = 256


@dataclass(frozen=True, slots=True)
class Rates:
    """The peak rates of a device, as measured.

    Attributes:
        copy: bytes/s, read and written, of a large copy.
        matmul: FLOP/s of a large dense matmul.
    """

    copy: float
    matmul: float

    def floor(self, nbytes: float, operations: float) -> tuple[float, str]:
        """The minimum seconds to move this many bytes and do this many operations, and which of the two bounds it."""
        moving, computing = nbytes / self.copy, operations / self.matmul
        return (moving, "bytes") if moving >= computing else (computing, "arithmetic")

    def to_dict(self) -> dict[str, float]:
        """As plain data."""
        return {f"{name}_per_second": value for name, value in asdict(self).items()}


def measure_rates(device: torch.device, dtype: torch.dtype, effort: Effort) -> Rates:
    """Measure both rates.

    Args:
        device: where.
        dtype: of the dense matmul.
        effort: seconds for each of them.
    """
    size = _MULTIPLIED.get(device.type, 1024) if computed_in(dtype, device) == dtype else _EMULATED
    source = torch.ones(_COPIED.get(device.type, 1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = time_calls([lambda: target.copy_(source)], device, effort.seconds)
    x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    multiplying = time_calls([lambda: x @ w], device, effort.seconds)
    return Rates(2 * source.numel() / copying.median, 2 * size**3 / multiplying.median)


def device_name(device: torch.device) -> str:
    """Name a device so that results can be distinguished by it: a GPU, or a CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {cpu_threads()}"


def versions() -> dict[str, str]:
    """The versions of the installed packages that affect the speed of a matmul."""
    found = {"llmprune": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str | None:
    """The commit of this code, with "+changes" appended if files differ; None outside a git checkout of it."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    head, changes = _git(here.parent, "rev-parse", "HEAD"), _git(here.parent, "status", "--porcelain")
    return f"{head}+changes" if head and changes else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None
