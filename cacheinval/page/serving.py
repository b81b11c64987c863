"""The page and its stream over HTTP: a part of `Monitoring`."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from importlib.resources import files
from typing import Any

import msgspec

from cacheinval.page.rendering import View, whole
from cacheinval.page.watching import Watch, Watched

__all__ = ["EVENTS", "PATHS", "Page"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = tuple[tuple[str, str], ...]

EVENTS = "/page/events"
_ASSETS = {
    f"/page/{name}": (content_type, (files("cacheinval.page") / name).read_bytes())
    for name, content_type in (
        ("page.css", "text/css; charset=utf-8"),
        ("page.js", "text/javascript; charset=utf-8"),
        ("good.svg", "image/svg+xml"),
        ("warning.svg", "image/svg+xml"),
        ("bad.svg", "image/svg+xml"),
    )
}
PATHS = ("/", EVENTS, *_ASSETS)

MOST_STREAMS = 32
STREAM_SECONDS = 30.0
"""A stream ends then, and its page begins another: whoever has gone without a word holds a place no longer than that."""

SEND_WITHIN = 10.0
"""Seconds after which a viewer that takes nothing is given up."""

FIRST_VIEW_WITHIN = 5.0

# Keys and reasons are other people's text. It is escaped; and were it not, nothing in it would run, load or be sent.
_HEADERS: Headers = (
    ("cache-control", "no-store"),
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
)


class Page:
    """The page, its stream of server-sent events, and what they load; ASGI, for the paths of `PATHS`.

    Args:
        watched: asks the fleet, and says how this process is: a client's `outlook`.
    """

    def __init__(self, watched: Watched) -> None:
        self._watch = Watch(watched)
        self._streams = 0
        self._closing = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI; `scope` has a GET or HEAD of one of `PATHS`."""
        path, head = scope["path"].removeprefix(scope.get("root_path", "")), scope["method"] == "HEAD"
        if path == EVENTS:
            await self._events(scope, receive, send, head=head)
        elif path in _ASSETS:
            await _answer(send, 200, *_ASSETS[path], head=head)
        else:
            view = None if head else await self._first_view()
            if view is None and not head:
                await _answer(
                    send, 503, "text/plain; charset=utf-8", b"This process cannot look at the fleet now.\n"
                )
            else:
                await _answer(
                    send, 200, "text/html; charset=utf-8", b"" if view is None else whole(view), head=head
                )

    async def _first_view(self) -> View | None:
        if self._closing.is_set():
            return None
        with self._watch.viewing(), suppress(TimeoutError):
            async with asyncio.timeout(FIRST_VIEW_WITHIN):
                return self._watch.view or await self._watch.next()
        return None

    async def _events(self, scope: Scope, receive: Receive, send: Send, *, head: bool) -> None:
        refusal = None
        if dict(scope["headers"]).get(b"sec-fetch-site", b"same-origin") not in (b"same-origin", b"none"):
            refusal = 403, b"accepted: requests of this page\n"
        elif self._closing.is_set():
            refusal = 503, b"this process is about to end\n"
        elif self._streams >= MOST_STREAMS:
            refusal = 503, f"{MOST_STREAMS} look at this page already: load it again and again\n".encode()
        if refusal is not None:
            await _answer(
                send, refusal[0], "text/plain; charset=utf-8", refusal[1], ("retry-after", "4"), head=head
            )
            return
        await _start(send, 200, ("content-type", "text/event-stream"), ("x-accel-buffering", "no"))
        if head:
            await send({"type": "http.response.body", "body": b""})
            return
        self._streams += 1
        streaming = asyncio.create_task(self._stream(send))
        ending = [asyncio.create_task(work) for work in (self._closing.wait(), _gone(receive))]
        try:
            await asyncio.wait(
                {streaming, *ending}, return_when=asyncio.FIRST_COMPLETED, timeout=STREAM_SECONDS
            )
        finally:
            self._streams -= 1
            for task in (streaming, *ending):
                task.cancel()
            await asyncio.wait({streaming, *ending}, timeout=SEND_WITHIN)
        with suppress(OSError):  # a timeout too: whoever looked takes nothing any more
            if streaming.done() and not streaming.cancelled():
                streaming.result()
            async with asyncio.timeout(SEND_WITHIN):
                await send({"type": "http.response.body", "body": b""})

    async def _stream(self, send: Send) -> None:
        """Sends what is seen, each time all of it: whoever is slow misses what was seen meanwhile, and nothing waits."""
        sent: dict[str, str] = {}
        body = b"retry: 1000\n\n"
        with self._watch.viewing():
            while True:
                async with asyncio.timeout(SEND_WITHIN):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                view = await self._watch.next()
                parts = {id_: str(part) for id_, part in view.parts.items() if sent.get(id_) != part}
                sent.update(parts)
                body = (
                    b"data: "
                    + msgspec.json.encode({"title": view.title, "level": view.level, "parts": parts})
                    + b"\n\n"
                )

    async def close(self) -> None:
        """Ends all streams at once, and begins no more."""
        self._closing.set()
        await self._watch.close()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(
    send: Send, status: int, content_type: str, body: bytes, *headers: tuple[str, str], head: bool = False
) -> None:
    length = () if head and not body else (("content-length", str(len(body))),)
    await _start(send, status, ("content-type", content_type), *length, *headers)
    await send({"type": "http.response.body", "body": b"" if head else body})


async def _start(send: Send, status: int, *headers: tuple[str, str]) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in (*_HEADERS, *headers)],
        }
    )
