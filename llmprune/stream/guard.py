"""Turn running out of memory into an error that says where it happened, how much is needed, and how to fix it."""

import re
from collections.abc import Callable
from types import TracebackType

import torch

from llmprune.devices import is_shortage
from llmprune.errors import DeviceError
from llmprune.models.sizes import ends_bytes
from llmprune.models.source import Source
from llmprune.progress import Progress, Watcher, ignore
from llmprune.stream.stream import StreamSettings
from llmprune.stream.windows import window_positions
from llmprune.text.tokens import Tokens
from llmprune.units import format_size


class MemoryGuard:
    """Watches a run, and turns running out of memory inside its `with` block into a `DeviceError`.

    Args:
        settings: what the user can change so that the run needs less.
        watch: told about every step, after the guard.

    Attributes:
        expected: says how much the current work needs; called only when memory has run out.
        resumable: whether the run can be resumed from what was committed so far.
    """

    def __init__(self, settings: StreamSettings, watch: Watcher = ignore) -> None:
        self._settings, self._watch = settings, watch
        self._progress: Progress | None = None
        self.expected: Callable[[], str] = str
        self.resumable = False

    def __call__(self, progress: Progress) -> None:
        """Note one step, and pass it on."""
        self._progress = progress
        self._watch(progress)

    def __enter__(self) -> "MemoryGuard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and is_shortage(error):
            raise DeviceError(self._what(error), expected=self.expected(), fix=self._fix(error)) from error

    def _what(self, error: BaseException) -> str:
        owner = "of the GPU" if _on_gpu(error) else "of this machine"
        lines = str(error).strip().splitlines()
        return ": ".join(filter(None, (f"the memory {owner} ran out", self._where(), lines[0] if lines else "")))

    def _where(self) -> str:
        step = self._progress
        if step is None:
            return ""
        after = "head" if step.layers and step.unit == "layer" else ""
        layer = f"{step.unit} {step.layer + 1} of {step.layers}" if step.layer < step.layers else after
        return ", ".join(filter(None, (step.stage, layer, step.step)))

    def _fix(self, error: BaseException) -> str:
        smaller = f"set a smaller batch_size (it is {self._settings.batch_size})"
        if _on_gpu(error):
            ways = f"{smaller} or device: cpu, or stop other programs that use the GPU"
        else:
            budget = f"activation_budget (it is {format_size(self._settings.activation_budget)})"
            ways = f"{smaller} or a smaller {budget}, or free memory"
        if not self.resumable:
            return ways
        return f"{ways}; then use --resume if the recipe is unchanged, otherwise --overwrite"


def sampling_needs(source: Source) -> str:
    """Say how much memory it takes to sample text from the dense model."""
    nbytes = sum(parameter.nbytes for parameter in source.model.parameters())
    return f"{format_size(nbytes)} for the whole dense model, which generates the text, and some for its KV cache"


def scoring_needs(source: Source, tokens: Tokens, settings: StreamSettings, models: int = 1) -> str:
    """Say how much memory the LM head takes, with the logits of as many positions as are computed at once."""
    batch = min(settings.batch_size, len(tokens.ids)) * tokens.ids.shape[1]
    positions = min(window_positions(source), batch)
    vocabulary = source.model.config.get_text_config(decoder=True).vocab_size
    # As computed, as float32, their log-softmax; and the divergence of two models.
    logits = positions * vocabulary * (models * (source.dtype.itemsize + 8) + 8 * (models > 1))
    needed = format_size(ends_bytes(source) + logits)
    return f"{needed} for the embeddings, the LM head and the logits of {positions:,} positions"


def _on_gpu(error: BaseException) -> bool:
    # CUDA, CUBLAS, CUSOLVER, ...
    return isinstance(error, torch.OutOfMemoryError) or re.search(r"\bCU[A-Z]", str(error)) is not None
