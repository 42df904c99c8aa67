"""How the kernel divides the work: a default from a rule, which measurement may improve on."""

from dataclasses import dataclass

# The block sizes that the kernel accepts, rows = columns.
BLOCKS = (16, 32, 64, 128)

# Up to this many tokens the time is bound by the bytes of the weights ("decode"), above by arithmetic ("prefill").
DECODE_TOKENS = 64

# Decode: programs to keep on each multiprocessor, and the fewest steps that are worth a separate program.
_PROGRAMS = 4
_STEPS = 4


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to divide the work; the names are also the keys of a measured choice.

    Attributes:
        rows: outputs of a tile; divides the block size.
        tokens: tokens of a tile, a power of two >= 8.
        step: inputs per iteration, a power of two >= 16; divides the block size or is a multiple of it.
        splits: programs that share the blocks of a row, >= 1.
        group: row tiles that go through all tokens before the next ones start, >= 1.
        warps: warps of a program, a power of two.
        stages: steps in flight, >= 1.
    """

    rows: int
    tokens: int
    step: int
    splits: int = 1
    group: int = 16
    warps: int = 4
    stages: int = 4

    def check(self, block: int) -> None:
        """Raise `ValueError` if blocks of this size cannot be divided this way."""
        powers = (self.rows, self.tokens, self.step, self.warps)
        if any(size < 1 or size & (size - 1) for size in powers) or self.tokens < 8 or min(self.rows, self.step) < 16:
            raise ValueError(f"{self}: expected powers of two, tokens >= 8, rows and step >= 16")
        if min(self.splits, self.group, self.stages) < 1:
            raise ValueError(f"{self}: expected at least one split, group and stage")
        if self.rows > block:
            raise ValueError(f"{self}: expected at most {block} rows, for blocks of {block} x {block}")

    def shared_bytes(self, itemsize: int) -> int:
        """The shared memory of the steps in flight, for weights of `itemsize` bytes."""
        return self.stages * self.step * (self.rows + self.tokens) * itemsize


def choose_default(
    tokens: int, out_features: int, block: int, blocks: int, itemsize: int, processors: int, shared_bytes: int
) -> Configuration:
    """Choose a configuration by rule, without measurement.

    Args:
        tokens: rows of x, >= 1.
        out_features: rows of the weight matrix.
        block: the block size.
        blocks: the number of stored blocks.
        itemsize: bytes of a weight.
        processors: multiprocessors of the GPU.
        shared_bytes: the shared memory that one program may use, in bytes.
    """
    if itemsize > 2:
        # No tensor cores: small tiles, whose sums fit in registers.
        rows, tile, step, warps = min(block, 32), 16 if tokens <= 16 else 32, 32, 4
    elif tokens <= DECODE_TOKENS:
        rows, tile, step = min(block, 64), max(16, 1 << (tokens - 1).bit_length()), 64
        warps = 2 if rows < 64 else 4
    else:
        # The bytes read per multiplication are proportional to 1 / rows + 1 / tokens, and the block size limits the
        # rows: take many tokens.
        rows, step = block, 64
        tile = 256 if tokens > 128 and block >= 64 and shared_bytes >= 160 << 10 else 128
        warps = 8 if rows * tile > 64 * 128 else 4
    splits = 1
    if tokens <= DECODE_TOKENS:
        steps = max(1, blocks * block * block // (out_features * step))
        tiles = out_features // rows * -(-tokens // tile)
        splits = max(1, min(-(-_PROGRAMS * processors // tiles), steps // _STEPS))
        # Shares are rounded up to whole steps: drop the splits that would get none.
        splits = -(-steps // -(-steps // splits))
    stages = max(2, min(4, shared_bytes // (step * (rows + tile) * itemsize)))
    return Configuration(rows, tile, step, splits, warps=warps, stages=stages)
