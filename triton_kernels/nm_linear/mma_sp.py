"""Sparse tensor cores from Triton: two operations that Triton does not provide, as inline assembly.

`tl.inline_asm_elementwise(pack=4)` passes each thread four elements of every operand. For operands [32 * warps, 4] in a
layout that gives each thread one row, these are the four registers of a fragment, and the row within the warp is the
lane. Triton chooses that layout by itself if every load is 16 bytes wide and known to be aligned, which cannot be
checked here; `tests/kernels/test_nm_sass.py` checks it in the compiled code.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _mma_sp_assembly(product, half):
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{half}.{half}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$12,$13,$14,$15}, {$16,$17,$18,$19}, "
        f"${8 + product // 2}, {product % 2};"
    )


@triton.jit
def mma_sp(a, e, x, sums, PRODUCT: tl.constexpr, HALF: tl.constexpr):
    """Add product PRODUCT (0..7) of a step to the sums; a, e, x int32 and sums float32 [32 * warps, 4].

    HALF is the type of the pairs in a and x: "bf16" or "f16".
    """
    return tl.inline_asm_elementwise(
        asm=_mma_sp_assembly(PRODUCT, HALF),
        constraints="=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f",
        args=[a, e, x, sums],
        dtype=tl.float32,
        is_pure=True,
        pack=4,
    )


@triton.constexpr_function
def _exchange_assembly():
    """Two butterfly exchanges: swap the halves of the quad's 4 x 4 words, then the words inside each quarter."""
    lines = ["mov.u32 t, %laneid;", "and.b32 u, t, 2;", "setp.ne.u32 p2, u, 0;"]
    lines += ["and.b32 u, t, 1;", "setp.ne.u32 p1, u, 0;"]
    lines += [f"mov.b32 w{i}, ${4 + i};" for i in range(4)]
    for distance, pairs in ((2, ((0, 2), (1, 3))), (1, ((0, 1), (2, 3)))):
        for low, high in pairs:
            lines += [
                f"selp.b32 u, w{low}, w{high}, p{distance};",
                f"shfl.sync.bfly.b32 u, u, {distance}, 31, -1;",
                f"selp.b32 w{low}, u, w{low}, p{distance};",
                f"selp.b32 w{high}, w{high}, u, p{distance};",
            ]
    lines += [f"mov.b32 ${i}, w{i};" for i in range(4)]
    return "{ .reg .pred p1, p2; .reg .b32 t, u, w0, w1, w2, w3; " + " ".join(lines) + " }"


@triton.jit
def exchange(words):
    """Transpose the 4 x 4 words of every four lanes, int32 [32 * warps, 4]: lane t gets word t of each lane."""
    return tl.inline_asm_elementwise(
        asm=_exchange_assembly(),
        constraints="=r,=r,=r,=r,r,r,r,r",
        args=[words],
        dtype=tl.int32,
        is_pure=True,
        pack=4,
    )
