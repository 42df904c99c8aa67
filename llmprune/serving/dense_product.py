"""A dense product of one token on a CPU: torch's own, or oneDNN's, whichever is faster on this machine.

For one token in a 16-bit dtype, oneDNN reads the weights at about half the bandwidth on some processors; torch's own
product, to which it falls back without oneDNN, reads them at all of it. From two tokens on oneDNN is faster. Which one
it is, is measured once for a shape and a number of threads, and recorded with the kernels' configurations.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmprune.kernels import configurations, cpu

OPERATION = "cpu_dense.own_product"

# By how much torch's own product has to be faster, beyond noise.
_MARGIN = 0.95
_REPEATS = 4

_HALF = (torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")

# (shape, dtype, threads) of the weights that torch itself multiplies faster with one token.
_own: set[tuple[torch.Size, torch.dtype, int]] = set()

_lock = threading.Lock()
_without_onednn = 0
_enabled = True


class DenseLinear(nn.Linear):
    """A linear layer that takes the faster product for one token."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear; one token is multiplied by torch itself where `choose` found that faster.

    Weights of 16 bits on a CPU may have x in float32.
    """
    if x.dtype is torch.float32 and weight.dtype in cpu.HALVES and not torch.is_autocast_enabled(x.device.type):
        on_cpu = x.device.type == "cpu" and cpu.unavailable() is None
        return cpu.halves_linear(x, weight, bias) if on_cpu else F.linear(x, weight.float(), bias)
    # What is being compiled is left to the compiler, which has products of its own.
    one_token = bool(_own) and x.numel() == x.shape[-1] and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if one_token and (weight.shape, weight.dtype, torch.get_num_threads()) in _own:
        return own_product(x, weight, bias)
    return F.linear(x, weight, bias)


def own_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by torch itself, without oneDNN."""
    with _onednn_disabled():
        return F.linear(x, weight, bias)


@torch.inference_mode()
def choose(weights: Sequence[Tensor]) -> bool:
    """Decide how one token is multiplied, by measurement unless it was measured before.

    Args:
        weights: of one shape [out, in], dtype and device, to rotate through, so that they come from memory.

    Returns:
        Whether by torch's own product; False for weights that are not 16-bit numbers on a CPU.
    """
    weight = weights[0]
    if weight.device.type != "cpu" or weight.dtype not in _HALF:
        return False
    shape = {"out_features": weight.shape[0], "in_features": weight.shape[1], "threads": torch.get_num_threads()}
    operation = f"{OPERATION}.{str(weight.dtype).removeprefix('torch.')}"
    own = configurations.measured_as(_choice, operation, _CPU, **shape)
    if own is None:
        own = _is_own_faster(weights)
        with contextlib.suppress(OSError):  # a cache that cannot be written: measured again by the next process
            configurations.record(operation, _CPU, {"own": int(own)}, **shape)
    key = weight.shape, weight.dtype, torch.get_num_threads()
    (_own.add if own else _own.discard)(key)
    return own


def _is_own_faster(weights: Sequence[Tensor]) -> bool:
    x = torch.randn(1, weights[0].shape[1]).to(weights[0].dtype)
    products: tuple[Callable[[Tensor, Tensor, Tensor | None], Tensor], ...] = (F.linear, own_product)
    least = [float("inf"), float("inf")]
    for turn in range(_REPEATS):
        for number, product in enumerate(products):
            weight = weights[(2 * turn + number) % len(weights)]
            started = time.perf_counter()
            product(x, weight, None)
            if turn:  # the first wakes threads, and compiles oneDNN's kernel
                least[number] = min(least[number], time.perf_counter() - started)
    return least[1] < _MARGIN * least[0]


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


def _choice(own: int) -> bool:
    return bool(own)
