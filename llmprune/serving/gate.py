"""What every request passes before the server's own code sees it: an ASGI application in front of another.

Only the given endpoints exist; a server that only this machine can reach answers only to its names, so that no web page
can reach it under a name of its own (DNS rebinding); bodies have a limit; and a client that leaves, like a server that
stops, ends the work on its request.
"""

import asyncio
import contextlib
import ipaddress
import json
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any

Scope = Mapping[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_BYTES = 8 << 20

# Set once nobody waits for the current request's answer any more; read by other threads, too.
LEFT: ContextVar[threading.Event] = ContextVar("LEFT")

# How long an application may take to notice that it is cancelled.
_CANCEL_SECONDS = 1.0


class Gate:
    """Refuses what must not reach an application, and cancels it when its client leaves.

    Args:
        app: the application; it reads request bodies from the usual messages, whole.
        endpoints: path -> its method.
        host: the address the server listens on. A loopback address is only answered under the names of one.
        body_bytes: limit on a request's body.
    """

    def __init__(self, app: Application, endpoints: Mapping[str, str], host: str, body_bytes: int = BODY_BYTES) -> None:
        self._app, self._endpoints, self._body_bytes = app, endpoints, body_bytes
        self._local = is_loopback(host)
        self._closed = False
        self._open = set[asyncio.Future[None]]()

    def close(self) -> None:
        """End all requests, and answer no more; called in the event loop."""
        self._closed = True
        for closing in self._open:
            if not closing.done():
                closing.set_result(None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"a connection of type {scope['type']!r}; only HTTP is served")
        if (refusal := self._refusal(scope)) is not None:
            return await _answer(send, *refusal)
        if self._closed:
            return await _answer(send, 503, "the server is stopping")
        closing = asyncio.get_running_loop().create_future()
        self._open.add(closing)
        reading = asyncio.ensure_future(_read(receive, self._body_bytes))
        try:
            await asyncio.wait({reading, closing}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return await _answer(send, 503, "the server is stopping")
            if (body := reading.result()) is not None:
                if len(body) > self._body_bytes:
                    return await _answer(send, 413, f"a body of more than {self._body_bytes:,} bytes")
                await self._run(scope, body, receive, send, closing)
        finally:
            self._open.discard(closing)
            closing.cancel()
            await _cancel(reading)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason, or None for a request that may pass."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self._local and not is_loopback(_without_port(host)):
            return 400, f"this server is not {host!r}; it answers to localhost, and to others if started with --host"
        method = self._endpoints.get(scope["path"])
        if method is None:
            return 404, f"no such endpoint; there are {', '.join(self._endpoints)}"
        if scope["method"] != method:
            return 405, f"{scope['path']} expects {method}"
        # What a page of another origin may send unasked has another type, or none.
        if method == "POST" and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return 415, "expected a body in JSON, with the header Content-Type: application/json"
        return None

    async def _run(
        self, scope: Scope, body: bytes, receive: Receive, send: Send, closing: "asyncio.Future[Any]"
    ) -> None:
        """Run the application until it has answered, its client has left or the server stops."""
        left, started = threading.Event(), False

        async def note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        LEFT.set(left)
        work = asyncio.ensure_future(self._app(scope, _replay(body), note))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone, closing}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif closing.done():
                left.set()
                await _cancel(work)
                if started:
                    await send({"type": "http.response.body", "body": b'data: {"error": "the server is stopping"}\n\n'})
                else:
                    await _answer(send, 503, "the server is stopping")
        finally:
            left.set()
            await _cancel(work, gone)


def is_loopback(host: str) -> bool:
    """Whether a name or address, without a port, is one of this machine that no other can reach."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


async def _read(receive: Receive, most: int) -> bytes | None:
    """The body, cut off after the first chunk beyond the limit; None if the client leaves before its end."""
    body = bytearray()
    more = True
    while more and len(body) <= most:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes) -> Receive:
    """Hand a body to an application that must not read from its client: this gate watches that one."""
    waiting = [body]

    async def receive() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError("nobody sets this event")

    return receive


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel what is not done; its own errors on the way no longer matter to anyone."""
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending, timeout=_CANCEL_SECONDS)
    for task in pending:
        if task.done():
            with contextlib.suppress(asyncio.CancelledError):
                task.exception()


async def _answer(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # The rest of a body that was not read would be taken for the next request.
    headers += [(b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
