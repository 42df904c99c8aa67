"""The block sparsity from which a device multiplies stored blocks faster than the dense matrix.

    python -m llmprune.eval.bench.blocks --shape 4096x4096 --tokens 1,64 --json blocks.json

For CPUs, `CPU_BLOCK_SPARSITY` in llmprune/serving/forms.py is based on it. Weights are random, in bfloat16, with the
same number of blocks in every block row; a matmul with a wrong result is not timed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from llmprune.devices import resolve_device
from llmprune.eval.bench.gpu_plan import Plan
from llmprune.eval.bench.gpu_products import build_layer, random_blocks
from llmprune.measuring.bench.machine import commit, device_name, measure_rates, versions
from llmprune.measuring.bench.products import compare_product
from llmprune.storage.files import write_json
from llmprune.timing import Effort


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every combination, print it, and write JSON."""
    args = _parse(arguments)
    device = resolve_device(args.device)
    # A rehearsal uses the packed form, so that blocks are multiplied even where a model would be served dense.
    plan = replace(Plan(), device=device, effort=Effort(args.seconds), rehearsal=True)
    rates = measure_rates(device, torch.bfloat16, plan.effort)
    rows = []
    for block in args.blocks:
        for sparsity in args.sparsities:
            layer = build_layer(*random_blocks(args.shape, block, sparsity, True, device), plan)
            for row in compare_product([layer], args.tokens, rates, plan.effort):
                rows.append({"block": block, "sparsity": sparsity, **row.to_dict()})
                times = [f"{name} {rows[-1][name]['median_us']:,.1f} us" for name in ("dense", "sparse") if row.ratio]
                print(f"{sparsity:.0%} of {block}x{block}, {row.tokens} tokens: {', '.join(times)}, {row.ratio}x")
    if args.json:
        header = {"device": device_name(device), "versions": versions(), "commit": commit(), "shape": args.shape}
        write_json(args.json, {**header, "rates": rates.to_dict(), "rows": rows})


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split("x"))), default=(4096, 4096))
    parser.add_argument("--tokens", type=_list(int), default=(1, 64))
    parser.add_argument("--blocks", type=_list(int), default=(16, 32, 64, 128))
    parser.add_argument("--sparsities", type=_list(float), default=(0.5, 0.7, 0.8, 0.85, 0.9, 0.95))
    parser.add_argument("--seconds", type=float, default=0.5, help="for each timing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


def _list(kind: type):
    return lambda text: tuple(kind(part) for part in text.split(","))


if __name__ == "__main__":
    main()
