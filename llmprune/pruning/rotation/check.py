"""Compare the logits of a rotated checkpoint with those of the dense one."""

import torch
from torch import Tensor

from llmprune.errors import NumericsError
from llmprune.measuring.perplexity import run_stream
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.progress import Watcher
from llmprune.pruning.rotation.report import LogitComparison
from llmprune.stream.stream import StreamSettings
from llmprune.stream.variants import kl_divergence

# How many sequences are compared, and how much of each.
_SAMPLES, _LENGTH = 4, 256

# A rotation rounds every weight anew. The differences of the logits are larger than those of a single rounding, because
# they pass many layers, but of its order; below float32's own noise nothing is measured.
_ROUNDINGS, _NOISE = 8, 1e-3


def compare_logits(
    dense: CheckpointSource, rotated: CheckpointSource, ids: Tensor, settings: StreamSettings, watch: Watcher
) -> LogitComparison:
    """Compare the logits of two checkpoints on the first tokens of some samples.

    Args:
        dense: computed in float32 or wider.
        rotated: likewise.
        ids: tokens [samples, length].
        settings: of both streams.
        watch: told about each layer.

    Raises:
        NumericsError: they differ by more than the rounding of the stored weights explains.
    """
    ids = ids[:_SAMPLES, :_LENGTH]
    streams = [
        run_stream(source, ids, settings, watch, f"logits, {name}")
        for source, name in ((dense, "dense"), (rotated, "rotated"))
    ]
    divergence, largest = 0.0, 0.0
    squares = torch.zeros(2, dtype=torch.float64)
    pairs = (stream.logits(stream.hidden) for stream in streams)
    for (_, (one,)), (_, (other,)) in zip(*pairs, strict=True):
        divergence += kl_divergence(one.float().log_softmax(-1), other.float().log_softmax(-1))
        before, after = (logits.double() - logits.double().mean(-1, keepdim=True) for logits in (one, other))
        difference = after - before
        largest = max(largest, float(difference.abs().max()))
        squares += torch.stack([difference.square().sum(), before.square().sum()]).cpu()
    relative = float((squares[0] / squares[1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
    tolerance = logit_tolerance(dense)
    if not relative <= tolerance:
        raise NumericsError(
            f"the logits of the rotated checkpoint differ from the dense ones by {relative:.2%} (root mean square)",
            expected=f"at most {tolerance:.2%}, for the rounding of the stored weights",
            fix="prune this model without a rotation, and report its id as a bug",
        )
    return LogitComparison(ids.numel(), divergence / ids.numel(), largest, relative, tolerance)


def logit_tolerance(source: CheckpointSource) -> float:
    """By how much, relatively, rounding the weights to a checkpoint's least precise dtype may change its logits."""
    floats = {stored.dtype for stored in source.stored.values() if stored.dtype.is_floating_point}
    return max(_ROUNDINGS * max(torch.finfo(dtype).eps for dtype in floats), _NOISE)
