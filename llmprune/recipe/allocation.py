"""The recipe's `allocation`: one word, one word with its options, or globs with sparsities."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field, PlainSerializer, PlainValidator, TypeAdapter

from llmprune.errors import RecipeError
from llmprune.patterns import NM, Pattern, Unstructured
from llmprune.recipe.document import did_you_mean, one_of, refusal, shown_value
from llmprune.recipe.fields import MOST, STRICT

Fraction = Annotated[float, Field(ge=0, le=1)]
_Step = Annotated[float, Field(gt=0, le=0.5)]


class Allocation(BaseModel):
    """How sparse each matrix becomes."""

    model_config = STRICT

    name: ClassVar[str] = ""


class Uniform(Allocation):
    """Every matrix has the sparsity of its pattern."""

    name: ClassVar[str] = "uniform"


class Owl(Allocation):
    """Layers with more outliers stay denser (OWL).

    Attributes:
        multiple: an outlier's score exceeds this multiple of the layer's mean, > 0.
        spread: distance of the densest and of the sparsest layer from the middle, in [0, 1].
    """

    name: ClassVar[str] = "owl"

    multiple: Annotated[float, Field(gt=0, le=MOST)] = 5.0
    spread: Fraction = 0.08


class Alpha(Allocation):
    """Layers with heavy-tailed spectra stay denser (AlphaPruning); reads no text.

    Attributes:
        spread: relative distance of the densest and of the sparsest layer from the middle, in [0, 1].
    """

    name: ClassVar[str] = "alpha"

    spread: Fraction = 0.3


class Dlp(Allocation):
    """Layers with small mean scores stay denser (DLP).

    Attributes:
        spread: distance of the densest and of the sparsest layer from the middle, in [0, 1].
    """

    name: ClassVar[str] = "dlp"

    spread: Fraction = 0.15


class Atp(Allocation):
    """Sparsities rise or fall evenly over depth (ATP).

    Attributes:
        slope: from one layer to the next, in [-1, 1]; null: the best of a few, by divergence on held-back text.
    """

    name: ClassVar[str] = "atp"

    slope: Annotated[float, Field(ge=-1, le=1)] | None = None


class Sensitivity(Allocation):
    """The levels with the least damage, from measured curves, by dynamic programming.

    Attributes:
        file: result of `llmprune sensitivity` on the same model; null: curves are measured during the run.
        grid: distance between the sparsities that are considered, in (0, 0.5].
        most: the highest sparsity of any matrix, in (0, 1]; higher if the target is.
    """

    name: ClassVar[str] = "sensitivity"

    file: Annotated[str, Field(min_length=1)] | None = None
    grid: _Step = 0.025
    most: Annotated[float, Field(gt=0, le=1)] = 0.95


class Search(Allocation):
    """Slope, attention against MLP, and protection of the ends, by divergence on held-back text.

    Attributes:
        step: first step of each of the three, in (0, 0.5].
        generations: afterwards, how often random switches of levels between matrices are tried (EvoPress), at least 0.
        offspring: candidates in each generation, at least 1.
        seed: of the switches.
    """

    name: ClassVar[str] = "search"

    step: _Step = 0.1
    generations: Annotated[int, Field(ge=0, le=MOST)] = 0
    offspring: Annotated[int, Field(ge=1, le=MOST)] = 8
    seed: int = 0


class Globs(Allocation):
    """Given sparsities; matrices that no glob matches share the rest.

    Attributes:
        sparsities: (shell glob over full matrix names, sparsity in [0, 1]); the first that matches holds.
    """

    name: ClassVar[str] = "globs"

    sparsities: Annotated[tuple[tuple[str, Fraction], ...], Field(min_length=1)]


RULES: dict[str, type[Allocation]] = {kind.name: kind for kind in (Uniform, Owl, Alpha, Dlp, Atp, Sensitivity, Search)}

_FORM = "one name such as owl, one name with its options such as {owl: {spread: 0.1}}, or {glob: sparsity, ...}"


def read_allocation(value: object) -> Allocation:
    """Read an allocation; one that was read already is returned unchanged."""
    if isinstance(value, Allocation):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or not value:
        raise refusal(RecipeError(f"allocation is {shown_value(value)}", expected=_FORM))
    if all(isinstance(one, int | float) and not isinstance(one, bool) for one in value.values()):
        return _read_globs(value)
    _check_numbers(value)
    ((name, options), *others) = value.items()
    if others or name not in RULES:
        what = f"allocation is {shown_value(value)}" if others else f"unknown allocation {name!r}"
        hint = "" if others else did_you_mean(str(name), RULES)
        raise refusal(RecipeError(what + hint, expected=f"{one_of(RULES)}; {_FORM}"))
    # Inside its one-key mapping, so that errors name the rule.
    adapter: TypeAdapter[dict[str, Allocation]] = TypeAdapter(dict[str, RULES[name]])  # type: ignore[valid-type]
    return adapter.validate_json(json.dumps({name: options or {}}), strict=True)[name]


def _check_numbers(given: Mapping[str, object]) -> None:
    """Refuse globs with something other than numbers; a rule's name beside them is not taken for a glob."""
    for glob, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if glob not in RULES and not number and any(sign in glob for sign in "*?["):
            expected = "the fraction set to zero, a number in [0, 1], such as 0.6 for 60 %"
            raise refusal(RecipeError(f"{glob!r} is {shown_value(value)}", expected=expected), glob)


