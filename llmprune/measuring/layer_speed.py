"""The speed of a checkpoint's decoder layers, measured one layer at a time so that a model of any size fits.

Each layer is loaded, run a few times on one sequence of the prompt's length and on a single token, and freed. The
fastest runs of the layers are added up; loading, embeddings, final norm and LM head are left out. The single token is a
decode step without a cache: it attends only to itself. MoE layers run expert by expert, as everywhere in the stream.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmprune.errors import CalibrationError, RecipeError
from llmprune.models.source import Source, eager_experts
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream, StreamSettings


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of all decoder layers of one model, without loading, embeddings and LM head.

    Attributes:
        prefill_seconds: of one forward pass of `prefill_tokens` tokens.
        token_seconds: of one forward pass of a single token.
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
    """Measure two models side by side, so that other load on the machine affects both.

    Layers at the same relative depth are resident together and run alternately; if one model has fewer layers, the
    remaining layers of the other run alone. Each layer of both is measured once, with the same number of runs.

    Args:
        dense: one model.
        pruned: the other, a separate source.
        ids: tokens [samples, length], valid for both models; the first sequence is the prompt, its first token the
            single one.
        device: where the layers run.
        repeats: timed runs of each layer, >= 1, after a warm-up run.

    Raises:
        RecipeError: `repeats` is below 1.
        CalibrationError: there are no tokens.
        ModelError: as for `Stream`.
    """
    first, second = _measure([dense, pruned], ids, device, repeats)
    return first, second


_Run = Callable[[], object]


@dataclass
class _Course:
    """One model's progress through its layers; for each layer the runs to time: of the prompt and of a single token."""

    layers: Iterator[tuple[_Run, _Run]]
    count: int
    done: int = 0
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])


def _measure(sources: Sequence[Source], ids: Tensor, device: torch.device, repeats: int) -> list[Speed]:
    if repeats < 1:
        raise RecipeError(f"{repeats} repeats", expected="at least one")
    if not ids.numel():
        raise CalibrationError("no tokens to measure the speed with", expected="at least one sequence with one token")
    prompt = ids[:1]
    with ExitStack() as stack, torch.no_grad():
        courses = [
            _Course(stack.enter_context(closing(_layers(source, prompt, device))), len(source.layers))
            for source in sources
        ]
        steps = max(course.count for course in courses)
        for step in range(steps):
            # A course with fewer layers only moves on once the step has reached its next relative depth.
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
    """Seconds of the fastest run of each, in alternating rounds; the first round warms up."""
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
