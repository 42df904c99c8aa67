"""The 2:4 linear for few tokens (decode) on sparse tensor cores: memory-bound, so weights are read once, in wide loads.

A program takes `row_tiles` tiles of 16 rows; the steps of 256 inputs are distributed cyclically over its warps and
those of the other splits. Each lane streams its part of `a` and `e` from memory directly into registers (see
`fragments` for the order): as soon as a register has been used, the load of its next content is issued, so that 4 KiB
per warp are always in flight and no second buffer is needed. Shared memory is used once, to add up the warps.

Only in the last round can a warp have fewer than 256 inputs: there, weights are read again from the last step and
activations are zero. The other rounds need no masks. The order of every sum is fixed.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..splits import add_splits
from .fragments import INPUTS, ROWS, TOKENS, check_fragments
from .mma_sp import exchange, mma_sp

HIGHEST_TOKENS = 64
HIGHEST_SPLITS = 8

# Groups of 8 tokens -> (warps, row_tiles) to choose from. The tests compile each and count its instructions, so the
# list is short. 16 warps, and 4 groups with (8, 2) or (4, 4), are left out: they spill on compute capability 8.0.
CHOICES = {
    1: ((4, 1), (8, 1), (4, 2), (8, 2)),
    2: ((8, 1), (4, 2), (8, 2)),
    4: ((8, 1), (4, 2)),
    8: ((8, 1), (4, 2)),
}

# Up to this many groups, lanes bring activations into fragment order as they load them: 16 instructions per load, but
# no separate launch, which takes as long as reading some megabytes of weights. With more groups a launch is cheaper.
EXCHANGED_GROUPS = tl.constexpr(2)

_HALF = {torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True, slots=True)
class DecodeConfiguration:
    """How the work is divided; all configurations give the same result up to rounding.

    Attributes:
        warps: warps of a program, over which the steps of 256 inputs are distributed cyclically.
        row_tiles: tiles of 16 rows of a program; activations are read once for all of them.
        splits: programs that share the steps of the same rows, in [1, 8]; more than one costs a second, small launch.
    """

    warps: int
    row_tiles: int
    splits: int = 1


def token_groups(tokens: int) -> int:
    """The groups of 8 tokens that the kernel is compiled for: 1, 2, 4 or 8; the missing ones are padding."""
    return 1 if tokens <= TOKENS else triton.next_power_of_2(triton.cdiv(tokens, TOKENS))


def choose_default(out_features: int, in_features: int, tokens: int, sm_count: int) -> DecodeConfiguration:
    """A configuration by rule of thumb, for shapes that were not measured.

    The most row tiles, up to the groups of tokens (fewer read activations too often), and then the fewest warps that
    still give each multiprocessor 12 warps, with 48 KiB in flight; splits only if multiprocessors would be idle.
    """
    steps, groups = triton.cdiv(in_features, INPUTS), token_groups(tokens)

    def busy(choice: tuple[int, int]) -> int:
        return triton.cdiv(out_features, ROWS * choice[1]) * min(choice[0], steps)

    choices = sorted((c for c in CHOICES[groups] if c[1] <= groups), key=lambda choice: (-choice[1], choice[0]))
    warps, row_tiles = next((c for c in choices if busy(c) >= 12 * sm_count), max(choices, key=busy))
    programs = triton.cdiv(out_features, ROWS * row_tiles)
    return DecodeConfiguration(warps, row_tiles, max(min(sm_count // programs, steps // warps, HIGHEST_SPLITS), 1))


def workspace_bytes(tokens: int, out_features: int, in_features: int, configuration: DecodeConfiguration) -> int:
    """The memory that a call needs in addition to its output: activations in fragment order, partial sums of splits."""
    return 4 * sum(_workspace_words(tokens, out_features, in_features, configuration))


def linear_24_decode(
    x: Tensor,
    a: Tensor,
    e: Tensor,
    bias: Tensor | None,
    out_features: int,
    configuration: DecodeConfiguration,
    workspace: Tensor | None = None,
) -> Tensor:
    """Multiply up to 64 tokens by the transpose of a 2:4 matrix in fragment order, and add the bias.

    Launches one kernel, another before it above 16 tokens, and another after it with splits. Bit-identical every time.

    Args:
        x: [tokens, in], bfloat16 or float16 like the weights, contiguous; tokens in [1, 64], in a multiple of 8.
        a: weights as `to_fragments` returns them.
        e: metadata as `to_fragments` returns them.
        bias: [out], floating point, contiguous, or None.
        out_features: rows without padding; for fused matrices their sum.
        configuration: one of `CHOICES` for these tokens.
        workspace: float32, contiguous, of at least `workspace_bytes`, on the device of x; its contents do not matter
            and are overwritten. None allocates it if needed.

    Returns:
        [tokens, out], the dtype of x.

    Raises:
        ValueError: a shape, dtype, alignment or configuration that the kernel does not support. Memory that is not
            16-byte aligned would not fail but give wrong sums, so it is refused.
    """
    tokens, in_features = x.shape
    _check(x, a, e, bias, out_features, configuration)
    splits, groups = configuration.splits, token_groups(tokens)
    fragments, partials = _workspace(tokens, out_features, in_features, configuration, workspace, x)
    words = x.view(torch.int32) if groups <= EXCHANGED_GROUPS.value else activation_fragments(x, groups, fragments)
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(out_features, ROWS * configuration.row_tiles), splits)
    _decode_kernel[grid](
        words, a, e, bias if splits == 1 else None, y if splits == 1 else partials,
        tokens, out_features, in_features // 8,
        HALF=_HALF[x.dtype], GROUPS=groups, ROW_TILES=configuration.row_tiles, WARPS=configuration.warps, SPLITS=splits,
        num_warps=configuration.warps, num_stages=1,
    )  # fmt: skip
    if splits > 1:
        add_splits(partials, bias, y, splits)
    return y


def activation_fragments(x: Tensor, groups: int, out: Tensor | None = None) -> Tensor:
    """Bring x [tokens, in], 16-bit, contiguous, into fragment order: int32 [groups, steps, 8, 32, 4], zero padded.

    `groups` of 8 tokens hold at least the tokens of x; `out` is contiguous int32 of that many elements, or None.
    """
    tokens, inputs = x.shape
    steps = triton.cdiv(inputs, INPUTS)
    if out is None:
        out = torch.empty(groups * steps * 1024, dtype=torch.int32, device=x.device)
    _activation_kernel[(steps, groups)](x.view(torch.int32), out, tokens, inputs // 2)
    return out.view(groups, steps, 8, 32, 4)


@triton.jit(do_not_specialize=["tokens"])
def _decode_kernel(
    x, a, e, bias, y, tokens, rows, eighths, HALF: tl.constexpr,
    GROUPS: tl.constexpr, ROW_TILES: tl.constexpr, WARPS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    # The number of products whose weights are in flight, so that all row tiles together have 4 KiB per warp in flight.
    AHEAD: tl.constexpr = 8 // ROW_TILES
    first_tile = tl.program_id(0) * ROW_TILES
    steps = tl.cdiv(eighths, 32)
    thread = tl.arange(0, 32 * WARPS)[:, None]
    place = (thread % 32) * 4 + tl.arange(0, 4)[None, :]
    step = tl.program_id(1) * WARPS + thread // 32
    sums = ()
    for _ in tl.static_range(ROW_TILES * GROUPS):
        sums += (tl.zeros((32 * WARPS, 4), tl.float32),)
    kept = tl.minimum(step, steps - 1)
    meta = _load(_tiles(e, first_tile, rows, steps * 128, kept * 128 + place, ROW_TILES), 0)
    here = _tiles(a, first_tile, rows, steps * 1024, kept * 1024 + place, ROW_TILES)
    ahead = ()
    for product in tl.static_range(AHEAD):
        ahead += (_load(here, product * 128),)
    for _ in range(1, tl.cdiv(steps, SPLITS * WARPS)):
        inputs = _inputs(x, step, thread, place, tokens, eighths, GROUPS)
        step += SPLITS * WARPS
        kept = tl.minimum(step, steps - 1)
        upcoming = _tiles(a, first_tile, rows, steps * 1024, kept * 1024 + place, ROW_TILES)
        next_meta = _load(_tiles(e, first_tile, rows, steps * 128, kept * 128 + place, ROW_TILES), 0)
        for product in tl.static_range(8):
            activations = _activations(inputs, None, product)
            sums = _multiply(ahead[0], meta, activations, sums, product, HALF)
            if product + AHEAD < 8:
                ahead = ahead[1:] + (_load(here, (product + AHEAD) * 128),)  # noqa: RUF005 - Triton does not unpack
            else:
                ahead = ahead[1:] + (_load(upcoming, (product + AHEAD - 8) * 128),)  # noqa: RUF005
        meta = next_meta
        here = upcoming
    inputs = _inputs(x, step, thread, place, tokens, eighths, GROUPS)
    left = eighths - step * 32 - thread % 4 if GROUPS <= EXCHANGED_GROUPS else tl.where(step < steps, 32, 0)
    for product in tl.static_range(8):
        activations = _activations(inputs, left, product)
        sums = _multiply(ahead[0], meta, activations, sums, product, HALF)
        ahead = ahead[1:]
        if product + AHEAD < 8:
            ahead += (_load(here, (product + AHEAD) * 128),)
    for tile in tl.static_range(ROW_TILES):
        for group in tl.static_range(GROUPS):
            total = tl.sum(sums[tile * GROUPS + group].reshape(WARPS, 32, 4), axis=0)
            _store(total, bias, y, first_tile + tile, group, tokens, rows)


@triton.jit
def _tiles(fragments, first_tile, rows, size, offset, ROW_TILES: tl.constexpr):
    """Pointers into the row tiles; tiles beyond the last one read the last one again, and are not stored."""
    pointers = ()
    for tile in tl.static_range(ROW_TILES):
        index = tl.minimum(first_tile + tile, tl.cdiv(rows, 16) - 1)
        pointers += (fragments + index.to(tl.int64) * size + offset,)
    return pointers


@triton.jit
def _load(pointers, offset):
    loaded = ()
    for tile in tl.static_range(len(pointers)):
        loaded += (tl.load(pointers[tile] + offset, eviction_policy="evict_first"),)
    return loaded


@triton.jit
def _inputs(x, step, thread, place, tokens, eighths, GROUPS: tl.constexpr):
    """Pointers to the activations of a step's first product, one per group: into x itself, or into its fragments."""
    pointers = ()
    for group in tl.static_range(GROUPS):
        if GROUPS <= EXCHANGED_GROUPS:
            # A lane reads 8 inputs of its token and exchanges them later; padding tokens repeat the last one.
            token = tl.minimum(group * 8 + thread % 32 // 4, tokens - 1)
            pointers += (x + (token * eighths + step * 32) * 4 + place % 16,)
        else:
            pointers += (x + (group * tl.cdiv(eighths, 32) + step) * 1024 + place,)
    return pointers


@triton.jit
def _activations(inputs, left, PRODUCT: tl.constexpr):
    """The activations of a product; `left` counts how many groups of 8 inputs remain, None if all of them do."""
    loaded = ()
    for group in tl.static_range(len(inputs)):
        pointer = inputs[group] + PRODUCT * (16 if len(inputs) <= EXCHANGED_GROUPS else 128)
        words = tl.load(pointer) if left is None else tl.load(pointer, mask=left > PRODUCT * 4, other=0)
        loaded += (exchange(words) if len(inputs) <= EXCHANGED_GROUPS else words,)
    return loaded


@triton.jit
def _multiply(weights, meta, inputs, sums, PRODUCT: tl.constexpr, HALF: tl.constexpr):
    added = ()
    for tile in tl.static_range(len(meta)):
        for group in tl.static_range(len(inputs)):
            added += (
                mma_sp(weights[tile], meta[tile], inputs[group], sums[tile * len(inputs) + group], PRODUCT, HALF),
            )
    return added


@triton.jit
def _store(total, bias, y, tile, group, tokens, rows):
    """Write a tile of 16 rows by 8 tokens, in the order in which a warp holds it: [32 lanes, 4]."""
    lane = tl.arange(0, 32)[:, None]
    word = tl.arange(0, 4)[None, :]
    row = tile * 16 + lane // 4 + 8 * (word // 2)
    token = group * 8 + 2 * (lane % 4) + word % 2
    inside = (token < tokens) & (row < rows)
    if bias is not None:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    position = (tl.program_id(1) * tokens + token) * rows + row
    tl.store(y + position, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _activation_kernel(x, fragments, tokens, width):
    """One program per step and group of 8 tokens; x as int32 [tokens, width]."""
    step, group = tl.program_id(0), tl.program_id(1)
    position = tl.arange(0, 1024)
    product, lane, word = position // 128, position // 4 % 32, position % 4
    token = group * 8 + lane // 4
    column = step * 128 + product * 16 + word * 4 + lane % 4
    words = tl.load(x + token * width + column, mask=(token < tokens) & (column < width), other=0)
    tl.store(fragments + (group * tl.num_programs(0) + step) * 1024 + position, words)


def _workspace_words(
    tokens: int, out_features: int, in_features: int, configuration: DecodeConfiguration
) -> tuple[int, int]:
    """Words of 4 bytes for activations in fragment order and for partial sums."""
    groups, splits = token_groups(tokens), configuration.splits
    fragments = groups * triton.cdiv(in_features, INPUTS) * 1024 if groups > EXCHANGED_GROUPS.value else 0
    return fragments, splits * tokens * out_features if splits > 1 else 0


def _workspace(
    tokens: int,
    out_features: int,
    in_features: int,
    configuration: DecodeConfiguration,
    workspace: Tensor | None,
    x: Tensor,
) -> tuple[Tensor, Tensor]:
    fragments, partials = _workspace_words(tokens, out_features, in_features, configuration)
    needed = fragments + partials
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.float32, device=x.device)
    if workspace.dtype != torch.float32 or workspace.numel() < needed or not workspace.is_contiguous():
        raise ValueError(
            f"workspace {list(workspace.shape)} of {workspace.dtype}; expected at least {needed} of float32, contiguous"
        )
    _check_alignment("workspace", workspace)
    flat = workspace.view(-1)
    return flat[:fragments].view(torch.int32), flat[fragments:needed]


def _check(
    x: Tensor, a: Tensor, e: Tensor, bias: Tensor | None, out_features: int, configuration: DecodeConfiguration
) -> None:
    tokens, in_features = x.shape
    if x.dtype not in _HALF or not x.is_contiguous():
        raise ValueError(f"x of {x.dtype} with strides {x.stride()}; expected bfloat16 or float16, contiguous")
    if not 1 <= tokens <= HIGHEST_TOKENS:
        raise ValueError(f"{tokens} tokens; the decode kernel accepts 1 to {HIGHEST_TOKENS}")
    check_fragments(a, e, out_features, in_features)
    if bias is not None and (bias.shape != (out_features,) or not bias.is_contiguous()):
        raise ValueError(f"bias {list(bias.shape)}; expected [{out_features}], contiguous")
    choice = (configuration.warps, configuration.row_tiles)
    if choice not in CHOICES[token_groups(tokens)] or not 1 <= configuration.splits <= HIGHEST_SPLITS:
        raise ValueError(
            f"{configuration} for {tokens} tokens; expected splits in [1, {HIGHEST_SPLITS}] and (warps, row_tiles) "
            f"among {CHOICES[token_groups(tokens)]}"
        )
    for name, tensor in (("x", x), ("a", a), ("e", e), ("bias", bias)):
        if tensor is not None:
            _check_alignment(name, tensor)


def _check_alignment(name: str, tensor: Tensor) -> None:
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name} starts at address {tensor.data_ptr():#x}; expected a multiple of 16 bytes")
