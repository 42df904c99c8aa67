"""The libraries to compare with; each is checked for correctness before it is timed, and its refusals are recorded."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.measuring.bench.products import is_right, relative_error
from llmprune.timing import Effort, time_calls

Row = dict[str, Any]


def cusparselt_version() -> int | None:
    """The version of cuSPARSELt, as a number such as 800 for 0.8.0; None if it is not available."""
    return torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None


def cusparselt(weight: Tensor, x: Tensor, effort: Effort) -> Row:
    """Time cuSPARSELt's x @ weight.T with the algorithm that its search chooses.

    Args:
        weight: [out, in], 2:4.
        x: [tokens, in]; padded to a multiple of 8 tokens, as the library requires.
        effort: for the timing.

    Returns:
        "version", "algorithm", "padded_tokens" and the time; or "refused" with the reason.
    """
    version = cusparselt_version()
    if version is None:
        return {"refused": "cuSPARSELt is not in this build of PyTorch"}
    padded = F.pad(x, (0, 0, 0, -len(x) % 8))
    try:
        compressed = torch._cslt_compress(weight)
        settings = _algorithm(compressed, padded)
        copies = [compressed, *(compressed.clone() for _ in range(effort.copies(compressed.nbytes, x.device) - 1))]
        calls = [_cslt_call(copy, padded, settings) for copy in copies]
        result = torch._cslt_sparse_mm(compressed, padded.t(), **settings).t()[: len(x)]
    except Exception as error:  # noqa: BLE001 - whatever a library raises is recorded, and ours is measured anyway
        return {"version": version, "refused": _first_line(error)}
    known = {"version": version, "algorithm": settings, "padded_tokens": len(padded)}
    return {**known, **_checked_time(result, weight, x, calls, effort)}


def torch_blocks(bsr: Tensor, weight: Tensor, x: Tensor, effort: Effort) -> Row:
    """Time torch's own block-sparse x @ weight.T.

    Args:
        bsr: [out, in], sparse BSR.
        weight: the same, dense.
        x: [tokens, in].
        effort: for the timing.

    Returns:
        The time; or "refused" with the reason.
    """
    if not x.is_cuda:
        return {"refused": "torch.sparse._triton_ops needs a GPU"}
    from torch.sparse import _triton_ops

    y = x.new_zeros(weight.shape[0], len(x))
    dense = x.t().contiguous()
    copies = [bsr, *(bsr.clone() for _ in range(effort.copies(bsr.values().nbytes, x.device) - 1))]
    calls = [_bsr_call(_triton_ops.bsr_dense_addmm, y, copy, dense) for copy in copies]
    try:
        result = calls[0]()
    except Exception as error:  # noqa: BLE001 - Triton and the library raise errors of many types
        return {"refused": _first_line(error)}
    return _checked_time(result.t(), weight, x, calls, effort)


def _algorithm(compressed: Tensor, x: Tensor) -> dict[str, Any]:
    """The algorithm that the library's search finds, with its split-K choice from builds that report it."""
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is None:
        return {"alg_id": int(torch._cslt_sparse_mm_search(compressed, x.t()))}
    algorithm, split_k, mode, _ = search(compressed, x.t(), None, None, None, False)
    return {"alg_id": algorithm, "split_k": split_k, "split_k_mode": mode}


def _checked_time(result: Tensor, weight: Tensor, x: Tensor, calls: list[Callable[[], Tensor]], effort: Effort) -> Row:
    exact = F.linear(x.float(), weight.float())
    error = relative_error(result, exact)
    if not is_right(error, relative_error(F.linear(x, weight), exact), x.dtype):
        return {"refused": f"wrong: relative error {error:.3g}", "error": str(error)}
    try:
        return {"error": error, "captured": x.is_cuda, **time_calls(calls, x.device, effort.seconds).to_dict()}
    except Exception as refusal:  # noqa: BLE001 - captures fail in many ways
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        # Launched one by one instead; a short matmul then appears as long as its launch.
        timing = time_calls(calls, x.device, effort.seconds, captured=False)
        return {"error": error, "captured": False, "not_captured": _first_line(refusal), **timing.to_dict()}


def _cslt_call(compressed: Tensor, x: Tensor, settings: dict[str, Any]) -> Callable[[], Tensor]:
    return lambda: torch._cslt_sparse_mm(compressed, x.t(), **settings)


def _bsr_call(product: Callable[..., Tensor], y: Tensor, bsr: Tensor, dense: Tensor) -> Callable[[], Tensor]:
    return lambda: product(y, bsr, dense, beta=0)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
