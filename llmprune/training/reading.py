"""Rules, schedules and selections from what a user writes."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_args

from llmprune.errors import TrainingError
from llmprune.patterns import NM, parse
from llmprune.recipe.document import did_you_mean, one_of
from llmprune.storage.records import wrong_type
from llmprune.training.rules import RULES, SNIP, GraSP, Lottery, Rule, Schedule, Selection, SoftMovement
from llmprune.training.rules.rule import Scope

Value = TypeVar("Value")

# The name of a recipe, whose keys stand alone in errors.
WHOLE = "the recipe"


def read_rule(rule: str | Mapping[str, Any] | Rule) -> Rule:
    """A rule from its name, or from a mapping of its name to its knobs.

    Raises:
        TrainingError: there is no such rule or knob, or a value is out of range.
    """
    if isinstance(rule, Rule):
        return rule
    named: Mapping[str, Any] = {rule: {}} if isinstance(rule, str) else rule
    if not isinstance(named, Mapping) or len(named) != 1:
        raise TrainingError(f"rule is {rule!r}", expected="a name, or one name with its knobs: {rigl: {interval: 50}}")
    ((name, knobs),) = named.items()
    if name not in RULES:
        raise TrainingError(f"there is no rule {name!r}{did_you_mean(str(name), RULES)}", expected=one_of(RULES))
    found = read_keys(RULES[name], {} if knobs is None else knobs, f"rule {name}")
    assert isinstance(found, Rule)
    return found


def read_schedule(schedule: Schedule | Mapping[str, Any] | None, selection: Selection) -> Schedule:
    """A schedule from its keys; with a pattern, it ends at the pattern's sparsity.

    Raises:
        TrainingError: a key is unknown, a value is out of range, or the end is not the pattern's.
    """
    pattern = selection.pattern
    if isinstance(schedule, Schedule):
        read = schedule
    else:
        ends = {} if pattern is None else {"end": pattern.sparsity}
        keys: Any = {} if schedule is None else schedule
        read = read_keys(Schedule, {**ends, **keys} if isinstance(keys, Mapping) else keys, "schedule")
    if pattern is not None and abs(read.end - pattern.sparsity) > 1e-9:
        raise TrainingError(
            f"schedule.end is {read.end}, and {pattern} prunes {pattern.sparsity:g}",
            expected="the same",
            fix="leave schedule.end out",
        )
    return read


def read_selection(rule: Rule, pattern: str | NM | None, scope: str | None) -> Selection:
    """Which weights are compared.

    Args:
        rule: gives the scope where none is asked for: the whole model for lottery tickets, SNIP and GraSP.
        pattern: N:M or None.
        scope: "matrix", "model" or None.

    Raises:
        TrainingError: the scope is unknown, or does not matter with a pattern; the pattern is not N:M, or the rule
            cannot follow one.
    """
    read = parse(pattern) if isinstance(pattern, str) else pattern
    if read is not None and not isinstance(read, NM):
        raise TrainingError(
            f"pattern {read} for a training",
            expected="N:M, such as 2:4; other zeros may be anywhere, as many as schedule.end says",
            fix="set schedule.end to the sparsity",
        )
    if read is not None and isinstance(rule, SoftMovement):
        raise TrainingError(
            f"soft-movement with the pattern {read}: its scores decide how many weights of each group are kept",
            expected="a rule that keeps as many as it is told to",
            fix="choose movement or sr-ste, or leave the pattern out",
        )
    if read is not None and scope is not None:
        raise TrainingError(
            f"scope {scope} with the pattern {read}, which compares the weights of each group",
            expected="one of them",
            fix="remove scope",
        )
    if scope is None:
        return Selection("model" if isinstance(rule, Lottery | SNIP | GraSP) else "matrix", read)
    if scope not in get_args(Scope):
        raise TrainingError(f"scope is {scope!r}", expected=" or ".join(get_args(Scope)))
    return Selection("model" if scope == "model" else "matrix", read)


def read_keys(kind: type[Value], keys: Mapping[str, Any], name: str) -> Value:
    """A dataclass from plain data.

    Raises:
        TrainingError: a key is unknown, or a value has a wrong type.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(keys, Mapping):
        raise TrainingError(
            f"{name} is {keys!r}", expected=f"keys and values; its keys are {', '.join(known) or 'none'}"
        )
    if unknown := sorted(set(keys) - set(known)):
        raise TrainingError(
            f"{name} has no key {unknown[0]!r}{did_you_mean(unknown[0], known)}", expected=one_of(known)
        )
    key, expected = wrong_type(kind, keys)
    if key:
        place = key if name == WHOLE else f"{name}.{key}"
        raise TrainingError(f"{place} is {keys[key]!r}", expected=expected)
    return kind(**dict(keys))
