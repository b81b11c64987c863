"""The page over ASGI: what it is sent with, what bounds it, and what it costs."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from waiting import Eventually

from cacheinval.client import Client
from cacheinval.errors import DatabaseError, PublishError
from cacheinval.monitoring import Monitoring, Readiness
from cacheinval.overview import Overview
from cacheinval.page import EVENTS, PATHS, Page, serving, watching
from cacheinval.recent import Recent
from cacheinval.settings import Settings


class Watched:
    """A process that counts how often it is made to ask."""

    def __init__(self) -> None:
        self.asked = self.counted = self.closed = 0
        self.fails: Exception | None = None
        self.database: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.answer: dict[str, Any] = {}
        self.instance = True
        self.answered: Callable[[dict[str, Any]], None] | None = None
        self.may_close = asyncio.Event()
        self.may_close.set()

    def status(self) -> dict[str, Any]:
        return {"id": "one", "state": "ready", "namespace": "shop", "watermark_age": None} | self.answer

    def recent(self, seconds: float) -> Recent:
        return Recent(0.0, 1.0)

    def inquire(self, answered: Callable[[dict[str, Any]], None]) -> Any:
        self.answered = answered
        return self

    async def ask(self, evictions: float) -> None:
        self.asked += 1
        await self.open.wait()
        if self.fails is not None:
            raise self.fails

    async def close(self) -> None:
        await self.may_close.wait()
        self.closed += 1

    async def overview(self) -> Any:
        self.counted += 1
        if self.database is not None:
            raise self.database
        return Overview()


class Viewer:
    """A browser that keeps a stream open; while `taking` is not set, it takes nothing."""

    def __init__(
        self, page: Any, *, headers: tuple[tuple[bytes, bytes], ...] = (), path: str = EVENTS
    ) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.ended = False
        self.taking = asyncio.Event()
        self.taking.set()
        self.gone = asyncio.Event()
        scope = {"type": "http", "method": "GET", "path": path, "headers": list(headers)}
        self.task = asyncio.create_task(page(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.taking.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message["body"]
            self.ended = not message.get("more_body", False)

    @property
    def seen(self) -> list[dict[str, Any]]:
        """What has arrived."""
        return [json.loads(data) for data in re.findall(rb"^data: (.*)$", self.body, re.MULTILINE)]

    @property
    def verdicts(self) -> str:
        """All that it was told of how the fleet is."""
        return "".join(seen["parts"].get("verdict", "") for seen in self.seen)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "INTERVAL", 0.02)
    monkeypatch.setattr(watching, "ANSWERS_WITHIN", 0.005)
    monkeypatch.setattr(watching, "LINGER", 0.05)


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
async def page(watched: Watched) -> AsyncIterator[Page]:
    page = Page(watched)
    yield page
    await page.close()


@asynccontextmanager
async def asking(page: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(page), base_url="http://one") as http:
        yield http


class TestWhatIsSent:
    async def test_nothing_of_it_may_run_but_its_own_script(self, page: Page) -> None:
        async with asking(page) as http:
            answer = await http.get("/")
            policy = dict(
                part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
            )
            for path in sorted(set(PATHS) - {EVENTS}):
                assert (await http.get(path)).headers["content-security-policy"] == answer.headers[
                    "content-security-policy"
                ]
        assert policy["default-src"] == "'none'"
        assert set(policy.values()) == {"'none'", "'self'"}
        assert policy["frame-ancestors"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", answer.text)
        assert re.findall(r"<script[^>]*>(.*?)</script>", answer.text) == [""]

    async def test_all_that_it_loads_is_served_here(self, page: Page) -> None:
        async with asking(page) as http:
            text = (await http.get("/")).text
            loaded = re.findall(r'<(?:link|script|img)[^>]* (?:href|src)="([^"]*)"', text)
            assert len(loaded) == 3
            for address in loaded:
                assert (await http.get(address)).status_code == 200
            script, style = (await http.get("/page/page.js")).text, (await http.get("/page/page.css")).text
        assert "://" not in style
        assert "://" not in script
        assert "url(" not in style
        assert "@import" not in style

    async def test_head_is_get_without_its_body(self, page: Page, watched: Watched) -> None:
        async with asking(page) as http:
            for path in PATHS:
                answer = await http.head(path)
                assert (answer.status_code, answer.content) == (200, b"")
        assert watched.asked == 0

    async def test_a_page_of_another_site_is_refused_the_stream(self, page: Page) -> None:
        for site, status in (
            (b"cross-site", 403),
            (b"same-site", 403),
            (b"same-origin", 200),
            (b"none", 200),
        ):
            viewer = Viewer(page, headers=((b"sec-fetch-site", site),))
            viewer.gone.set()
            await viewer.task
            assert viewer.status == status

    async def test_it_works_where_it_is_mounted(self, page: Page) -> None:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/admin/page/page.js",
            "root_path": "/admin",
            "headers": [],
        }
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def never() -> Any: ...

        await page(scope, never, send)
        assert sent[0]["status"] == 200


class TestMonitoring:
    async def test_the_page_is_there_if_it_is_wanted(self, page: Page, watched: Watched) -> None:
        def ready() -> Readiness:
            return Readiness(True, "ready")

        observed: Any = Client(Settings(broker_url="memory://", database_url=""))
        with_page, without = Monitoring(observed, ready, page), Monitoring(observed, ready)
        assert set(with_page.paths) - set(without.paths) == set(PATHS)
        for monitoring, status in ((with_page, 200), (without, 404)):
            async with asking(monitoring) as http:
                assert (await http.get("/")).status_code == status
                assert (await http.get("/page/page.css")).status_code == status
                assert (await http.post("/")).status_code == (405 if status == 200 else 404)
        assert watched.asked >= 1


class TestStream:
    async def test_it_sends_what_has_changed(
        self, page: Page, watched: Watched, eventually: Eventually
    ) -> None:
        viewer = Viewer(page)
        await eventually(lambda: len(viewer.seen) >= 2)
        assert viewer.headers["content-type"] == "text/event-stream"
        first, second = viewer.seen[:2]
        assert set(first["parts"]) == {"about", "verdict", "fleet", "lag", "writes"}
        assert (first["level"], "fleet" in second["parts"]) == ("good", False)
        watched.answer = {"state": "suspect", "reason": "<b>gone</b>"}
        await eventually(lambda: viewer.seen[-1]["level"] == "bad")
        assert "&lt;b&gt;gone" in viewer.verdicts

    async def test_a_twin_of_this_process_is_seen_as_another(
        self, page: Page, watched: Watched, eventually: Eventually
    ) -> None:
        viewer = Viewer(page)
        await eventually(lambda: viewer.seen)
        assert watched.answered is not None
        watched.answered(
            watched.status() | {"queue_depth": 7_007}
        )  # its own answer: the broker knows the queue
        watched.answered(watched.status() | {"pid": 7, "state": "suspect", "reason": "gap"})
        await eventually(lambda: "one may be stale" in viewer.verdicts)
        assert viewer.seen[-1]["level"] == "bad"
        assert "7,007" in "".join(seen["parts"].get("fleet", "") for seen in viewer.seen)

    async def test_what_is_asked_does_not_grow_with_those_who_look(
        self, page: Page, watched: Watched, eventually: Eventually
    ) -> None:
        viewers = [Viewer(page) for _ in range(10)]
        await eventually(lambda: all(len(viewer.seen) >= 5 for viewer in viewers))
        assert watched.asked <= max(len(viewer.seen) for viewer in viewers) + 1

    async def test_nothing_is_asked_when_nobody_looks(
        self, page: Page, watched: Watched, eventually: Eventually
    ) -> None:
        assert watched.asked == 0
        viewer = Viewer(page)
        await eventually(lambda: viewer.seen)
        viewer.gone.set()
        await viewer.task
        await eventually(lambda: watched.closed == 1)
        asked = watched.asked
        await asyncio.sleep(5 * watching.INTERVAL)
        assert (watched.asked, page._watch.view) == (asked, None)
        again = Viewer(page)
        await eventually(lambda: again.seen)
        assert watched.asked > asked

    async def test_who_comes_while_the_last_look_ends_does_not_wait_for_it(
        self, page: Page, watched: Watched, eventually: Eventually
    ) -> None:
        watched.may_close.clear()
        viewer = Viewer(page)
        await eventually(lambda: viewer.seen)
        viewer.gone.set()
        await viewer.task
        await eventually(lambda: page._watch.view is None)
        late = Viewer(page)
        await eventually(lambda: late.seen)
        assert watched.closed == 0
        watched.may_close.set()
        await eventually(lambda: watched.closed == 1)

    async def test_so_many_and_no_more(
        self, page: Page, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
    ) -> None:
        monkeypatch.setattr(serving, "MOST_STREAMS", 3)
        viewers = [Viewer(page) for _ in range(3)]
        await eventually(lambda: all(viewer.seen for viewer in viewers))
        refused = Viewer(page)
        await refused.task
        assert (refused.status, refused.headers["retry-after"]) == (503, "4")
        assert refused.body == b"3 look at this page already: load it again and again\n"
        viewers[0].gone.set()
        await viewers[0].task
        welcome = Viewer(page)
        await eventually(lambda: welcome.seen)

    async def test_who_is_slow_misses_and_keeps_nobody_waiting(
        self, page: Page, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
    ) -> None:
        monkeypatch.setattr(serving, "SEND_WITHIN", 0.5)
        slow, quick = Viewer(page), Viewer(page)
        await eventually(lambda: slow.seen and quick.seen)
        slow.taking.clear()
        seen = len(slow.seen)
        await eventually(lambda: len(quick.seen) > seen + 5)
        slow.taking.set()
        await eventually(lambda: len(slow.seen) > seen)
        assert len(slow.seen) < len(quick.seen)
        slow.taking.clear()
        await eventually(slow.task.done)
        assert (slow.task.exception(), page._streams) == (None, 1)

    async def test_a_stream_has_an_end(
        self, page: Page, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
    ) -> None:
        monkeypatch.setattr(serving, "STREAM_SECONDS", 0.05)
        viewer = Viewer(page)
        await eventually(viewer.task.done)
        assert (viewer.ended, page._streams) == (True, 0)

    async def test_who_is_there_and_takes_nothing_holds_its_place_for_a_while_only(
        self, page: Page, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
    ) -> None:
        """As the server sees one whose host is gone: a connection that stands, and of which nothing is heard."""
        monkeypatch.setattr(serving, "MOST_STREAMS", 1)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            web = uvicorn.Server(uvicorn.Config(page, lifespan="off", log_config=None))
            running = asyncio.create_task(web.serve([listener]))
            idle, took_it = await self._ask(port)
            refused, answer = await self._ask(port)
            assert (took_it.split()[1], answer.split()[1]) == (b"200", b"503")
            idle.close()
            await eventually(lambda: page._streams == 0, timeout=30)
            monkeypatch.setattr(serving, "STREAM_SECONDS", 0.2)
            still_idle, took_it = await self._ask(port)
            assert took_it.split()[1] == b"200"
            await eventually(lambda: page._streams == 0, timeout=30)
            welcome, answer = await self._ask(port)
            assert answer.split()[1] == b"200"
            for one in (refused, still_idle, welcome):
                one.close()
            web.should_exit = True
            await page.close()
            await asyncio.wait_for(running, 30)

    async def _ask(self, port: int) -> tuple[asyncio.StreamWriter, bytes]:
        """A viewer that reads the first line of its answer and nothing after that."""
        async with asyncio.timeout(30):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=64)
            writer.write(f"GET {EVENTS} HTTP/1.1\r\nHost: one\r\n\r\n".encode())
            return writer, await reader.readline()

    async def test_closing_ends_all_of_them_at_once(self, watched: Watched, eventually: Eventually) -> None:
        page = Page(watched)
        viewers = [Viewer(page) for _ in range(3)]
        await eventually(lambda: all(viewer.seen for viewer in viewers))
        viewers[0].taking.clear()
        await page.close()
        await eventually(lambda: all(viewer.task.done() for viewer in viewers[1:]))
        assert all(viewer.ended for viewer in viewers[1:])
        late = Viewer(page)
        await late.task
        assert (late.status, watched.closed) == (503, 1)
        async with asking(page) as http:
            assert (await http.get("/")).status_code == 503
        assert watched.closed == 1  # and nobody has begun to look again
        viewers[0].gone.set()
        viewers[0].task.cancel()

    async def test_who_is_cancelled_leaves_nothing(
        self, page: Page, watched: Watched, eventually: Eventually
    ) -> None:
        viewer = Viewer(page)
        await eventually(lambda: viewer.seen)
        viewer.task.cancel()
        await asyncio.wait({viewer.task})
        assert (page._streams, page._watch._viewers) == (0, 0)
        await eventually(lambda: watched.closed == 1)


class TestTrouble:
    async def test_a_broker_that_does_not_answer_delays_nothing(
        self, page: Page, watched: Watched, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
    ) -> None:
        watched.open.clear()
        monkeypatch.setattr(watching, "ASK_WITHIN", 0.2)
        viewer = Viewer(page)
        await eventually(lambda: len(viewer.seen) >= 3)
        assert watched.asked == 1
        await eventually(lambda: "does not answer within" in viewer.verdicts)

    async def test_a_defect_in_asking_is_shown_and_asked_again(
        self, page: Page, watched: Watched, caplog: pytest.LogCaptureFixture, eventually: Eventually
    ) -> None:
        watched.fails = ZeroDivisionError("nothing to divide by")
        viewer = Viewer(page)
        await eventually(lambda: "nothing to divide by" in viewer.verdicts)
        await eventually(lambda: watched.asked >= 3)
        assert "the fleet cannot be asked" in caplog.text

    async def test_a_broker_that_is_away_is_said(
        self, page: Page, watched: Watched, eventually: Eventually
    ) -> None:
        watched.fails = PublishError("the broker cannot be reached: <refused>")
        viewer = Viewer(page)
        await eventually(lambda: viewer.seen)
        await eventually(lambda: "&lt;refused&gt;" in viewer.verdicts)

    async def test_an_alarm_of_the_broker_is_named(
        self, watched: Watched, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
    ) -> None:
        """What a blocked connection does not take is only late; why, the connection knows."""
        monkeypatch.setattr(watching, "ASK_WITHIN", 0.01)
        watched.open.clear()
        watched.answer = {"broker": {"url": "amqp://b", "consumer": "connected", "publisher": "blocked"}}
        page = Page(watched)
        viewer = Viewer(page)
        await eventually(lambda: "Nobody can be asked from here" in viewer.verdicts)
        assert "The broker blocks publishers" in viewer.verdicts
        assert "<code>rabbitmq-diagnostics alarms</code>" in viewer.verdicts
        await page.close()

    async def test_that_nobody_has_subscribed_yet_is_no_trouble(
        self, watched: Watched, eventually: Eventually
    ) -> None:
        watched.fails = PublishError("no exchange")
        watched.instance = False
        page = Page(watched)
        async with asking(page) as http:
            text = (await http.get("/")).text
        await page.close()
        assert "Asking the fleet." in text

    async def test_without_a_database_nobody_is_counted(
        self, watched: Watched, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
    ) -> None:
        monkeypatch.setattr(watching, "COUNT_EVERY", 0.0)
        watched.database = DatabaseError("<away>")
        page = Page(watched)
        viewer = Viewer(page)
        await eventually(lambda: watched.counted >= 3)
        await eventually(lambda: "whether there are more is unknown: &lt;away&gt;" in viewer.verdicts)
        monkeypatch.setattr(watched, "overview", None)
        counted, seen = watched.counted, len(viewer.seen)
        await eventually(lambda: len(viewer.seen) > seen + 3)
        assert watched.counted <= counted + 1
        await page.close()

    async def test_a_defect_is_said_and_ends_nothing(
        self,
        page: Page,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        eventually: Eventually,
    ) -> None:
        drawn = watching.draw
        viewer = Viewer(page)
        await eventually(lambda: viewer.seen)

        def fail(*_: object) -> Any:
            raise ZeroDivisionError

        monkeypatch.setattr(watching, "draw", fail)
        await eventually(lambda: "cannot show the fleet" in caplog.text)
        await eventually(lambda: viewer.seen[-1]["level"] == "warning")
        assert "cannot show how the fleet is" in viewer.verdicts
        monkeypatch.setattr(watching, "draw", drawn)
        seen = len(viewer.seen)
        await eventually(lambda: len(viewer.seen) > seen)

    async def test_a_page_that_cannot_be_drawn_says_so(
        self,
        page: Page,
        watched: Watched,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(serving, "FIRST_VIEW_WITHIN", 0.05)
        monkeypatch.setattr(watched, "status", lambda: {"id": 1})
        async with asking(page) as http:
            assert (await http.get("/")).status_code == 503
        assert "cannot look at the fleet" in caplog.text
