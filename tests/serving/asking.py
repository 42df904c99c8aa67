"""Asking an ASGI application as a client would, without a network."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

HEADERS = {"host": "localhost:8000", "content-type": "application/json"}


@dataclass
class Client:
    """One request, and what has come back.

    Attributes:
        chunk: bytes of the body that are sent at once.
        chunks: of the answer.
        gone: set when the client closes its connection.
    """

    path: str
    body: bytes = b""
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(HEADERS))
    chunk: int = 1 << 20
    status: int = 0
    chunks: list[bytes] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, app: Any) -> "Client":
        waiting = [self.body[start : start + self.chunk] for start in range(0, len(self.body) or 1, self.chunk)]

        async def receive() -> Any:
            if waiting:
                return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert not self.status
                self.status = message["status"]
            else:
                self.chunks.append(message.get("body", b""))

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": self.method, "scheme": "http", "path": self.path, "raw_path": self.path.encode(),
            "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in self.headers.items()],
        }  # fmt: skip
        await app(scope, receive, send)
        return self

    @property
    def text(self) -> str:
        return b"".join(self.chunks).decode()

    @property
    def detail(self) -> str:
        return str(json.loads(self.text)["detail"])


def ask(app: Any, path: str, fields: Any = None, **options: Any) -> Client:
    """Ask, and wait for the whole answer."""
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()

    async def run() -> Client:
        return await Client(path, body, **options).ask(app)

    return asyncio.run(run())
