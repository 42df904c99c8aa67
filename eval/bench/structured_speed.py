"""The speed of a model without half of its structures, and the speed of exact group removal.

Both parts check correctness before measuring, alternate between what they compare, and record the load of the machine:
other programs slow down all of them, but not equally.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmprune.measuring.bench.machine import device_name
from llmprune.models.skeleton import quiet_transformers
from llmprune.precision import computed_in, dtype_name
from llmprune.pruning.pipeline import prune
from llmprune.storage.hub import resolve_model
from llmprune.storage.report import Report
from llmprune.structures.remove.problem import GroupRemoval, RemovalSettings
from llmprune.structures.remove.solver import remove_groups
from llmprune.text.loading import load_tokenizer
from llmprune.timing import Timing

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 4096,
}  # fmt: skip
SPEED_COLUMNS = {
    "dtype": "{dtype}",
    "what": "{what}",
    "dense": "{dense_ms:.1f} ms",
    "pruned": "{pruned_ms:.1f} ms",
    "speed-up": "{speedup:.2f}",
    "FLOPs, dense / pruned": "{flop_ratio:.2f}",
    "load": "{load:.2f}",
}
# (inputs, outputs, removed) of the matrix that is solved, and of the one that its time is extrapolated to.
SOLVED, LARGE = (2816, 1024, 704), (14336, 4096, 3584)
SOLVER_COLUMNS = {
    "threads": "{threads}",
    "exchanges": "{swaps} of {most_swaps}",
    "seconds": "{seconds:.1f}",
    "TFLOP, documented": "{tflop:.3f}",
    "GFLOP/s": "{gflop_per_second:.0f}",
    "error": "{error:.4f}",
    "minutes at 14336 x 4096": "{large_minutes:.0f}",
    "load": "{load:.2f}",
}


@dataclass(frozen=True, slots=True)
class Turns:
    """How often two models alternate, and what they run.

    Attributes:
        prompt: tokens of the prefill.
        new_tokens: of a decode.
        rounds: runs of each model.
    """

    prompt: int = 512
    new_tokens: int = 32
    rounds: int = 5


def speed_rows(shape: dict[str, int] | None = None, turns: Turns | None = None) -> Iterator[dict[str, Any]]:
    """Compare prefill and decode of a random Llama and of its pruned model, also in bfloat16 if the CPU supports it.

    Args:
        shape: fields of its config.
        turns: how often they are measured, and what they run.
    """
    turns = turns or Turns()
    for dtype in dict.fromkeys(computed_in(dtype, CPU) for dtype in (torch.float32, torch.bfloat16)):
        with tempfile.TemporaryDirectory(prefix="llmprune-bench-") as work:
            dense, pruned, report = _models(Path(work), shape or SHAPE, dtype)
            _require_equal(Path(work) / "dense", pruned, report)
            extent = report.header["extent"]
            head = 2.0 * dense.lm_head.weight.numel()
            load = os.getloadavg()[0]
            ids = torch.randint(dense.config.vocab_size, (1, turns.prompt), generator=_seeded())
            measured = _in_turns([dense, pruned], ids, turns)
            for (what, (before, after)), tokens in zip(measured.items(), (turns.prompt, 1), strict=True):
                yield {
                    "what": what,
                    "dtype": dtype_name(dtype),
                    "dense_ms": 1e3 * before.median,
                    "pruned_ms": 1e3 * after.median,
                    "speedup": before.median / after.median,
                    "flop_ratio": _flops(extent["dense"], head, tokens) / _flops(extent["pruned"], head, tokens),
                    "dense": before.to_dict(),
                    "pruned": after.to_dict(),
                    "extent": extent,
                    "load": load,
                    "device": device_name(CPU),
                }


def solver_rows(
    solved: tuple[int, int, int] = SOLVED, threads: tuple[int, ...] = (1, 2), swaps: tuple[int, ...] = (0, 32)
) -> Iterator[dict[str, Any]]:
    """Time exact removal of single columns, and relate it to the documented number of operations.

    Args:
        solved: inputs, outputs and removed columns.
        threads: numbers of threads to try.
        swaps: maximum numbers of exchanges to try.
    """
    width, outputs, removed = solved
    weight, gram = _problem(width, outputs)
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for most in swaps:
                load = os.getloadavg()[0]
                removal = remove_groups(weight, gram, 1, removed, RemovalSettings(swaps=most))
                _require_optimal(weight, gram, removal)
                yield _solver_row(solved, removal, most) | {"load": load, "device": device_name(CPU)}
    finally:
        torch.set_num_threads(before)


def documented_flops(width: int, outputs: int, removed: int, exchanged: bool) -> float:
    """Count floating-point operations as `structures.solver` documents them.

    Args:
        width: inputs of the matrix.
        outputs: of the matrix.
        removed: columns.
        exchanged: whether removed columns are exchanged with kept ones afterwards.
    """
    greedy = 6.0 * width**2 * removed + float(width) ** 3 + 2.0 * width**2 * outputs
    return greedy * (2 if exchanged else 1)


def _solver_row(solved: tuple[int, int, int], removal: GroupRemoval, most: int) -> dict[str, Any]:
    flops = documented_flops(*solved, most > 0)
    return {
        "inputs": solved[0],
        "outputs": solved[1],
        "removed": solved[2],
        "threads": torch.get_num_threads(),
        "most_swaps": most,
        "swaps": removal.swaps,
        "seconds": removal.seconds,
        "tflop": flops / 1e12,
        "gflop_per_second": flops / removal.seconds / 1e9,
        "error": removal.error,
        "large_minutes": documented_flops(*LARGE, most > 0) / flops * removal.seconds / 60,
    }


def _problem(width: int, outputs: int) -> tuple[Tensor, Tensor]:
    """A matrix, and the Gram matrix of correlated inputs of unequal scale."""
    generator = _seeded()
    tokens, mixing = 4 * width, torch.randn(width, width, generator=generator) / width**0.5
    scales = (0.3 * torch.randn(width, generator=generator)).exp()
    hidden = torch.randn(tokens, width, generator=generator) @ mixing
    inputs = (hidden + 0.2 * torch.randn(tokens, width, generator=generator)) * scales
    return torch.randn(outputs, width, generator=generator) / width**0.5, inputs.T @ inputs


def _require_optimal(weight: Tensor, gram: Tensor, removal: GroupRemoval) -> None:
    """Require that the kept weights have their least-squares values, computed in float64."""
    damped = gram.double()
    damped.diagonal().add_(removal.damping * damped.diagonal().mean())
    kept = torch.ones(weight.shape[1], dtype=torch.bool)
    kept[removal.removed] = False
    expected = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.double().T).T
    difference = (removal.weight[:, kept] - expected).norm() / expected.norm()
    assert difference < 1e-3, f"the refit is off by {float(difference):.2e}"
    assert not removal.weight[:, ~kept].any(), "removed columns are not zero"


def _models(work: Path, shape: dict[str, int], dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel, Report]:
    """A random model and its pruned model, as stock transformers loads them."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=2048)).to(dtype)
    with quiet_transformers():
        model.save_pretrained(work / "dense")
    tokenizer: Any = load_tokenizer(resolve_model("testbed"))
    tokenizer.save_pretrained(work / "dense")
    half = {"remove": 0.5, "method": "magnitude-l2"}
    recipe = {
        "structures": {"heads": half, "ffn": half},
        "calibration": {"samples": 1, "length": 32},
        "evaluation": None,
        "held_back": 0,
        "device": "cpu",
    }
    report = prune(str(work / "dense"), recipe, work / "pruned")
    return _load(work / "dense"), _load(work / "pruned"), report