def _read_globs(given: Mapping[str, float]) -> Globs:
    for glob, sparsity in given.items():
        if glob in RULES:
            raise refusal(_option_missing(glob, sparsity), glob)
        if not 0 <= sparsity <= 1:
            error = RecipeError(f"{glob!r} is {sparsity}", expected="the fraction set to zero, in [0, 1]")
            raise refusal(error, glob)
    return Globs(sparsities=tuple((glob, float(sparsity)) for glob, sparsity in given.items()))


def _option_missing(rule: str, value: float) -> RecipeError:
    keys = list(RULES[rule].model_fields)
    return RecipeError(
        f"allocation {rule} is {value}, which is no option of it",
        expected=f"{rule}, or {rule} with its options: {', '.join(keys)}" if keys else f"{rule}, which has no options",
        fix=f"write allocation: {rule}" + (f", or allocation: {{{rule}: {{{keys[-1]}: ...}}}}" if keys else ""),
    )


def check_allocation(allocation: Allocation, patterns: Sequence[Pattern], *, structures: bool) -> None:
    """Refuse an allocation for which a recipe has nothing to allocate.

    Args:
        allocation: the recipe's.
        patterns: of the recipe and of its rules.
        structures: whether structures are removed first.

    Raises:
        PydanticCustomError: a `RecipeError` in the form that pydantic passes on.
    """
    if isinstance(allocation, Uniform):
        return
    if structures and not isinstance(allocation, Globs):
        error = RecipeError(
            f"allocation is {allocation.name}, together with structures",
            expected="weights that exist before the run; those of the smaller model do not",
            fix="remove structures in a first run, and prune its result in a second; or give globs",
        )
        raise refusal(error, "allocation")
    whole = next((p for p in patterns if isinstance(p, Unstructured) and p.over == "layer"), None)
    if whole is None and not all(isinstance(pattern, NM) for pattern in patterns):
        return
    error = RecipeError(
        f"allocation is {allocation.name} for {whole or ', '.join(map(str, patterns))}",
        expected="a pattern such as 0.5, 0.5/row or 0.5@64x64, whose sparsity may differ from matrix to matrix; N:M is "
        "the same everywhere because kernels need it, and /layer ranks the weights of a layer together",
        fix="remove allocation, or change the pattern",
    )
    raise refusal(error, "allocation")


def write_allocation(allocation: Allocation) -> Any:
    """An allocation as recipes write it."""
    if isinstance(allocation, Globs):
        return dict(allocation.sparsities)
    options = allocation.model_dump(mode="json")
    return {allocation.name: options} if options else allocation.name


AllocationField = Annotated[Allocation, PlainValidator(read_allocation), PlainSerializer(write_allocation)]
