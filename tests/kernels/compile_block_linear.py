"""Compile the block-sparse kernels for a GPU in the default configurations; JSON on stdout; run by the tests.

python compile_block_linear.py CAPABILITY
"""

import json
import sys
from dataclasses import asdict
from itertools import product

from compile_ahead import compile_ahead

from llmprune.kernels.block_linear import BLOCKS, choose_default
from llmprune.kernels.block_linear.kernel import _product_kernel
from llmprune.kernels.splits import BLOCK, add_splits_kernel

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
INDICES = {"crow": "*i32", "col": "*i32"}
SIZES = dict.fromkeys(("tokens", "block_rows", "block_columns", "per_row"), "i32")


def cases(capability):
    """Every kind of tile, of which other GPUs than Hopper get every other one; the rest where it may matter."""
    for number, (block, tokens) in enumerate(product(BLOCKS, (1, 64, 2048))):
        if capability == 90 or number % 2 == 0:
            yield "bf16", tokens, block, None
    yield "fp16", 20, 16, 8
    yield "fp16", 100, 64, 7
    yield "fp32", 1, 64, None
    yield "fp32", 2048, 16, None


def compiled(capability, dtype, tokens, block, per_row):
    itemsize = 4 if dtype == "fp32" else 2
    chosen = choose_default(tokens, 4096, block, 4096 * 512 // block**2, itemsize, 132, SHARED_BYTES[capability])
    whole = chosen.step <= block or (per_row is not None and per_row * block % chosen.step == 0)
    target = "*fp32" if chosen.splits > 1 else f"*{dtype}"
    arguments = dict.fromkeys(("x", "values"), f"*{dtype}") | {"y": target} | INDICES | SIZES
    constants = {
        "BLOCK": block, "ROWS": chosen.rows, "TOKENS": chosen.tokens, "STEP": chosen.step, "GROUP": chosen.group,
        "BALANCED": per_row is not None, "TAIL": not whole,
    }  # fmt: skip
    constants |= {"bias": None} if chosen.splits > 1 else {}
    arguments |= {} if chosen.splits > 1 else {"bias": f"*{dtype}"}
    found = compile_ahead(
        _product_kernel, capability, arguments, constants, warps=chosen.warps, num_stages=chosen.stages
    )
    about = {"kernel": "product", "dtype": dtype, "tokens": tokens, "block": block, "configuration": asdict(chosen)}
    return about | found


def summed(capability):
    arguments = {"partials": "*fp32", "bias": "*bf16", "y": "*bf16"}
    arguments |= dict.fromkeys(("elements", "rows", "splits"), "i32")
    return {"kernel": "sum"} | compile_ahead(add_splits_kernel, capability, arguments, {"BLOCK": BLOCK}, warps=4)


if __name__ == "__main__":
    capability = int(sys.argv[1])
    rows = [compiled(capability, *case) for case in cases(capability)]
    print(json.dumps([*rows, summed(capability)]))
