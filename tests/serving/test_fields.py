"""Fields of requests that would end in a server's error, or choose what is not a client's to choose."""

import json
from typing import Any

import pytest

from llmprune.errors import ServingError
from llmprune.serving.fields import check_chat, check_completion, read_fields

MESSAGES = [{"role": "user", "content": "Hello"}]
HUGE = 10**40


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b"null", b'{"a": NaN}', b'{"a": Infinity}', b"\xff", b'{"prompt": "\\ud800"}',
     b'{"\\udfff": 1}', b'{"messages": [{"content": "\\ud800"}]}', b"[" * 100_000, b'{"a":' * 100_000,
     b'{"max_tokens": ' + b"9" * 10_000 + b"}"],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ServingError):
        read_fields(body)


WRONG: dict[str, list[Any]] = {
    "model": [5, ["a"], {}],
    "stream": ["yes", 1, []],
    "temperature": [-1, 2.5, "x", [1], True, HUGE, 1e300],
    "top_p": [-1, 0, 1.5, "x", HUGE],
    "frequency_penalty": [-1, -2, 3, "x", HUGE, {}],
    "seed": [-1, "x", 1.5, HUGE, True],
    "max_tokens": [-1, 0, "x", [1], 1.5, True, 1e300],
    "max_completion_tokens": [-1, 0, "x"],
    "stop": [5, "", [], [""], [5], ["a"] * 5, "x" * 1000, {"a": 1}],
    "logit_bias": [5, [1], {"x": 1}, {"-1": 1}, {"1": "x"}, {"1": 1000}, {"1": True}, {"9" * 100: 1}],
    "generation_config": [5, "{", "{}", '{"num_return_sequences": 400}'],
    "chat_template": ["{{ 1 }}"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(ServingError, match=name):
        check_completion({"prompt": "Hello", name: value})
    with pytest.raises(ServingError, match=name):
        check_chat({"messages": MESSAGES, name: value})


@pytest.mark.parametrize("prompt", [5, [1, 2], ["a"], {}, True])
def test_a_prompt_is_a_string(prompt: Any) -> None:
    with pytest.raises(ServingError, match="prompt"):
        check_completion({"prompt": prompt})
    with pytest.raises(ServingError, match="suffix"):
        check_completion({"prompt": "a", "suffix": prompt})


CALL = {"id": "1", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "message",
    [
        5, "Hello", {}, {"role": "user"}, {"content": "x"}, {"role": 5, "content": "x"}, {"role": "user", "content": 5},
        {"role": "user", "content": [5]}, {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA"}}]},
        {"role": "tool", "content": "x", "tool_call_id": 5},
        *({"role": "assistant", "tool_calls": calls} for calls in
          (5, [5], [{}], [{"function": 5}], [{"function": {"name": "f"}}],
           [{"function": {"name": "f", "arguments": "{"}}], [{"function": {"name": "f", "arguments": "5"}}],
           [{"function": {"name": 5, "arguments": "{}"}}])),
    ],
)  # fmt: skip
def test_messages_of_another_shape_are_refused(message: Any) -> None:
    with pytest.raises(ServingError, match="messages"):
        check_chat({"messages": [*MESSAGES, message]})


@pytest.mark.parametrize("fields", [{}, {"messages": []}, {"messages": 5}, {"messages": "Hello"}, {"messages": {}}])
def test_a_chat_needs_messages(fields: Any) -> None:
    with pytest.raises(ServingError, match="messages"):
        check_chat(fields)


@pytest.mark.parametrize("tools", [5, "f", [5], {}])
def test_tools_are_objects(tools: Any) -> None:
    with pytest.raises(ServingError, match="tools"):
        check_chat({"messages": MESSAGES, "tools": tools})


@pytest.mark.parametrize("given", [{"chat_template": "{{ 1 }}"}, {"tokenize": False}, {"x": [1]}, {"x": {}}, 5, "x"])
def test_the_template_is_the_servers(given: Any) -> None:
    reserved = frozenset({"chat_template", "tokenize"})
    with pytest.raises(ServingError, match="chat_template_kwargs"):
        check_chat({"messages": MESSAGES, "chat_template_kwargs": given}, reserved)


def test_what_is_right_passes() -> None:
    fields = {
        "model": "m", "messages": [*MESSAGES, {"role": "assistant", "tool_calls": [CALL]},
                                   {"role": "tool", "content": [{"type": "text", "text": "1"}], "tool_call_id": "1"}],
        "temperature": 0, "top_p": 1, "seed": 0, "max_tokens": HUGE, "stop": ["\n", "END"], "frequency_penalty": 0.5,
        "logit_bias": {"7": -100}, "stream": False, "chat_template_kwargs": {"enable_thinking": True}, "user": "me",
    }  # fmt: skip
    checked = check_chat(read_fields(json.dumps(fields).encode()))
    assert checked == fields
    assert isinstance(checked["logit_bias"]["7"], float)  # transformers takes no integer


def test_nulls_are_left_out_and_next_to_greedy_is_greedy() -> None:
    fields = {"prompt": "", "stop": None, "generation_config": None, "temperature": 1e-7, "logit_bias": {}}
    assert check_completion(fields) == {"prompt": "", "temperature": 0.0}


@pytest.mark.parametrize("many", [65, 900])
def test_endless_nesting_is_refused_before_anyone_follows_it(many: int) -> None:
    nested = "[" * many + "]" * many
    for body in (nested, f'{{"tools": [{nested}]}}', f'{{"messages": [{{"content": {nested}}}]}}'):
        with pytest.raises(ServingError, match="nested too deep"):
            read_fields(body.encode())
    assert read_fields(b'{"tools": ' + b"[" * 60 + b"]" * 60 + b"}")
