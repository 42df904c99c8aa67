"""Scores of groups of channels: pure functions of their weights and statistics; the lowest scores are removed.

A channel is a column of every matrix given here: matrices that write it (gate_proj, q_proj, ...) are transposed, so
that channels come last, and matrices that read it (down_proj, o_proj) are not. The channels of a matrix are split into
`groups` runs of equal length, which may differ between matrices: with grouped-query attention, a KV group has the
columns of several query heads in o_proj and the rows of one head in v_proj.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmprune.errors import PatternError
from llmprune.patterns import keep_highest
from llmprune.statistics import check_finite

# Outputs are known this well, as a fraction of their variance: what determines one would have infinite information.
_NOISE = 1e-6


@dataclass(frozen=True, slots=True)
class Channels:
    """Weights, statistics and gradients of the channels of one layer; `NEEDS` lists what each score reads.

    Attributes:
        groups: number of groups into which the channels are split, >= 1.
        matrices: all weights that belong to the channels, each [*, channels].
        reading: the matrix that multiplies the activations, [out, channels].
        tokens: number of calibration tokens in the sums, >= 1.
        sums: [channels], sum over tokens of the activation.
        squares: [channels], sum over tokens of its square.
        active: [channels], number of tokens with an activation above zero.
        products: [channels, channels], sum over tokens of the products of two activations.
        gradients: of the loss, averaged over samples; one [*, channels] for each of `matrices`.
        squared_gradients: their squares, averaged over samples; one [*, channels] for each of `matrices`.
        gains: of the norms applied to the channels, each [channels].
    """

    groups: int
    matrices: Sequence[Float[Tensor, "_ _"]] = ()
    reading: Float[Tensor, "out channels"] | None = None
    tokens: int = 1
    sums: Float[Tensor, " channels"] | None = None
    squares: Float[Tensor, " channels"] | None = None
    active: Float[Tensor, " channels"] | None = None
    products: Float[Tensor, "channels channels"] | None = None
    gradients: Sequence[Float[Tensor, "_ _"]] = ()
    squared_gradients: Sequence[Float[Tensor, "_ _"]] = ()
    gains: Sequence[Float[Tensor, " channels"]] = ()


def magnitude_l1(channels: Channels) -> Float[Tensor, " groups"]:
    """Sum of |w| over the group's weights (Li et al., arXiv 1608.08710)."""
    return _total(channels, [matrix.abs() for matrix in channels.matrices])


def magnitude_l2(channels: Channels) -> Float[Tensor, " groups"]:
    """Euclidean norm of the group's weights."""
    return _total(channels, [matrix.square() for matrix in channels.matrices]).sqrt()


def activation_norm(channels: Channels) -> Float[Tensor, " groups"]:
    """Root of the sum over the group of mean_t x_tj^2 (the channel importance of Minitron, arXiv 2407.14679)."""
    return _grouped(_mean_squares(channels), channels.groups).sqrt()


def activation_frequency(channels: Channels) -> Float[Tensor, " groups"]:
    """Mean over the group of the fraction of tokens with x_tj > 0, for ReLU-like units (arXiv 1607.03250)."""
    assert channels.active is not None, "the activation frequency needs counts of active tokens"
    frequency = channels.active.double() / channels.tokens
    return _grouped(frequency, channels.groups) * channels.groups / len(frequency)


def wanda(channels: Channels) -> Float[Tensor, " groups"]:
    """Sum over the group of |W_ij| sqrt(mean_t x_tj^2) (Wanda-sp of arXiv 2312.11983)."""
    weights = _reading(channels).abs().sum(0, dtype=torch.float64)
    return _grouped(weights * _mean_squares(channels).sqrt(), channels.groups)


def channel_norm(channels: Channels) -> Float[Tensor, " groups"]:
    """Root of the sum over the group of ||W_:j||^2 mean_t x_tj^2: the output error if channels are uncorrelated."""
    energy = _reading(channels).square().sum(0, dtype=torch.float64)
    return _grouped(energy * _mean_squares(channels), channels.groups).sqrt()


def fluctuation(channels: Channels) -> Float[Tensor, " groups"]:
    """Sum over the group of Var_t(x_tj) ||W_:j||^2 (FLAP, arXiv 2312.11983, equation 5)."""
    assert channels.sums is not None, "the fluctuation needs sums of the activations"
    mean = channels.sums.double() / channels.tokens
    variance = (_mean_squares(channels) - mean.square()).clamp(min=0)
    energy = _reading(channels).square().sum(0, dtype=torch.float64)
    return _grouped(variance * energy, channels.groups)


def mutual_information(channels: Channels) -> Float[Tensor, " groups"]:
    """Sum over the layer's outputs of I(x_g; y_i) in nats, x_g the group's channels and y = W x, for Gaussian inputs.

    For Gaussians I(x_g; y_i) = -log(1 - R^2) / 2, R^2 the fraction of the variance of y_i that x_g explains by linear
    regression (Gelfand and Yaglom 1957); for one channel, R is the correlation. Each output counts by itself: their
    joint information would be infinite, because y is a function of x. Choosing what shares the most information with
    the next layer's activations is MIPP's idea (arXiv 2411.00147), which estimates it without a Gaussian model.
    """
    assert channels.sums is not None, "mutual information needs sums of the activations"
    assert channels.products is not None, "mutual information needs the activations' Gram matrix"
    mean = channels.sums.double() / channels.tokens
    covariance = channels.products.double() / channels.tokens - torch.outer(mean, mean)
    weight = _reading(channels).double()
    check_finite(covariance, "the covariance of the channels")
    shared = weight @ covariance
    variance = (shared * weight).sum(1).clamp(min=0)
    size = len(mean) // channels.groups
    blocks = covariance.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    own = shared.unflatten(1, (-1, size)).permute(1, 2, 0)
    explained = (own * _regressed(blocks, own)).sum(1) / variance.clamp(min=torch.finfo(variance.dtype).tiny)
    return -0.5 * torch.log1p(-explained.clamp(0, 1 - _NOISE)).sum(1)


