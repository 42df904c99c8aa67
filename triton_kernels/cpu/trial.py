"""A trial of a compiled library: what a compiler makes of the kernels is not taken on trust.

One small case of each of its functions, against float64, takes some milliseconds when a library is loaded.
"""

import torch
from torch import Tensor

from .layers import Norm, TokenLayer, Weights
from .library import KINDS, LEVELS, TYPES, Described, Library

# More than a tile of rows and a fold of columns, neither a whole number of them, and more than a step of 2:4.
_ROWS, _COLUMNS, _GROUP = 24, 132, 128

# One token alone, and blocks of 16, 8, 4, 2 and 1.
_TOKENS = (1, 31)

# Stored weights and activations.
_DTYPES = (*((dtype, dtype) for dtype in TYPES), (torch.bfloat16, torch.float32), *((torch.int8, to) for to in TYPES))


def is_right(loaded: Library) -> bool:
    """Whether all functions of a library give right results on this machine."""
    generator = torch.Generator().manual_seed(0)
    products = (
        _is_product_right(loaded, kind, stored, dtype, generator) for kind in KINDS for stored, dtype in _DTYPES
    )
    sweeps = (_is_sweep_right(loaded, group, generator) for group in (None, (2, 4)))
    halves = (_are_rows_right(loaded, dtype, generator) for dtype in (torch.bfloat16, torch.float16))
    others = (check(loaded, generator) for check in (_is_choice_right, _is_gram_right, _is_layer_right))
    return all(products) and all(halves) and all(sweeps) and all(others)


def _is_product_right(
    loaded: Library, kind: str, stored: torch.dtype, dtype: torch.dtype, generator: torch.Generator
) -> bool:
    """The rows of a random matrix, what was packed, and products."""
    kept, bits = (_bitmask if kind == "bitmask" else _pairs)(generator)
    numbers, peaks = _normal(generator, _ROWS, _COLUMNS), None
    weight = numbers = numbers.to(stored) if stored is not torch.int8 else (40 * numbers).clamp(-127, 127).to(stored)
    if stored is torch.int8:
        peaks = (_uniform(generator, _ROWS, 2) + 0.5).to(dtype)
        weight = weight.double() * peaks.double().repeat_interleave(_GROUP, 1)[:, :_COLUMNS] / 127
    values, weight = numbers[kept], (weight * kept).double()
    sizes = (_ROWS, _COLUMNS), len(values) if kind == "bitmask" else 0, 0 if peaks is None else _GROUP
    found = Described(kind, stored, *sizes, stored if peaks is None else dtype)
    packed = loaded.pack(found, bits, values, peaks, dtype)

    dense, again = torch.empty(_ROWS, _COLUMNS, dtype=found.dtype), (torch.zeros_like(bits), torch.empty_like(values))
    loaded.expand(packed, range(_ROWS), dense)
    loaded.unpack(packed, *again, None if peaks is None else torch.empty_like(peaks))
    right = _is_near(dense, weight, torch.finfo(found.dtype).eps * weight.abs())
    right = right and torch.equal(again[0], bits) and torch.equal(again[1], values)
    return right and _are_products_right(loaded, packed, weight, generator, dtype)


def _are_products_right(
    loaded: Library, packed: Tensor, weight: Tensor, generator: torch.Generator, dtype: torch.dtype
) -> bool:
    """The products of a matrix given twice, with a bias."""
    bias = _normal(generator, 2 * _ROWS).to(dtype)
    inputs = _normal(generator, _TOKENS[-1], _COLUMNS).to(dtype)
    exact = _product(inputs, weight).repeat(1, 2) + bias.double()
    # Sums are float32; for int8 weights, activations are rounded to 16 bits.
    error = 4 * torch.finfo(dtype).eps + (2**-15 if loaded.describe(packed).group else 0)
    allowed = error * (inputs.double().abs().amax() * weight.abs().sum(1).repeat(2) + bias.double().abs())
    right = True
    for tokens in _TOKENS:
        y = torch.empty(tokens, 2 * _ROWS, dtype=dtype)
        loaded.multiply([packed, packed], inputs[:tokens], bias, y)
        right = right and _is_near(y, exact[:tokens], allowed)
    return right


def _are_rows_right(loaded: Library, dtype: torch.dtype, generator: torch.Generator) -> bool:
    """Dense weights of 16 bits, with rows and columns beyond whole blocks, by one token and by three."""
    weight, bias = _normal(generator, 6, 19).to(dtype), _normal(generator, 6)
    x = _normal(generator, 3, 19)
    exact, right = _product(x, weight.double()) + bias.double(), True
    for tokens in (1, 3):
        y = torch.empty(tokens, 6, dtype=torch.float32)
        loaded.multiply_rows(weight, x[:tokens], bias, y)
        right = right and _is_near(y, exact[:tokens], 1e-5)
    return right


