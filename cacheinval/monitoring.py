"""Health, metrics, status and the page over HTTP: a bare ASGI application, served alone or within another."""

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from cacheinval import page
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
    """The paths that say how a process is.

    `/healthz`: it lives. `/readyz`: 200 if it should be sent work, else 503. `/metrics`: for Prometheus. `/status`: JSON.
    `/`: the page, if there is one; `close` ends its streams, for which a web server may wait before it stops. In a service
    of your own: `app.mount("/cacheinval", Monitoring(client, lambda: Readiness(True, "ready"), Page(client.outlook)))`.

    Args:
        observed: asked when somebody looks; nothing is spent otherwise.
        readiness: says whether the process should be sent work.
        page: how the fleet is, for a browser; None: there is none.
    """

    def __init__(
        self, observed: Observed, readiness: Callable[[], Readiness], page: "page.Page | None" = None
    ) -> None:
        self._observed = observed
        self._readiness = readiness
        self._page = page
        self._metrics = CollectorRegistry(auto_describe=False)
        self._metrics.register(Metrics(observed))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            raise NotImplementedError(f"monitoring speaks HTTP, not {scope['type']}")
        path = _path(scope)
        if self._page is not None and path in page.PATHS and scope["method"] in ("GET", "HEAD"):
            await self._page(scope, receive, send)
            return
        answer = self._answer(scope, path)
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

    @property
    def paths(self) -> tuple[str, ...]:
        """Where there is something."""
        return PATHS if self._page is None else (*PATHS, *page.PATHS)

    async def close(self) -> None:
        """Ends what would go on by itself, at once: the streams of the page."""
        if self._page is not None:
            await self._page.close()

    def _answer(self, scope: Scope, path: str) -> _Answer:
        if path not in self.paths:
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


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _json(status: int, content: Mapping[str, Any], *headers: tuple[str, str]) -> _Answer:
    return _Answer(status, msgspec.json.encode(content), headers=headers)
