"""What a report on disk must hold: the types of what summaries and pages take from it.

More keys than these are let through, and only what summaries and pages cannot do without is required.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, with_config
from typing_extensions import NotRequired, TypedDict


@with_config(ConfigDict(extra="allow"))
class _SingleText(TypedDict):
    source: str
    opening: NotRequired[list[str]]


@with_config(ConfigDict(extra="allow"))
class _MixedText(TypedDict):
    mix: Annotated[list[_SingleText], Field(min_length=1)]
    opening: NotRequired[list[str]]


def _kind(text: object) -> str:
    return "mix" if isinstance(text, dict) and "mix" in text else "text"


_ReportedText = Annotated[Annotated[_SingleText, Tag("text")] | Annotated[_MixedText, Tag("mix")], Discriminator(_kind)]


@with_config(ConfigDict(extra="allow"))
class _Evaluated(TypedDict):
    perplexity: float | None
    tokens_digest: str
    text: _ReportedText
    predicted_tokens: int
    length: int
    calibration_error: NotRequired[float | None]
    stderr: NotRequired[float | None]


@with_config(ConfigDict(extra="allow"))
class _Schedule(TypedDict):
    stages: int
    end: float


@with_config(ConfigDict(extra="allow"))
class _Recipe(TypedDict):
    schedule: NotRequired[_Schedule]
    method: NotRequired[str | dict[str, Any] | list[str | dict[str, Any]] | None]
    structures: NotRequired[dict[str, dict[str, Any] | None] | None]
    rules: NotRequired[list[Any] | None]


@with_config(ConfigDict(extra="allow"))
class _Memory(TypedDict):
    predicted_bytes: int
    measured_bytes: int
    baseline_bytes: int
    resident_bytes: NotRequired[int | None]


@with_config(ConfigDict(extra="allow"))
class _Bytes(TypedDict):
    stored_bytes: int
    dense_bytes: int


@with_config(ConfigDict(extra="allow"))
class _AnswerLists(TypedDict):
    prompts: list[str]
    dense: list[str]
    pruned: list[str]
    skipped: str


def _require_answers(answers: _AnswerLists) -> _AnswerLists:
    """One of each model for each prompt, unless the models were not asked."""
    if not answers["skipped"] and len({len(answers["prompts"]), len(answers["dense"]), len(answers["pruned"])}) > 1:
        raise ValueError("there is not one answer of each model for each prompt")
    return answers


_Answers = Annotated[_AnswerLists, AfterValidator(_require_answers)]


@with_config(ConfigDict(extra="allow"))
class _Compared(TypedDict):
    dense: _Evaluated
    pruned: _Evaluated
    kl_divergence: float | None
    agreement: float


class _Evaluation(_Compared):
    sources: NotRequired[list[_Compared]]


@with_config(ConfigDict(extra="allow"))
class _Size(TypedDict):
    layers: int
    hidden_size: int


@with_config(ConfigDict(extra="allow"))
class _Extent(TypedDict):
    dense: _Size
    pruned: _Size


@with_config(ConfigDict(extra="allow"))
class _Distance(TypedDict):
    kl_divergence: float | None
    agreement: float


@with_config(ConfigDict(extra="allow"))
class _Perplexities(TypedDict):
    dense: NotRequired[float | None]
    pruned: float | None
    recovered: float | None


@with_config(ConfigDict(extra="allow"))
class _DenseModel(TypedDict):
    source: str
    parameters: int
    nbytes: int


@with_config(ConfigDict(extra="allow"))
class _Recovery(TypedDict):
    teacher: NotRequired[str | None]
    dense: NotRequired[_DenseModel | None]
    pruned_by: NotRequired[_Recipe | None]
    perplexity: NotRequired[_Perplexities]
    before: NotRequired[_Distance | None]
    measured: NotRequired[_Evaluated]
    options: dict[str, Any]
    zeros: dict[str, int]
    sequences: int
    length: int
    steps: int
    planned_steps: int
    best_step: int
    losses: list[dict[str, float | None]]
    scores: list[dict[str, float | None]]


@with_config(ConfigDict(extra="allow"))
class _Training(TypedDict):
    recipe: _Recipe
    name: str
    measure: Literal["perplexity", "accuracy"]
    sequences: int
    length: int
    steps: int
    curve: list[dict[str, float | None]]
    losses: list[dict[str, float | None]]
    zeros: dict[str, int]


def _require_total(seconds: dict[str, float]) -> dict[str, float]:
    if "total" not in seconds:
        raise ValueError("the total is missing")
    return seconds


_Seconds = Annotated[dict[str, float], AfterValidator(_require_total)]


@with_config(ConfigDict(extra="allow"))
class Header(TypedDict):
    """What a report on disk holds in front of its rows."""

    model: NotRequired[str]
    parameters: NotRequired[int]
    host: NotRequired[dict[str, Any]]
    notes: NotRequired[list[str]]
    answers: NotRequired[_Answers | None]
    generation: NotRequired[dict[str, Any]]
    device: NotRequired[str]
    source: NotRequired[str]
    recipe: NotRequired[_Recipe]
    tokens: NotRequired[dict[str, str]]
    version: NotRequired[dict[str, str]]
    texts: NotRequired[dict[str, dict[str, Any]]]
    seconds: NotRequired[_Seconds]
    memory: NotRequired[_Memory | None]
    size: NotRequired[_Bytes | None]
    speed: NotRequired[dict[str, Any] | None]
    evaluation: NotRequired[_Evaluation | None]
    extent: NotRequired[_Extent | None]
    decisions: NotRequired[dict[str, Any] | None]
    recovery: NotRequired[_Recovery | None]
    training: NotRequired[_Training | None]