def taylor(channels: Channels) -> Float[Tensor, " groups"]:
    """Sum of |g w| over the group's weights (first order; LLM-Pruner, arXiv 2305.11627)."""
    pairs = zip(channels.gradients, channels.matrices, strict=True)
    return _total(channels, [(gradient * matrix).abs() for gradient, matrix in pairs])


def fisher(channels: Channels) -> Float[Tensor, " groups"]:
    """Sum of w^2 F / 2 over the group's weights, F the mean squared gradient (optimal brain damage, LeCun 1989)."""
    pairs = zip(channels.squared_gradients, channels.matrices, strict=True)
    return _total(channels, [0.5 * squared * matrix.square() for squared, matrix in pairs])


def norm_gain(channels: Channels) -> Float[Tensor, " groups"]:
    """Sum of the norms' |gains| over the group: how strongly the layers read a hidden channel."""
    return _total(channels, [gain.abs()[None] for gain in channels.gains])


SCORES: dict[str, Callable[[Channels], Tensor]] = {
    "magnitude-l1": magnitude_l1,
    "magnitude-l2": magnitude_l2,
    "activation-norm": activation_norm,
    "activation-frequency": activation_frequency,
    "wanda": wanda,
    "channel-norm": channel_norm,
    "flap": fluctuation,
    "mutual-information": mutual_information,
    "taylor": taylor,
    "fisher": fisher,
    "norm-gain": norm_gain,
}

# Fields of `Channels` that each score reads.
NEEDS: dict[str, frozenset[str]] = {
    "magnitude-l1": frozenset({"matrices"}),
    "magnitude-l2": frozenset({"matrices"}),
    "activation-norm": frozenset({"tokens", "squares"}),
    "activation-frequency": frozenset({"tokens", "active"}),
    "wanda": frozenset({"reading", "tokens", "squares"}),
    "channel-norm": frozenset({"reading", "tokens", "squares"}),
    "flap": frozenset({"reading", "tokens", "sums", "squares"}),
    "mutual-information": frozenset({"reading", "tokens", "sums", "products"}),
    "taylor": frozenset({"matrices", "gradients"}),
    "fisher": frozenset({"matrices", "squared_gradients"}),
    "norm-gain": frozenset({"gains"}),
}


def needs_gram(method: str) -> bool:
    """Whether a method reads the Gram matrix of the channels."""
    return method == "obs" or "products" in NEEDS.get(method, ())


def lowest_groups(scores: Float[Tensor, " groups"], remove: int, partitions: int = 1) -> Int[Tensor, " removed"]:
    """Pick the groups with the lowest scores; on ties, the lower index is removed.

    Args:
        scores: [groups].
        remove: number of groups to remove, in [0, groups].
        partitions: number of consecutive runs of groups, of equal length, that lose the same number.

    Returns:
        [remove], int64, ascending.

    Raises:
        PatternError: the numbers are out of range or not multiples of the partitions.
        NumericsError: a score is NaN.
    """
    if not 0 <= remove <= len(scores) or len(scores) % partitions or remove % partitions:
        raise PatternError(
            f"{remove} of {len(scores)} groups are to be removed from {partitions} partitions",
            expected="at most all groups, and multiples of the partitions",
        )
    keep = keep_highest(scores.view(partitions, -1), remove // partitions)
    return (~keep).view(-1).nonzero().view(-1)


def _reading(channels: Channels) -> Tensor:
    assert channels.reading is not None, "this score needs the matrix that reads the activations"
    return channels.reading


def _mean_squares(channels: Channels) -> Tensor:
    assert channels.squares is not None, "this score needs sums of squares of the activations"
    return channels.squares.double() / channels.tokens


def _regressed(blocks: Tensor, targets: Tensor) -> Tensor:
    """Solve blocks [groups, size, size] x = targets [groups, size, out]; channels that never vary are left out."""
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    # Relative to the group's mean variance: rounding may make the covariance of redundant channels indefinite.
    ridge = 1e-6 * diagonal.mean(1, keepdim=True).clamp(min=0)
    damped = blocks + torch.diag_embed(ridge + (diagonal <= 0).to(blocks.dtype))
    return torch.linalg.solve(damped, targets)


def _total(channels: Channels, weighed: Sequence[Tensor]) -> Tensor:
    """[groups]: the sum over all matrices [*, channels] of the values in each group."""
    assert weighed, "this score needs weights, gradients or gains"
    return torch.stack([_grouped(values.sum(0, dtype=torch.float64), channels.groups) for values in weighed]).sum(0)


def _grouped(values: Tensor, groups: int) -> Tensor:
    """[groups], float64: sums over runs of [channels]."""
    if groups < 1 or len(values) % groups:
        raise PatternError(f"{len(values)} channels in {groups} groups", expected="groups of equal size")
    sums = values.view(groups, -1).sum(1)
    check_finite(sums, "a score")
    return sums
