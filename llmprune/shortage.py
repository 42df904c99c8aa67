"""When memory runs out: where it happened, what the run needs, and what makes it need less."""

import re
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch

from llmprune.calibration import Tokens
from llmprune.errors import DeviceError
from llmprune.memory import ends_bytes, layer_memory, predict_peak
from llmprune.progress import Progress, Watcher, ignore
from llmprune.solving import Job
from llmprune.source import Source
from llmprune.stream import ResidentLayer, Stream, StreamSettings

# How the rest of PyTorch says it, in plain RuntimeErrors: its CPU allocator, and the libraries of CUDA.
_PHRASES = ("can't allocate memory", "out of memory", "_ALLOC_FAILED")


class MemoryGuard:
    """Watches a run, and turns memory that runs out inside its `with` block into a `DeviceError`.

    Args:
        settings: what the run can change to need less.
        watch: told about every step, after the guard.

    Attributes:
        expected: says what the work at hand needs; asked only when memory has run out.
        resumable: whether what was committed so far can be continued.
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
        layer = f"layer {step.layer + 1} of {step.layers}" if step.layer < step.layers else "head" * bool(step.layers)
        return ", ".join(filter(None, (step.stage, layer, step.step)))

    def _fix(self, error: BaseException) -> str:
        smaller = f"set a smaller batch_size (it is {self._settings.batch_size})"
        if _on_gpu(error):
            ways = f"{smaller} or device: cpu, or free the GPU of other programs"
        else:
            budget = f"activation_budget (it is {_megabytes(self._settings.activation_budget)})"
            ways = f"{smaller} or a smaller {budget}, or free memory"
        if not self.resumable:
            return ways
        return f"{ways}; with more memory and the same settings go on with --resume, with others --overwrite"


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


def sampling_needs(source: Source) -> str:
    """Say what it takes to sample text from the dense model."""
    nbytes = sum(parameter.nbytes for parameter in source.model.parameters())
    return f"{_megabytes(nbytes)} for the dense model, which is loaded whole to write its text, and some for its cache"


def pruning_needs(
    source: Source, jobs: Sequence[dict[str, Job]], texts: Mapping[str, Tokens], settings: StreamSettings
) -> str:
    """Say what it takes to prune, before any layer was seen, and to evaluate.

    Args:
        source: the model.
        jobs: for each layer, what is done to its matrices.
        texts: "calibration", with the held-back samples, and where perplexity is measured "evaluation".
        settings: device, batch size and memory.
    """
    ids = texts["calibration"].ids
    stream = Stream(source, ids, settings)
    batch, held_back = stream.batches[0].numel(), settings.held_back * ids.shape[1]
    layers = [layer_memory(ResidentLayer(stream, i), None, job, batch, held_back) for i, job in enumerate(jobs)]
    hidden = ids.numel() * source.model.config.get_text_config().hidden_size * source.dtype.itemsize
    peak = predict_peak(ends_bytes(source), min(hidden, settings.activation_budget), 0, layers)
    needs = f"up to {_megabytes(peak)} for pruning, beside what the program itself holds"
    if "evaluation" in texts:
        # Dense and pruned logits are compared, side by side.
        needs += f", and {scoring_needs(source, texts['evaluation'], settings, models=2)}"
    return needs


def scoring_needs(source: Source, tokens: Tokens, settings: StreamSettings, models: int = 1) -> str:
    """Say what the logits of a batch take, which is most of what an evaluation needs."""
    positions = min(settings.batch_size, len(tokens.ids)) * tokens.ids.shape[1]
    vocabulary = source.model.config.get_text_config().vocab_size
    logits = models * positions * vocabulary * source.dtype.itemsize
    return f"{_megabytes(ends_bytes(source) + logits)} for the embeddings, the head and the logits of a batch"


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _on_gpu(error: BaseException) -> bool:
    # CUDA, CUBLAS, CUSOLVER, ...
    return isinstance(error, torch.OutOfMemoryError) or re.search(r"\bCU[A-Z]", str(error)) is not None
