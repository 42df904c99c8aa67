"""The sparse kernels of a CPU against its dense products, one shape and number of tokens after another.

    python -m llmprune.eval.bench.cpu --json cpu.json

Weights are random, in bfloat16. Every product rotates through copies that exceed the last-level cache, and all take
turns with a plain read of memory, so that other load on the machine affects them alike; a wrong result is not timed.
Each timed product follows one of the same kind that is not, as in a model: the first one after another's is slower.
Dense: F.linear, as transformers calls it; torch's own product (F.linear without oneDNN), also with its weights in huge
pages, in which packed matrices are; oneDNN's with weights in its own order; and "halves", the library's, with weights
in bfloat16 and activations in float32, which `llmprune.load` takes for one token where it is the fastest. On a
processor that does not multiply bfloat16, `load` takes it for more tokens too, F.linear also has weights in float32,
and oneDNN's order is theirs.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmprune.kernels import cpu
from llmprune.measuring.bench.machine import commit, device_name, versions
from llmprune.measuring.bench.products import is_right, relative_error
from llmprune.patterns import NM, Pattern, Unstructured
from llmprune.serving.dense_product import library_product, own_product
from llmprune.storage.files import write_json
from llmprune.storage.formats import fit_layout, quantise
from llmprune.storage.formats.int8 import GROUP
from llmprune.timing import Timing, rotated_bytes

Call = Callable[[Tensor], Tensor]
INT8 = "int8-"
DENSE = ("linear", "own", "own-huge", "prepacked", "float32", "prepacked-float32", "halves")

# Floats in each of the parts that the plain read goes through.
_STREAMED = 16 << 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every combination, print it, and write JSON."""
    args = _parse(arguments)
    if reason := cpu.unavailable():
        raise SystemExit(reason)
    torch.manual_seed(0)
    rows = [row for shape in args.shapes for row in measure(shape, args.tokens, args.sparsities, args.seconds)]
    for row in rows:
        print(_line(row))
    if args.json:
        header = {
            "threads": torch.get_num_threads(),
            "device": device_name(torch.device("cpu")),
            "versions": versions(),
            "commit": commit(),
        }
        kernels = cpu.LEVELS[cpu.library().level]
        write_json(args.json, {**header, "kernels": kernels, "rows": rows})


@torch.inference_mode()
def measure(
    shape: tuple[int, int], tokens: Sequence[int], sparsities: Sequence[str], seconds: float
) -> list[dict[str, Any]]:
    """Measure one shape (out, in): one row for each number of tokens."""
    made = {"dense": (torch.randn(shape) / shape[1] ** 0.5).bfloat16()}
    made |= {sparsity: pruned(made["dense"], sparsity) for sparsity in sparsities}
    products, sizes = {}, {}
    for name in (*dense_products(), *sparsities):
        weight = made.get(name, made["dense"])
        products[name], sizes[name] = _copies(name, weight)
    rows = []
    for count in tokens:
        x = torch.randn(count, shape[1]).bfloat16()
        errors = _errors(products, made, x)
        right = {name: calls for name, calls in products.items() if errors[name] is not None}
        times = _timed({"stream": _reads(), **right}, x, seconds)
        bandwidth = 4 * _STREAMED / times.pop("stream").median
        best = min(times[name].median for name in dense_products() if name in times)
        found = {
            name: {
                **timing.to_dict(),
                "bytes": sizes[name],
                "error": errors[name],
                "share": round(sizes[name] / timing.median / bandwidth, 3),
                "over_best_dense": round(best / timing.median, 3),
                "over_linear": round(times["linear"].median / timing.median, 3),
            }
            for name, timing in times.items()
        }
        row = {"shape": list(shape), "tokens": count, "stream_bytes_per_second": round(bandwidth)}
        rows.append({**row, "products": found, "wrong": sorted(set(products) - set(right))})
    return rows


def dense_products() -> tuple[str, ...]:
    """The dense products of this processor; oneDNN orders bfloat16 only where it multiplies it."""
    left_out = ("float32", "prepacked-float32") if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ("prepacked",)
    return tuple(name for name in DENSE if name not in left_out)


def pruned(weight: Tensor, sparsity: str) -> Tensor:
    """A weight with zeros at random places: "2:4", or a fraction such as "0.5"; quantised if "int8-" is before it."""
    zeros = weight * pattern_of(sparsity).mask(torch.rand(weight.shape))
    return quantise(zeros) if sparsity.startswith(INT8) else zeros


