"""JSON records, read as what they must be: wrong types, missing keys and endless nesting are typed errors.

A record's type is a dataclass, a TypedDict or a plain type, checked strictly: a number in quotes is not a number.
"""

import functools
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_origin, get_type_hints

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from llmprune.errors import CheckpointError, LlmpruneError

# For dataclasses, as their `__pydantic_config__`.
CLOSED = ConfigDict(extra="forbid")

# The most characters of a wrong value that a message shows.
_SHOWN = 40

# The longest file name that common file systems have.
_NAME_BYTES = 255

Kind = TypeVar("Kind")


def is_plain_name(name: str) -> bool:
    """Whether a file of this name can lie in a folder, and nowhere else."""
    # Some names are no paths at all: those with a null character.
    plain = "\0" not in name and Path(name).name == name and bool(name.strip("."))
    return plain and len(name.encode(errors="surrogatepass")) <= _NAME_BYTES


def _require_plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("not a valid name of a file or folder")
    return name


# The name of a file or folder in a known place; a record from elsewhere could name others.
PlainName = Annotated[str, AfterValidator(_require_plain)]


def read_as(
    file: Path,
    kind: type[Kind],
    *,
    expected: str,
    fix: str,
    raised: type[LlmpruneError] = CheckpointError,
) -> Kind:
    """Read a JSON file.

    Args:
        file: in UTF-8.
        kind: what it must hold.
        expected: for the error.
        fix: for the error.
        raised: the error's class.

    Raises:
        LlmpruneError: of the class `raised`: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise raised(f"{file} cannot be read: {problem(error)}", expected=expected, fix=fix) from error
    return parsed(content, kind, str(file), expected=expected, fix=fix, raised=raised)


def parsed(
    content: bytes,
    kind: type[Kind],
    where: str,
    *,
    expected: str,
    fix: str,
    raised: type[LlmpruneError] = CheckpointError,
) -> Kind:
    """Read JSON that lies inside another file; `where` names it in the error, the rest is as for `read_as`.

    Raises:
        LlmpruneError: of the class `raised`: it is no JSON, or holds something else.
    """
    try:
        return _reader(cast(Hashable, kind)).validate_json(content, strict=True)
    except ValidationError as error:
        raise raised(f"{where} cannot be read: {problem(error)}", expected=expected, fix=fix) from error


def checked(
    content: object,
    kind: type[Kind],
    where: str,
    *,
    expected: str,
    fix: str,
    raised: type[LlmpruneError] = CheckpointError,
) -> Kind:
    """Check a record that lies inside another; `where` names it in the error, the rest is as for `read_as`.

    Raises:
        LlmpruneError: of the class `raised`: it is something else.
    """
    try:
        return _reader(cast(Hashable, kind)).validate_python(content, strict=True)
    except ValidationError as error:
        raise raised(f"{where} cannot be read: {problem(error)}", expected=expected, fix=fix) from error


def wrong_type(kind: type, values: Mapping[str, object]) -> tuple[str, str]:
    """The first of a dataclass's fields whose value has another type, and which it should have; empty if none has.

    Args:
        kind: the dataclass; fields that are a choice of literals are not looked at.
        values: of some of its fields; others are passed over.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints or get_origin(hints[name]) is Literal:
            continue
        try:
            _reader(cast(Hashable, hints[name])).validate_python(value, strict=True)
        except ValidationError as error:
            return name, error.errors(include_url=False)[0]["msg"].removeprefix("Input should be ")
    return "", ""


def problem(error: OSError | ValidationError) -> str:
    """What is wrong, in one line: of several faults of a record, the first."""
    if isinstance(error, OSError):
        return str(error)
    first, *others = error.errors(include_url=False)
    place = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    said = message[:1].lower() + message[1:]
    if first["type"] not in ("json_invalid", "missing", "extra_forbidden"):
        shown = repr(first["input"])
        said += f", not {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '…'}"
    return (f"{place}: " if place else "") + said + (f" (and {len(others)} more faults)" if others else "")


@functools.cache
def _reader(kind: Hashable) -> TypeAdapter[Any]:
    # Types are hashable, but no type checker knows them by that.
    return TypeAdapter(cast(Any, kind))
