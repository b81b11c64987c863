"""Health, metrics and status over HTTP: a bare ASGI application, served alone or within another."""

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from cacheinval.metrics import Metrics, Observed

__all__ = ["PATHS", "Monitoring", "Readiness"]

PATHS = ("/healthz", "/readyz", "/metrics", "/status")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether this process should be sent work, and how it is."""

    ready: bool
    status: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


class Monitoring:
    """The four paths that say how a process is.

    `/healthz`: it lives. `/readyz`: 200 if it should be sent work, else 503. `/metrics`: for Prometheus. `/status`: JSON.

    Args:
        observed: asked when somebody looks; nothing is spent otherwise.
        readiness: says whether the process should be sent work.
    """

    def __init__(self, observed: Observed, readiness: Callable[[], Readiness]) -> None:
        self._observed = observed
        self._readiness = readiness
        self._metrics = CollectorRegistry(auto_describe=False)
        self._metrics.register(Metrics(observed))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            raise NotImplementedError(f"monitoring speaks HTTP, not {scope['type']}")
        answer = self._answer(scope)
        headers = [("content-type", answer.content_type), ("cache-control", "no-store"), *answer.headers]
        headers.append(("content-length", str(len(answer.body))))
        await send(
            {
                "type": "http.response.start",
                "status": answer.status,
                "headers": [(name.encode(), value.encode()) for name, value in headers],
            }
        )
        body = b"" if scope["method"] == "HEAD" else answer.body
        await send({"type": "http.response.body", "body": body})

    def _answer(self, scope: Scope) -> _Answer:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in PATHS:
            return _json(404, {"detail": f"there is nothing here; accepted: {', '.join(PATHS)}"})
        if scope["method"] not in ("GET", "HEAD"):
            return _json(405, {"detail": "accepted: GET, HEAD"}, ("allow", "GET, HEAD"))
        if path == "/healthz":
            return _json(200, {"status": "alive"})
        if path == "/readyz":
            readiness = self._readiness()
            said = {"status": readiness.status, "reason": readiness.reason}
            return _json(200 if readiness.ready else 503, said)
        if path == "/status":
            return _json(200, self._observed.status() | {"ready": self._readiness().ready})
        return self._exposition(scope)

    def _exposition(self, scope: Scope) -> _Answer:
        accept = b",".join(value for name, value in scope["headers"] if name == b"accept")
        encode, content_type = choose_encoder(accept.decode("latin-1"))
        return _Answer(200, encode(self._metrics), content_type)


def _json(status: int, content: Mapping[str, Any], *headers: tuple[str, str]) -> _Answer:
    return _Answer(status, msgspec.json.encode(content), headers=headers)
