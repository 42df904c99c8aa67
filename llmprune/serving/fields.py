"""The fields of a request to the server, checked before transformers' handlers use them.

The handlers take most fields as they come: a wrong type would end in "Internal Server Error", and some fields would let
a client choose what only the operator of a server may choose, such as a Jinja template.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from llmprune.errors import ServingError

Fields = dict[str, Any]

# What the handlers would obey.
_OPERATORS = ("chat_template", "generation_config")

# The most objects and lists inside one another: whoever reads them calls itself for each.
_DEPTH = 64

# Stop strings are compared with every token of the vocabulary: OpenAI's limits.
_STOPS, _STOP_LENGTH = 4, 500

# Below it logits overflow; this is greedy already.
_LEAST_TEMPERATURE = 1e-3


def read_fields(body: bytes) -> Fields:
    """Read a body as JSON.

    Raises:
        ServingError: it is not a JSON object, or holds text that is not Unicode.
    """
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
        # Half of a surrogate pair is legal in JSON, but no tokenizer reads it.
        json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ServingError(f"a body that is not valid JSON: {error}", expected="an object in UTF-8") from error
    if _deeper(fields, _DEPTH):
        raise ServingError("a body with objects or lists nested too deep", expected=f"at most {_DEPTH} levels")
    if not isinstance(fields, dict):
        raise ServingError(f"a body that is a {type(fields).__name__}", expected="a JSON object")
    return fields


def _deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(_deeper(each, levels - 1) for each in inner))


def check_completion(fields: Fields) -> Fields:
    """Check the fields of a request to /v1/completions.

    Returns:
        Those that the handler is to see, without nulls.

    Raises:
        ServingError: names the field, its value and what is allowed.
    """
    fields = _check(fields, {"prompt": _text, "suffix": _text})
    if "prompt" not in fields:
        raise ServingError("a request without prompt", expected="a string")
    return fields


def check_chat(fields: Fields, reserved: frozenset[str] = frozenset()) -> Fields:
    """Check the fields of a request to /v1/chat/completions.

    Args:
        fields: the request.
        reserved: what `chat_template_kwargs` must not contain: the arguments of the function that applies the template.

    Returns:
        Those that the handler is to see, without nulls.

    Raises:
        ServingError: names the field, its value and what is allowed.
    """

    def values_of_template(name: str, value: Any) -> Any:
        for key, inner in _mapping(name, value).items():
            if key in reserved:
                raise ServingError(f"{name}.{key} is the server's to choose", fix="leave it out")
            _require(inner is None or isinstance(inner, str | bool | int), f"{name}.{key}", inner, "a string or number")
        return value

    checks = {"messages": _messages, "tools": _tools, "chat_template_kwargs": values_of_template}
    fields = _check(fields, checks)
    if "messages" not in fields:
        raise ServingError("a request without messages", expected="a list")
    return fields


def _check(fields: Fields, checks: Mapping[str, Callable[[str, Any], Any]]) -> Fields:
    for name in _OPERATORS:
        if fields.get(name) is not None:
            raise ServingError(f"{name} is the server's to choose", fix="leave it out")
    every = {**_CHECKS, **checks}
    given = {name: value for name, value in fields.items() if value is not None}
    checked = {name: every[name](name, value) if name in every else value for name, value in given.items()}
    # An empty bias is none.
    return {name: value for name, value in checked.items() if name != "logit_bias" or value}


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        shown = json.dumps(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ServingError(f"{name} is {shown}", expected=expected)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _text(name: str, value: Any) -> Any:
    _require(isinstance(value, str), name, value, "a string")
    return value


def _flag(name: str, value: Any) -> Any:
    _require(isinstance(value, bool), name, value, "true or false")
    return value


def _mapping(name: str, value: Any) -> dict[str, Any]:
    _require(isinstance(value, dict), name, value, "an object")
    return dict(value)


def _number(least: float, most: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        holds = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        _require(holds, name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    return check


def _integer(least: int, most: float) -> Callable[[str, Any], int]:
    expected = f"an integer from {least}" + ("" if most == math.inf else f" to {most:g}")

    def check(name: str, value: Any) -> int:
        holds = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        _require(holds, name, value, expected)
        return int(value)

    return check


def _temperature(name: str, value: Any) -> float:
    checked = _number(0, 2)(name, value)
    return checked if checked >= _LEAST_TEMPERATURE else 0.0


def _stop(name: str, value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    holds = isinstance(stops, list) and 0 < len(stops) <= _STOPS
    holds = holds and all(isinstance(stop, str) and 0 < len(stop) <= _STOP_LENGTH for stop in stops)
    _require(holds, name, value, f"a string, or a list of 1 to {_STOPS}, of 1 to {_STOP_LENGTH} characters each")
    return list(stops)


def _logit_bias(name: str, value: Any) -> dict[str, float]:
    for token in _mapping(name, value):
        _require(token.isascii() and token.isdecimal() and len(token) < 10, f"a token of {name}", token, "its number")
    return {token: _number(-100, 100)(f"{name}.{token}", bias) for token, bias in value.items()}


def _messages(name: str, value: Any) -> Any:
    _require(isinstance(value, list) and bool(value), name, value, "a list of at least one message")
    for place, message in enumerate(value):
        here = f"{name}[{place}]"
        given = _mapping(here, message)
        _text(f"{here}.role", given.get("role"))
        if "tool_call_id" in given:
            _text(f"{here}.tool_call_id", given["tool_call_id"])
        if "tool_calls" in given:
            _tool_calls(f"{here}.tool_calls", given["tool_calls"])
        elif isinstance(given.get("content"), list):
            for part in given["content"]:
                text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
                _require(text, f"a part of {here}.content", part, 'text: {"type": "text", "text": "..."}')
        else:
            _text(f"{here}.content", given.get("content"))
    return value


def _tool_calls(name: str, value: Any) -> None:
    _require(isinstance(value, list), name, value, "a list")
    for call in value:
        function = _mapping(f"a function of {name}", _mapping(f"one of {name}", call).get("function"))
        _text(f"a function's name in {name}", function.get("name"))
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                _require(False, f"a function's arguments in {name}", arguments, "an object, as JSON")
        _require(isinstance(arguments, dict), f"a function's arguments in {name}", arguments, "an object, as JSON")


def _tools(name: str, value: Any) -> Any:
    _require(isinstance(value, list), name, value, "a list of objects")
    for tool in value:
        _mapping(f"one of {name}", tool)
    return value or None


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "model": _text,
    "stream": _flag,
    "temperature": _temperature,
    "top_p": _number(1e-6, 1),
    "frequency_penalty": _number(-0.9, 2),
    "seed": _integer(0, 2**63 - 1),
    # However large: no more are generated than the model has positions for.
    "max_tokens": _integer(1, math.inf),
    "max_completion_tokens": _integer(1, math.inf),
    "stop": _stop,
    "logit_bias": _logit_bias,
}