def _bitmask(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which weights are kept, and their mask on disk."""
    kept = _uniform(generator, _ROWS, _COLUMNS) < 0.5
    padded = torch.zeros(_ROWS, -(-_COLUMNS // 8) * 8, dtype=torch.int64)
    padded[:, :_COLUMNS] = kept
    return kept, (padded.view(_ROWS, -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)


def _pairs(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same for 2:4, and the meta on disk."""
    pairs = torch.combinations(torch.arange(4))
    chosen = pairs[torch.randint(len(pairs), (_ROWS, _COLUMNS // 4), generator=generator)]
    kept = torch.zeros(*chosen.shape[:2], 4, dtype=torch.bool).scatter_(2, chosen, True).view(_ROWS, _COLUMNS)
    codes = torch.zeros(_ROWS, -(-_COLUMNS // 8) * 2, dtype=torch.int64)
    codes[:, : chosen.shape[1]] = chosen[..., 0] | chosen[..., 1] << 2
    return kept, (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def _is_sweep_right(loaded: Library, group: tuple[int, int] | None, generator: torch.Generator) -> bool:
    """Column by column: kept weights leave no residual, and groups keep their best."""
    columns, rows = 8, 5
    upper = (_normal(generator, columns, columns) / 4 + 2 * torch.eye(columns, dtype=torch.float32)).triu()
    before, original = _normal(generator, 2, columns, rows)
    keep, importance = _uniform(generator, columns, rows) < 0.5, _uniform(generator, columns)
    errors = before.clone()
    loaded.sweep(errors, original, upper, importance, keep, group)
    residual = before.double() + _product(upper.T, errors.T.double())
    right = _is_near(residual * keep, torch.zeros_like(residual), 1e-5) and torch.equal(errors[~keep], original[~keep])
    for start in range(0, columns, group[1]) if group else ():
        part = slice(start, start + group[1])
        pending = before[part].double() + _product(upper[:start, part].T, errors[:start].T.double())
        moved = torch.linalg.solve_triangular(upper[part, part].double().T, -pending, upper=False)
        scores = (original[part] - moved).square() * importance[part, None]
        right = right and torch.equal(keep[part], _best(scores.T, group[0]).T)
    return right


def _is_choice_right(loaded: Library, generator: torch.Generator) -> bool:
    """Few values, so that some are equal."""
    scores = torch.randint(3, (40, 4), generator=generator).float()
    return torch.equal(loaded.choose(scores, 2), _best(scores, 2))


def _best(scores: Tensor, keep: int) -> Tensor:
    """By definition: weights of a row that fewer than `keep` others beat; of equal ones the later beats."""
    one, other = scores[..., None], scores[..., None, :]
    is_later = torch.ones(scores.shape[-1], scores.shape[-1], dtype=torch.bool).triu(1)
    return ((other > one) | (other == one) & is_later).sum(-1) < keep


def _is_gram_right(loaded: Library, generator: torch.Generator) -> bool:
    if LEVELS[loaded.level] != "AVX-512 with BF16":
        return True
    x, total = _normal(generator, 5, 50).bfloat16(), torch.ones(50, 50, dtype=torch.float32)
    loaded.add_gram(total, x)
    return _is_near(total.tril(), (1 + _product(x.T, x.T.double())).tril(), 1e-4)


def _is_layer_right(loaded: Library, generator: torch.Generator) -> bool:
    """Two heads that share keys and values, of which there are more than a vector, and an odd number of channels."""
    hidden, width, length, inner = 20, 18, 11, 13
    shapes = [(2 * width, hidden), *[(width, hidden)] * 2, (hidden, 2 * width), *[(inner, hidden)] * 2, (hidden, inner)]
    dense = [_normal(generator, *shape) / 4 for shape in shapes]
    gains = [_uniform(generator, size) for size in (hidden, hidden, width, width)]
    weights = [Weights(matrix, False, None, shape) for matrix, shape in zip(dense, shapes, strict=True)]
    layer = TokenLayer(loaded, weights, [Norm(gain, 1e-6) for gain in gains], width)
    x, cos, sin = (_normal(generator, 1, 1, size) for size in (hidden, width, width))
    keys, values = _normal(generator, 2, 1, 1, length, width)
    q, k, v = layer.begin(x, cos, sin)
    found = layer.attend(x, q, keys, values, 0.25)

    exact = [one.double() for one in dense]
    normal = _normalised(x[0].double(), gains[0])
    heads = [_product(normal, matrix).view(-1, width) for matrix in exact[:3]]
    turned = [_turned(_normalised(head, gain), cos[0], sin[0]) for head, gain in zip(heads, gains[2:], strict=False)]
    weighed = (_product(keys[0, 0], turned[0]).T * 0.25).softmax(-1)
    y = x[0] + _product(_product(weighed, values[0, 0].double().T).view(1, -1), exact[3])
    gate, up = (_product(_normalised(y, gains[1]), matrix) for matrix in exact[4:6])
    y = y + _product(gate * gate.sigmoid() * up, exact[6])
    pairs = ((q[0, :, 0], turned[0]), (k[0, :, 0], turned[1]), (v[0, :, 0], heads[2]), (found[0], y))
    return all(_is_near(ours, right, 1e-5 * right.abs().max()) for ours, right in pairs)


def _normalised(x: Tensor, gain: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


# The default dtype is whatever the caller has chosen: that of a model, while it is being loaded.
def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float32)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """X W^T in float64, row by row: the threads of one product would wait for each other, long on a busy machine."""
    return torch.stack([weight @ row for row in x.double()])


def _is_near(found: Tensor, exact: Tensor, allowed: Tensor | float) -> bool:
    """Whether each error is at most what is allowed; nothing that is not a number is."""
    return bool(((found.double() - exact).abs() <= allowed).all())