def pattern_of(sparsity: str) -> Pattern:
    """The pattern, of quantised weights too."""
    fraction = sparsity.removeprefix(INT8)
    return NM(2, 4) if fraction == "2:4" else Unstructured(float(fraction))


def _copies(name: str, weight: Tensor) -> tuple[list[Call], int]:
    """Products over different memory, and the bytes that each reads."""
    if name in DENSE:
        calls = {"prepacked": _prepacked, "own": _own, "own-huge": _own, "halves": _halves}
        call = calls.get(name.removesuffix("-float32"), _linear)
        weight = weight.float() if name.endswith("float32") else weight
        huge = name in ("own-huge", "float32", "halves")
        nbytes, another = weight.nbytes, (lambda: in_huge_pages(weight)) if huge else weight.clone
    else:
        kind = "nm" if name.endswith("2:4") else "bitmask"
        layout = fit_layout(INT8 + kind if name.startswith(INT8) else kind, weight, pattern_of(name))
        stored = layout.pack(weight)
        bits, call = stored["meta" if kind == "nm" else "mask"], _sparse
        scaling = (stored["peaks"], GROUP) if name.startswith(INT8) else ()
        another = partial(cpu.pack, kind, layout.shape, bits, stored["values"], *scaling)
        nbytes = another().nbytes
    count = -(-rotated_bytes(torch.device("cpu")) // nbytes) + 1
    return [call(another()) for _ in range(count)], nbytes


def in_huge_pages(weight: Tensor) -> Tensor:
    """A copy in huge pages, where the system has them."""
    return cpu.new_memory(weight.nbytes).view(weight.dtype).view(weight.shape).copy_(weight)


def _reads() -> list[Call]:
    """Plain reads of memory in all threads."""
    parts = [in_huge_pages(torch.ones(_STREAMED)) for _ in range(3)]
    return [lambda x, part=part: torch.tensor(cpu.library().stream(part)) for part in parts]


def _linear(weight: Tensor) -> Call:
    return lambda x: F.linear(x.to(weight.dtype), weight)


def _own(weight: Tensor) -> Call:
    return lambda x: own_product(x, weight, None)


def _halves(weight: Tensor) -> Call:
    return lambda x: library_product(x, weight, None)


def _prepacked(weight: Tensor) -> Call:
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), ordered, None, "none", [], "")


def _sparse(packed: Tensor) -> Call:
    size = cpu.library().describe(packed).shape[0]
    return lambda x: cpu.linear(x, [packed], None, [size])


def _errors(products: dict[str, list[Call]], made: dict[str, Tensor], x: Tensor) -> dict[str, float | None]:
    """The relative error of every product; None if it is wrong."""
    found: dict[str, float | None] = {}
    for name, calls in products.items():
        weight = made.get(name, made["dense"])
        exact = F.linear(x.float(), weight.float())
        error = relative_error(calls[0](x), exact)
        allowed = relative_error(F.linear(x, weight), exact)
        found[name] = error if is_right(error, allowed, x.dtype) else None
    return found


def _timed(products: dict[str, list[Call]], x: Tensor, seconds: float) -> dict[str, Timing]:
    """Time all products in turns."""
    times: dict[str, list[float]] = {name: [] for name in products}
    for calls in products.values():
        calls[-1](x)
    started, turn = time.perf_counter(), 0
    while turn < 12 or time.perf_counter() - started < seconds * len(products):
        for name, calls in products.items():
            calls[2 * turn % len(calls)](x)
            before = time.perf_counter()
            calls[(2 * turn + 1) % len(calls)](x)
            times[name].append(time.perf_counter() - before)
        turn += 1
    return {name: Timing.of(measured) for name, measured in times.items()}


def _line(row: dict[str, Any]) -> str:
    shown = [
        f"{name} {found['median_us'] / 1e3:.3f} ms, {found['over_best_dense']:.2f}x ({found['share']:.0%})"
        for name, found in row["products"].items()
    ]
    read = f"{row['stream_bytes_per_second'] / 1e9:.1f} GB/s"
    return f"{row['shape'][0]}x{row['shape'][1]}, {row['tokens']} tokens, {read} read: " + "; ".join(shown)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ((4096, 4096), (14336, 4096))
    parser.add_argument("--shapes", type=_list(lambda text: tuple(map(int, text.split("x")))), default=shapes)
    parser.add_argument("--tokens", type=_list(int), default=(1, 4))
    parser.add_argument("--sparsities", type=_list(str), default=("0.5", "0.6", "2:4", "int8-0.5", "int8-2:4"))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each product")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


def _list(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(kind(part) for part in text.split(","))


if __name__ == "__main__":
    main()
