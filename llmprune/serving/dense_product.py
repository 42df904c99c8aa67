"""A dense product of one token on a CPU: oneDNN's, torch's own or the library's, whichever is the fastest here.

For one token in a 16-bit dtype, oneDNN reads the weights at about half the bandwidth on some processors; torch's own
product, to which it falls back without oneDNN, reads them at all of it on some of those, and the kernel for float32
activations on more. From two tokens on oneDNN is faster. Which one it is, is measured once for a shape and a number of
threads, and recorded with the kernels' configurations.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmprune.kernels import configurations, cpu

OPERATION = "cpu_dense.product"

# By how much another product than oneDNN's has to be faster, beyond noise.
_MARGIN = 0.95
_REPEATS = 4

_HALF = (torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# By (shape, dtype, threads) of the weights: how one token is multiplied, where that is not by oneDNN.
_chosen: dict[tuple[torch.Size, torch.dtype, int], Product] = {}

_lock = threading.Lock()
_without_onednn = 0
_enabled = True


class DenseLinear(nn.Linear):
    """A linear layer that takes the fastest product for one token."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear; one token is multiplied by the product that `choose` found the fastest.

    Weights of 16 bits on a CPU may have x in float32.
    """
    if x.dtype is torch.float32 and weight.dtype in cpu.HALVES and not torch.is_autocast_enabled(x.device.type):
        on_cpu = x.device.type == "cpu" and cpu.unavailable() is None
        return cpu.halves_linear(x, weight, bias) if on_cpu else F.linear(x, weight.float(), bias)
    # What is being compiled is left to the compiler, which has products of its own.
    one_token = bool(_chosen) and x.numel() == x.shape[-1] and x.device.type == "cpu"
    if one_token and x.dtype is weight.dtype and not torch.compiler.is_compiling():
        product = _chosen.get((weight.shape, weight.dtype, torch.get_num_threads()))
        if product is not None and (product is not library_product or _is_plain(x, weight, bias)):
            return product(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_plain(*operands: Tensor | None) -> bool:
    """Whether only the numbers are wanted: gradients, traces and casts are those of F.linear."""
    return cpu.is_plain(*operands) and not (cpu.is_transformed() or torch.is_autocast_enabled("cpu"))


def own_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by torch itself, without oneDNN."""
    with _onednn_disabled():
        return F.linear(x, weight, bias)


def library_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same by the CPU library, in float32 and rounded once."""
    return cpu.halves_linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


_PRODUCTS: dict[str, Product] = {"onednn": F.linear, "own": own_product, "library": library_product}


@torch.inference_mode()
def choose(weights: Sequence[Tensor]) -> str:
    """Decide how one token is multiplied, by measurement unless it was measured before.

    Args:
        weights: of one shape [out, in], dtype and device, to rotate through, so that they come from memory.

    Returns:
        "onednn", "own" or "library"; "onednn" for weights that are not 16-bit numbers on a CPU.
    """
    weight = weights[0]
    if weight.device.type != "cpu" or weight.dtype not in _HALF:
        return "onednn"
    shape = {"out_features": weight.shape[0], "in_features": weight.shape[1], "threads": torch.get_num_threads()}
    operation = f"{OPERATION}.{str(weight.dtype).removeprefix('torch.')}"
    name = configurations.measured_as(_name, operation, _CPU, **shape)
    if name is None or (name == "library" and cpu.unavailable() is not None):
        name = _fastest(weights)
        # A cache that cannot be written: measured again by the next process; so is what lacked the library.
        with contextlib.suppress(OSError):
            if cpu.unavailable() is None:
                configurations.record(operation, _CPU, {"product": list(_PRODUCTS).index(name)}, **shape)
    key = weight.shape, weight.dtype, torch.get_num_threads()
    _chosen.pop(key, None)
    if name != "onednn":
        _chosen[key] = _PRODUCTS[name]
    return name


def _fastest(weights: Sequence[Tensor]) -> str:
    x = torch.randn(1, weights[0].shape[1]).to(weights[0].dtype)
    least = {name: float("inf") for name in _PRODUCTS if name != "library" or cpu.unavailable() is None}
    for turn in range(_REPEATS):
        for number, name in enumerate(least):
            weight = weights[(len(least) * turn + number) % len(weights)]
            started = time.perf_counter()
            _PRODUCTS[name](x, weight, None)
            if turn:  # the first wakes threads, and compiles oneDNN's kernel
                least[name] = min(least[name], time.perf_counter() - started)
    least["onednn"] *= _MARGIN
    return min(least, key=least.__getitem__)


@contextlib.contextmanager
def _onednn_disabled() -> Iterator[None]:
    """Disable oneDNN, a switch of the whole process: another thread's product is right meanwhile, only slower.

    Counted, so that the last of several threads that overlap restores what the first one found.
    """
    global _without_onednn, _enabled
    with _lock:
        if _without_onednn == 0:
            _enabled = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)
        _without_onednn += 1
    try:
        yield
    finally:
        with _lock:
            _without_onednn -= 1
            if _without_onednn == 0:
                torch._C._set_mkldnn_enabled(_enabled)


def _name(product: int) -> str:
    if product not in range(len(_PRODUCTS)):
        raise ValueError(f"no product {product}")
    return list(_PRODUCTS)[product]
