"""The page in a real browser, of real processes, with a real broker and database."""

import asyncio
import re
import shutil
import signal
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, async_playwright, expect
from running import Process, Started, run

from cacheinval.sandbox import RabbitMQ, Redis

pytestmark = pytest.mark.timeout(180)  # each starts several processes, and a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = "<img src=//evil.test/x onerror=alert(1)>"
SOON = 20_000  # milliseconds: for a machine that is busy with other things

expect.set_options(timeout=SOON)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """The browser that is installed; `config/setup.sh servers chromium` installs one."""
    if CHROMIUM is None:
        pytest.skip("no browser was found: apt-get install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield browser
        finally:
            await browser.close()


class Watching:
    """A page that is looked at, and whatever it should not have done."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.wrong: list[str] = []
        context.on("request", lambda request: self._same_origin(request.url, url))
        context.on("console", self._said)
        context.on("weberror", lambda error: self.wrong.append(str(error.error)))

    def _same_origin(self, address: str, url: str) -> None:
        if not address.startswith(url + "/"):
            self.wrong.append(f"a request to {address}")

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(f"{message.type}: {message.text}")


async def look(browser: Browser, process: Process, **options: Any) -> tuple[Page, Watching]:
    """Opens the page of a process."""
    context = await browser.new_context(**options)
    watching = Watching(context, process.url)
    page = await context.new_page()
    await page.goto(process.url + "/", timeout=SOON)
    return page, watching


async def two(started: Started, settings: dict[str, object]) -> list[Process]:
    """Two instances, ready and registered."""
    names = "shop-1", "shop-2"
    both = await asyncio.gather(
        *(started.start_http("serve", **settings, instance_id=name) for name in names)
    )
    for process in both:
        await started.until(process, "ready")
        await process.eventually_logged("registered")
    return both


def row(page: Page, name: str) -> Any:
    """The row of an instance."""
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name))


async def colours(page: Page) -> list[str]:
    """Of the text, and of what is behind it."""
    return await page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )


async def test_the_fleet_its_writes_and_the_loss_of_the_broker_are_seen(
    browser: Browser, started: Started, settings: dict[str, object], own_rabbitmq: RabbitMQ
) -> None:
    writer, reader = await two(started, settings | {"broker_url": own_rabbitmq.url})
    page, watching = await look(browser, reader)
    sentence = page.locator("#sentence")
    await expect(sentence).to_have_text("All 2 instances are fresh")
    await expect(page.get_by_role("heading", level=1)).to_contain_text(
        re.compile(r"proven up to \d+\.\d s ago")
    )
    await expect(page).to_have_title(re.compile("^Fresh · "))
    for name in ("shop-1", "shop-2"):
        await expect(row(page, name).locator(".state")).to_contain_text("fresh")

    # A write: here by whom, there after how long. Its key is text, whatever it holds.
    assert (await started.put(writer, quote(HOSTILE, safe=""), "1")).status_code == 201
    # (Where the writer is slow the relay publishes it, too: that is another line.)
    write = page.get_by_role("listitem").filter(has_text=f"product:{HOSTILE}").filter(has_text="wrote it")
    await expect(write.locator(".count")).to_have_text(re.compile(r"2 of 2 in [\d.]+ m?s"))
    chips = write.locator(".chips").get_by_role("listitem")
    await expect(chips.filter(has_text="shop-1")).to_have_text("shop-1 wrote it")
    await expect(chips.filter(has_text="shop-2")).to_have_text(re.compile(r"shop-2 [\d.]+ m?s"))
    await expect(page.locator("#lag .figures")).to_contain_text("half within")
    assert await page.locator("img").count() == 0

    light = await colours(page)
    await page.emulate_media(color_scheme="dark")
    dark = await colours(page)
    assert light != dark
    await page.set_viewport_size({"width": 400, "height": 800})
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert await page.evaluate(overflow) <= 0

    # What is drawn anew stays what it is: a node that was there before is there still.
    await page.evaluate(
        "document.querySelector('#fleet tbody tr').dataset.kept = 'yes'; window.seen = document.querySelector('#fleet tbody tr')"
    )
    await own_rabbitmq.kill()
    await expect(sentence).to_contain_text(
        re.compile(r"^shop-2 may be stale since \d\d:\d\d:\d\d: the broker cannot be reached")
    )
    await expect(page.locator("#verdict")).to_contain_text("See that RabbitMQ runs")
    await expect(row(page, "shop-2").locator(".state")).to_contain_text("suspect since")
    await expect(row(page, "shop-1").locator(".state")).to_contain_text("not asked")
    await expect(page).to_have_title(re.compile("^May be stale · "))
    assert await page.evaluate("window.seen.isConnected")

    await own_rabbitmq.start()
    await expect(sentence).to_have_text("All 2 instances are fresh", timeout=40_000)
    await expect(row(page, "shop-2")).to_contain_text("new subscription")  # its last gap, which is not short
    for width in (1280, 400):
        await page.set_viewport_size({"width": width, "height": 800})
        assert await page.evaluate(overflow) <= 0
    assert watching.wrong == []


async def test_one_that_does_not_answer_is_named(
    browser: Browser, started: Started, settings: dict[str, object]
) -> None:
    there, frozen = await two(started, settings)
    page, watching = await look(browser, there)
    sentence = page.locator("#sentence")
    await expect(sentence).to_have_text("All 2 instances are fresh")
    frozen.signal(signal.SIGSTOP)
    try:
        await expect(sentence).to_contain_text(re.compile(r"^shop-2 has not answered since \d\d:\d\d:\d\d"))
        await expect(row(page, "shop-2").locator(".state")).to_contain_text("registered in the database")
    finally:
        frozen.signal(signal.SIGCONT)
    await expect(sentence).to_have_text("All 2 instances are fresh")
    frozen.signal(signal.SIGTERM)
    assert await frozen.ended(10) == 0
    await expect(sentence).to_have_text("The one instance is fresh")
    assert watching.wrong == []


async def test_open_streams_do_not_keep_a_process_from_ending(
    browser: Browser, started: Started, settings: dict[str, object], redis: Redis
) -> None:
    settings |= {"database_url": "", "cache_url": redis.url}
    process = await started.start_http("worker", **settings, instance_id="shop-1")
    await started.until(process, "ready")
    pages = [(await look(browser, process))[0] for _ in range(2)]
    for page in pages:
        await expect(page.locator("#sentence")).to_contain_text("The one instance is subscribed")
        shown = await page.locator("#about time").inner_text()
        await expect(page.locator("#about time")).not_to_have_text(shown)  # its stream is open
    process.signal(signal.SIGTERM)
    assert await process.ended(10) == 0
    assert process.log[-1]["event"] == "stopped"
    assert not [line for line in process.log if line["level"] in ("WARNING", "ERROR")]
    for page in pages:
        await expect(page.get_by_role("alert")).to_contain_text("heard nothing from its server")


async def test_without_javascript_it_is_a_page_that_loads_anew(
    browser: Browser, started: Started, settings: dict[str, object]
) -> None:
    assert (await run("schema", "apply", **settings))[0] == 0
    relay, service = await asyncio.gather(
        started.start_http("relay", **settings, instance_id="the-relay"),
        started.start_http("serve", **settings, instance_id="shop-1"),
    )
    await started.until(service, "ready")
    await started.until(relay, "ready")
    assert (await started.put(service, "kettle", "1")).status_code == 201
    page, watching = await look(browser, relay, java_script_enabled=False)
    await expect(page.locator("#sentence")).to_have_text("The one instance is fresh")
    await expect(page.locator("#writes")).to_contain_text("product:kettle")
    await expect(page.locator("#fleet")).to_contain_text("served by a relay, the-relay")
    shown = await page.locator("#about time").inner_text()
    await expect(page.locator("#about time")).not_to_have_text(shown)
    assert watching.wrong == []


async def test_who_finds_no_place_is_told_and_sees_how_it_is_nevertheless(
    browser: Browser, started: Started
) -> None:
    process = await started.start_http("serve", broker_url="memory://", database_url="", http_port=0)
    context = await browser.new_context()
    await context.route("**/page/events", lambda route: route.fulfill(status=503, body="too many"))
    page = await context.new_page()
    await page.goto(process.url + "/", timeout=SOON)
    told, clock = page.locator("#live"), page.locator("#about time")
    await expect(told).to_contain_text("Too many look at this page already")
    shown = await clock.inner_text()
    await expect(clock).not_to_have_text(shown)
    await context.unroute("**/page/events")
    await expect(told).to_have_text("")
    shown = await clock.inner_text()
    await expect(clock).not_to_have_text(shown)


async def test_it_can_be_turned_off(started: Started) -> None:
    settings = {"broker_url": "memory://", "database_url": "", "http_port": 0, "page": "off"}
    process = await started.start_http("serve", **settings)
    for path in ("/", "/page/events", "/page/page.js"):
        assert (await started.get(process, path)).status_code == 404
    assert (await started.get(process, "/status")).status_code == 200


async def test_products_are_where_they_were(started: Started) -> None:
    """The page is at its own paths, and nothing else is."""
    service = await started.start_http("serve", broker_url="memory://", database_url="", http_port=0)
    await started.until(service, "ready")
    assert (await started.put(service, "page%2Fevents", "1")).status_code == 201
    assert (await started.get(service, "/products/page%2Fevents")).json()["id"] == "page/events"
    assert (await started.get(service, "/")).headers["content-type"] == "text/html; charset=utf-8"
    for path in ("/products/", "/page", "/page/", "/page/page.html", "/products/page.css"):
        assert (await started.get(service, path)).status_code in (404, 422)
