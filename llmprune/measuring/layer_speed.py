"""How long the decoder layers of a checkpoint of any size take, measured one layer at a time.

Each layer is loaded, run a few times on one sample of a prompt's length and on a single token, and let go. What counts
is the fastest run of each layer, summed over the layers; loading, embeddings, the final norm and the head are left out.
The single token is a decode step without its cache: its attention looks at itself alone. Mixtures of experts run expert
by expert, as everywhere in the stream.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmprune.errors import CalibrationError, RecipeError
from llmprune.models.source import Source, eager_experts
from llmprune.stream.stream import ResidentLayer, Stream, StreamSettings


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of all decoder layers of one model; neither loading nor embeddings and head are among them.

    Attributes:
        prefill_seconds: one forward of `prefill_tokens` tokens.
        token_seconds: one forward of a single token.
        prefill_tokens: length of the prompt.
        layers: how many layers were measured.
    """

    prefill_seconds: float
    token_seconds: float
    prefill_tokens: int
    layers: int


def compare_speed(
    dense: Source, pruned: Source, ids: Tensor, device: torch.device, repeats: int = 5
) -> tuple[Speed, Speed]:
    """Measure two models side by side, so that whatever else the machine does meets both.

    Layers at the same relative depth are resident together and run in turn, run by run; where one model has fewer
    layers, the others run alone. Each layer of both is measured once, with the same number of runs.

    Args:
        dense: one model.
        pruned: the other, a source of its own.
        ids: tokens [samples, length] that both models must know; the first sample is the prompt, its first token the
            single one.
        device: where the layers run.
        repeats: timed runs of each layer, >= 1, after one that is not timed.

    Raises:
        RecipeError: there is nothing to repeat.
        CalibrationError: there are no tokens.
        ModelError: as for `Stream`.
    """
    first, second = _measure([dense, pruned], ids, device, repeats)
    return first, second


_Run = Callable[[], object]


@dataclass
class _Course:
    """One model on its way through its layers: of each the runs to be timed, of the prompt and of the single token."""

    layers: Iterator[tuple[_Run, _Run]]
    count: int
    done: int = 0
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])


def _measure(sources: Sequence[Source], ids: Tensor, device: torch.device, repeats: int) -> list[Speed]:
    if repeats < 1:
        raise RecipeError(f"{repeats} repeats", expected="at least one")
    if not ids.numel():
        raise CalibrationError("no tokens to measure the speed with", expected="at least one sample with one token")
    prompt = ids[:1]
    with ExitStack() as stack, torch.no_grad():
        courses = [
            _Course(stack.enter_context(closing(_layers(source, prompt, device))), len(source.layers))
            for source in sources
        ]
        steps = max(course.count for course in courses)
        for step in range(steps):
            # A course with fewer layers moves on when its turn comes.
            moving = [course for course in courses if step * course.count // steps >= course.done]
            residents = [next(course.layers) for course in moving]
            for kind in (0, 1):
                fastest = _fastest([runs[kind] for runs in residents], device, repeats)
                for course, seconds in zip(moving, fastest, strict=True):
                    course.seconds[kind] += seconds
            for course in moving:
                course.done += 1
    return [Speed(course.seconds[0], course.seconds[1], prompt.shape[1], course.count) for course in courses]


def _layers(source: Source, prompt: Tensor, device: torch.device) -> Generator[tuple[_Run, _Run], None, None]:
    """Bring the layers of a model to the device, one at a time."""
    settings = StreamSettings(device=device, batch_size=1)
    stream, single = Stream(source, prompt, settings), Stream(source, prompt[:, :1], settings)
    with eager_experts(source.model):
        single.capture()
    for layer in stream:
        token = ResidentLayer(single, layer.index)
        yield _run(layer), _run(token)
        token.advance()


def _run(layer: ResidentLayer) -> _Run:
    hidden = layer.stream.hidden[0].to(layer.stream.settings.device)
    return lambda: layer.forward(hidden, 0)


def _fastest(runs: Sequence[_Run], device: torch.device, repeats: int) -> list[float]:
    """Seconds of the fastest of several runs of each, made in turn; the first round warms up."""
    rounds = [[_seconds(run, device) for run in runs] for _ in range(repeats + 1)]
    return [min(times) for times in zip(*rounds[1:], strict=True)]


def _seconds(run: _Run, device: torch.device) -> float:
    _synchronise(device)
    started = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
