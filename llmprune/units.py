"""Sizes, durations and other figures in words."""

import math
from collections.abc import Sequence


def spans(numbers: Sequence[int]) -> str:
    """Write ascending numbers with consecutive ones joined: "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def quantity(count: float, noun: str, plural: str | None = None) -> str:
    """A number of things in words: "1 batch", "2,000 batches", "0.5 epochs"."""
    shown = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{shown} {noun if count == 1 else plural or noun + 's'}"


def format_seconds(value: float) -> str:
    """Seconds to about three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def format_change(dense: float, pruned: float) -> str:
    """A perplexity before and after: "47.84 -> 92.39 (x1.93)", without a factor where one of them is not finite."""
    factor = f" (x{pruned / dense:.2f})" if math.isfinite(dense) and math.isfinite(pruned) else ""
    return f"{dense:,.2f} -> {pruned:,.2f}{factor}"


def factor_stderr(dense: float, pruned: float, change_stderr: float | None) -> str:
    """The standard error of the factor between two perplexities (delta method); empty if it is unknown.

    Args:
        dense: the perplexity before.
        pruned: the perplexity after.
        change_stderr: standard error of the difference in nats, paired.
    """
    if change_stderr is None or not (math.isfinite(dense) and math.isfinite(pruned)):
        return ""
    return f"{pruned / dense * change_stderr:.2g}"


def format_size(nbytes: float) -> str:
    """Bytes in powers of 1,000."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    power = min(int(math.log10(nbytes)) // 3, 4)
    return f"{nbytes / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
