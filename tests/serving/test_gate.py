"""What never reaches the server's own code, and what ends the work on a request."""

import asyncio
import threading
from typing import Any

import pytest
from asking import HEADERS, Client, ask

from llmprune.serving.gate import LEFT, Gate, is_loopback

ENDPOINTS = {"/ask": "POST", "/health": "GET"}


class Echo:
    """Answers with the request's body, in two pieces; a body of "wait" is never answered, "stream" not to its end."""

    def __init__(self) -> None:
        self.left: threading.Event | None = None
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        self.bodies.append(body)
        self.left = LEFT.get()
        if body == b"wait":
            await asyncio.sleep(60)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body[:1], "more_body": True})
        if body == b"stream":
            await asyncio.sleep(60)
        await send({"type": "http.response.body", "body": body[1:]})


def gate(host: str = "localhost", **options: Any) -> Gate:
    return Gate(Echo(), ENDPOINTS, host, **options)


def test_a_request_passes_with_its_body_whole() -> None:
    answer = ask(gate(), "/ask", b"question", chunk=3)
    assert (answer.status, answer.text) == (200, "question")


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "[::1]"]
)
def test_the_names_of_this_machine_are_answered(host: str) -> None:
    assert ask(gate(), "/ask", b"x", headers={**HEADERS, "host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "192.168.0.2", "", ":"]
)
def test_other_names_are_answered_only_by_a_server_for_others(host: str) -> None:
    headers = {**HEADERS, "host": host}
    refused = ask(gate(), "/ask", b"x", headers=headers)
    assert refused.status == 400
    assert "--host" in refused.detail
    assert ask(gate("0.0.0.0"), "/ask", b"x", headers=headers).status == 200


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        *((path, "POST", 404) for path in ("/load_model", "/reset", "/v1/responses", "/docs", "/", "/ask/", "//ask")),
        ("/ask", "GET", 405),
        ("/ask", "OPTIONS", 405),
        ("/health", "POST", 405),
        ("/health", "GET", 200),
    ],
)
def test_there_are_no_other_endpoints(path: str, method: str, status: int) -> None:
    assert ask(gate(), path, b"", method=method).status == status


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "text/plain; application/json"]
)
def test_what_a_page_of_another_origin_may_send_unasked_is_refused(kind: str) -> None:
    assert ask(gate(), "/ask", b"{}", headers={**HEADERS, "content-type": kind}).status == 415
    good = {**HEADERS, "content-type": "Application/JSON; charset=utf-8"}
    assert ask(gate(), "/ask", b"{}", headers=good).status == 200


def test_a_body_beyond_the_limit_is_not_read_to_its_end() -> None:
    small = gate(body_bytes=10)
    assert ask(small, "/ask", b"x" * 10).status == 200
    client = ask(small, "/ask", b"x" * 1000, chunk=4)
    assert client.status == 413
    assert "10 bytes" in client.detail


@pytest.mark.parametrize(("body", "seen"), [(b"wait", 0), (b"stream", 200)])
def test_a_client_that_leaves_ends_the_work(body: bytes, seen: int) -> None:
    async def run() -> None:
        app = Echo()
        client = Client("/ask", body)
        task = asyncio.ensure_future(client.ask(Gate(app, ENDPOINTS, "localhost")))
        await asyncio.sleep(0.05)
        assert app.left is not None
        assert not app.left.is_set()
        client.gone.set()
        await asyncio.wait_for(task, 2)
        assert app.left.is_set()
        assert client.status == seen

    asyncio.run(run())


@pytest.mark.parametrize(("body", "status"), [(b"wait", 503), (b"stream", 200)])
def test_a_server_that_stops_ends_the_work(body: bytes, status: int) -> None:
    async def run() -> None:
        app = Echo()
        gate = Gate(app, ENDPOINTS, "localhost")
        client = Client("/ask", body)
        task = asyncio.ensure_future(client.ask(gate))
        await asyncio.sleep(0.05)
        gate.close()
        await asyncio.wait_for(task, 2)
        assert app.left is not None
        assert app.left.is_set()
        assert client.status == status
        assert "the server is stopping" in client.text
        late = await asyncio.wait_for(Client("/ask", b"wait").ask(gate), 2)
        assert late.status == 503

    asyncio.run(run())


def test_a_client_that_leaves_while_it_asks_is_not_answered() -> None:
    async def run() -> None:
        app = Echo()

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        scope = {
            "type": "http",
            "path": "/ask",
            "method": "POST",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        await Gate(app, ENDPOINTS, "localhost")(scope, receive, pytest.fail)
        assert app.bodies == []

    asyncio.run(run())


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