def _load(folder: Path) -> PreTrainedModel:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()


def _flops(extent: dict[str, Any], head: float, tokens: int) -> float:
    """FLOPs of one forward pass: the LM head reads only the last token, and attention's own matmuls are left out."""
    return tokens * (extent["flops_per_token"] - head) + head


@torch.inference_mode()
def _require_equal(folder: Path, pruned: PreTrainedModel, report: Report) -> None:
    """Require that the pruned model computes the same as the dense one with zeros in place of what was removed."""
    dense = _load(folder)
    for row in report.structures:
        weight = dense.get_parameter(f"{row.consumer}.weight")
        weight.unflatten(1, (row.groups, -1))[:, list(row.removed or ())] = 0
    ids = torch.randint(dense.config.vocab_size, (1, 16), generator=_seeded())
    expected, found = dense(ids).logits.float(), pruned(ids).logits.float()
    limit = 1e-4 if dense.dtype == torch.float32 else 0.05
    difference = float((found - expected).norm() / expected.norm())
    assert difference < limit, f"the pruned model is off by {difference:.2e}"


@torch.inference_mode()
def _in_turns(models: list[PreTrainedModel], ids: Tensor, turns: Turns) -> dict[str, list[Timing]]:
    """Seconds of a prefill, and of each token decoded after it, for each model; the first round warms up."""

    def generate(model: PreTrainedModel, new_tokens: int) -> float:
        return _seconds(
            lambda: model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )
        )  # fmt: skip

    prefills: list[list[float]] = [[] for _ in models]
    tokens: list[list[float]] = [[] for _ in models]
    for number in range(turns.rounds + 1):
        for place, model in enumerate(models):
            first = generate(model, 1)
            whole = generate(model, turns.new_tokens + 1)
            if number:
                prefills[place].append(first)
                tokens[place].append((whole - first) / turns.new_tokens)
    return {
        f"prefill of {ids.shape[1]} tokens": [Timing.of(seconds) for seconds in prefills],
        f"decode of a token after {ids.shape[1]}": [Timing.of(seconds) for seconds in tokens],
    }


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
