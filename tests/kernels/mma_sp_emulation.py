"""What Triton's interpreter lacks for the 2:4 kernels, in numpy: their inline assembly, and rounding to bfloat16.

The product follows the fragment figures of the PTX ISA and knows nothing of how the kernels pack their operands; the
exchange between lanes is executed from its text.
"""

import re
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_MMA = re.compile(
    r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(bf16|f16)\.\1\.f32 "
    r"\{\$0,\$1,\$2,\$3\}, \{\$4,\$5,\$6,\$7\}, \{\$12,\$13,\$14,\$15\}, \{\$16,\$17,\$18,\$19\}, \$(\d+), ([01]);"
)


def install(monkeypatch) -> None:
    """Teach the interpreter for the duration of a test."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", _inline_asm)
    truncating = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        return truncating(self, source, target)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)


def _inline_asm(self, assembly, constraints, values, types, is_pure, pack):
    assert pack == 4
    operands = [np.ascontiguousarray(value.data) for value in values]
    assert all(operand.shape[1:] == (4,) and len(operand) % 32 == 0 for operand in operands)
    if match := _MMA.fullmatch(assembly):
        word, selector = int(match[2]) - 8, int(match[3])
        a, e, x, sums = operands
        result = interpreter.TensorHandle(mma_sp(a, e[:, word], x, sums, selector, match[1]), tl.float32)
    else:
        result = interpreter.TensorHandle(execute(assembly, operands[0]), tl.int32)
    return SimpleNamespace(get_result=lambda index: result)


def mma_sp(a, e, x, sums, selector: int, kind: str):
    """mma.sp.m16n8k32 for each warp: a, x int32 and sums float32 [32 * warps, 4], e int32 [32 * warps]."""
    # (warp, g, t, column half, row half, pair) -> rows g + 8 * row half, kept columns 8 * column half + 2t + pair
    kept = _floats(a, kind).reshape(-1, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 8, 2)
    # The two lanes that the selector names hold 16 columns each: 16 bits for row g, 16 for row g + 8.
    bits = e.view(np.uint32).reshape(-1, 8, 2, 2)[:, :, selector]
    bits = (bits[..., None] >> np.array([0, 16], np.uint32)) & 0xFFFF
    nibbles = (bits[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
    nibbles = nibbles.transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)
    places = np.stack([nibbles & 3, nibbles >> 2], -1).astype(np.int64)
    assert (places[..., 0] < places[..., 1]).all(), "ordered_metadata needs two distinct places in ascending order"
    dense = np.zeros((*kept.shape[:3], 4), np.float32)
    np.put_along_axis(dense, places, kept, -1)
    # (warp, token, t, i, pair) -> inputs 8i + 2t + pair
    inputs = _floats(x, kind).reshape(-1, 8, 4, 4, 2).transpose(0, 3, 2, 4, 1).reshape(-1, 32, 8)
    # (warp, g, t, row half, pair) <- rows g + 8 * row half, tokens 2t + pair
    with np.errstate(invalid="ignore"):
        product = (dense.reshape(-1, 16, 32) @ inputs).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)
        return sums + product.reshape(sums.shape)


def execute(assembly: str, words):
    """Run straight-line PTX on every lane: int32 [32 * warps, 4] in $4..$7, and the same out of $0..$3."""
    lanes = np.arange(len(words)) % 32
    registers = {f"${4 + i}": words[:, i].astype(np.int64) for i in range(4)} | {"%laneid": lanes}

    def value(name: str):
        return registers[name] if name in registers else int(name)

    for statement in filter(None, (part.strip(" {}") for part in assembly.split(";"))):
        operation, _, rest = statement.partition(" ")
        names = [name.strip() for name in rest.split(",")]
        if operation == ".reg":
            continue
        target, *sources = [names[0], *map(value, names[1:])]
        match operation:
            case "mov.u32" | "mov.b32":
                registers[target] = sources[0]
            case "and.b32":
                registers[target] = sources[0] & sources[1]
            case "setp.ne.u32":
                registers[target] = sources[0] != sources[1]
            case "selp.b32":
                registers[target] = np.where(sources[2], sources[0], sources[1])
            case "shfl.sync.bfly.b32":
                assert sources[2:] == [31, -1], "all lanes take part"
                registers[target] = sources[0][np.arange(len(words)) ^ sources[1]]
            case _:
                raise NotImplementedError(statement)
    return np.stack([registers[f"${i}"] for i in range(4)], -1).astype(np.int32)


def _floats(words, kind: str):
    """The two halves of each word, the lower first, as float32."""
    halves = words.view(np.uint16)
    return (halves.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else halves.view(np.float16).astype("f4")


def _to_bfloat16(data):
    """Round to nearest, ties to even; the interpreter cuts the lower half off instead."""
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)
