"""Requests as an attacker would send them: each is answered, none by a fault of the server, none for another model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import HEADERS, ask
from tiny_models import build, save
from transformers.utils.import_utils import is_serve_available

from llmprune.serving.gate import Gate
from llmprune.serving.loader import load, load_tokenizer
from llmprune.serving.server import ENDPOINTS, _State, build_app

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="the extra llmprune[serve] is not installed")

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
# What the stock server has, too.
STOCK = ("/load_model", "/reset", "/v1/responses")
PROMPTS: dict[str, dict[str, Any]] = {
    TEXT: {"prompt": "w50"},
    CHAT: {"messages": [{"role": "user", "content": "w50"}]},
}
NAMES: tuple[Any, ...] = (
    "tiny@main", "tiny:0.gguf", "tiny/", "../tiny", "/etc/passwd", "org/model", "org/model@rev", "", " ", ".",
    "a" * 10_000, "tiny\0", "TINY", "http://localhost/x", 5, [], {}, True, ["tiny"],
)  # fmt: skip
BODIES = (
    b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe{}", b'{"prompt": NaN}', b'{"a":' * 100_000 + b"}" * 100_000,
    b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
)  # fmt: skip
REFUSED: tuple[tuple[str, Any], ...] = (
    ("max_tokens", -1), ("max_tokens", 0), ("max_tokens", "x"), ("max_tokens", [1]), ("max_tokens", 1.5),
    ("max_tokens", True), ("temperature", -1), ("temperature", "x"), ("temperature", 1e300), ("temperature", []),
    ("top_p", -1), ("top_p", 2), ("top_p", "x"), ("top_p", {}), ("seed", "x"), ("seed", -(2**70)), ("seed", 2**70),
    ("seed", []), ("stop", 5), ("stop", []), ("stop", [""]), ("stop", ["a"] * 99), ("stop", "a" * 9999),
    ("frequency_penalty", "x"), ("frequency_penalty", 1e9), ("logit_bias", 5), ("logit_bias", {"x": 1}),
    ("logit_bias", {"1": "x"}), ("logit_bias", {"-1": 1}), ("stream", "x"), ("stream", 5), ("generation_config", 5),
    ("generation_config", "{"), ("chat_template", "{{ 1 }}"), ("nobody_knows", 1), ("prompt", 5), ("messages", 5),
)  # fmt: skip
MESSAGES: tuple[Any, ...] = (
    [], [5], [None], [{}], [{"role": "user"}], [{"role": 5, "content": "w5"}], [{"role": "user", "content": 5}],
    [{"role": "user", "content": {}}], [{"role": "user", "content": [5]}], {"role": "user", "content": "w5"},
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}], "w5",
)  # fmt: skip


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    folder: Path = save(build("llama"), tmp_path_factory.mktemp("served") / "tiny")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    state = _State(64)
    yield Gate(build_app(load(folder, device="cpu"), tokenizer, "tiny", state), ENDPOINTS, "localhost")
    assert state.manager.idle.wait(5)


@pytest.mark.parametrize("path", [TEXT, CHAT, *STOCK])
def test_no_name_reaches_another_model(gate: Gate, path: str) -> None:
    for name in NAMES:
        status = ask(gate, path, {**PROMPTS.get(path, {}), "model": name, "max_tokens": 1}).status
        assert status in ((404,) if path in STOCK else (400, 422)), (name, status)


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_body_that_is_no_request_is_refused(gate: Gate, path: str) -> None:
    for body in BODIES:
        assert ask(gate, path, body).status in (400, 422), body[:40]


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_field_of_a_wrong_kind_is_refused(gate: Gate, path: str) -> None:
    for name, value in REFUSED:
        if name == "messages" and path == TEXT:
            continue  # answered as an unknown field: see the test of these
        answer = ask(gate, path, {**PROMPTS[path], name: value})
        assert answer.status in (400, 422), (name, value, answer.status)
        assert name in json.dumps(json.loads(answer.text)), (name, value)


def test_messages_of_a_wrong_kind_are_refused(gate: Gate) -> None:
    for messages in MESSAGES:
        assert ask(gate, CHAT, {"messages": messages}).status in (400, 422), messages


def test_other_ways_in_are_closed(gate: Gate) -> None:
    foreign = {**HEADERS, "host": "evil.example"}
    assert ask(gate, TEXT, PROMPTS[TEXT], headers=foreign).status == 400
    assert ask(gate, TEXT, PROMPTS[TEXT], headers={**HEADERS, "content-type": "text/plain"}).status == 415
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "HEAD"):
        assert ask(gate, TEXT, method=method).status == 405
    for path in ("/", "/docs", "/openapi.json", "/v1/models/tiny", "/v1/../health", "//health", "/v1/audio/speech"):
        assert ask(gate, path, method="GET").status == 404
    assert ask(gate, TEXT, b" " * (9 << 20)).status == 413
