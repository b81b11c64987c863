"""Decorators, on `memory://`: the cache in the process, without any server."""

import asyncio
import functools
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cacheinval import Client, InvalidKeyError, Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def client(namespace: str) -> AsyncIterator[Client]:
    async with Client(Settings(broker_url="memory://", database_url="", namespace=namespace)) as client:
        await client.wait_ready(30)
        yield client


async def refuse() -> Any:
    pytest.fail("loaded although it was cached")


async def served(client: Client, key: str) -> Any:
    """The entry that a read would be given; asking is no read."""
    return await client.cache.would_serve(key)


class Counted:
    """An argument that counts how often it is formatted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.formatted = 0

    def __format__(self, spec: str) -> str:
        self.formatted += 1
        return self.name


# Names and results


async def test_cached_keeps_name_arguments_and_results(client: Client) -> None:
    calls = []

    @client.cached("sum:{first}:{second}", ttl=60, tags=["sums"])
    async def add(first: int, second: int = 2) -> int:
        """Adds."""
        calls.append((first, second))
        return first + second

    assert (add.__name__, add.__doc__) == ("add", "Adds.")
    assert [await add(1), await add(first=1), await add(1, 2), await add(1, second=3)] == [3, 3, 3, 4]
    assert calls == [(1, 2), (1, 3)]
    await client.invalidate(tags=["sums"])
    assert await add(1) == 3
    assert len(calls) == 3


async def test_cached_on_attributes_and_none(client: Client) -> None:
    loads: list[str] = []

    @client.cached("k:{argument.name}")
    async def nothing(argument: Counted) -> None:
        loads.append(argument.name)

    argument = Counted("a")
    await nothing(argument)
    await nothing(argument)
    argument.name = "b"
    await nothing(argument)
    assert loads == ["a", "b"]


async def test_cached_calls_with_the_arguments_that_it_was_called_with(client: Client) -> None:
    absent = object()
    seen: list[Any] = []

    @client.cached("k:{first}:{second}:{key}:{args}:{name}:{kwargs}")
    async def read(
        first: int, /, second: Any = absent, *args: int, key: int = 1, name: str, **kwargs: int
    ) -> int:
        seen.append((first, second, args, key, name, kwargs))
        return len(seen)

    assert await read(1, name="x") == 1
    assert await read(1, absent, name="x", key=1) == 1
    assert await read(1, 2, 3, 4, name="y", key=5, more=6) == 2
    assert seen == [(1, absent, (), 1, "x", {}), (1, 2, (3, 4), 5, "y", {"more": 6})]
    with pytest.raises(TypeError, match="name"):
        await read(1)


TEMPLATES = [
    "k:{number}",
    'it\'s "{number}" {{braces}} \\n \n ü {number!r:>5}',
    "{number}'''\"\"\"{number}\\",
    "{number:03d}",
    "k",
]


@pytest.mark.parametrize("template", TEMPLATES)
async def test_the_key_is_what_the_template_gives(client: Client, template: str) -> None:
    @client.cached(template)
    async def read(number: int) -> int:
        return number

    assert await read(7) == 7
    assert await client.cache.get_or_set(template.format(number=7), refuse) == 7


# Tags


async def test_tags_are_made_of_the_arguments(client: Client) -> None:
    loads: list[str] = []

    @client.cached("product:{product_id}", tags=["category:{category}", "products", "{{braces}}"])
    async def read(product_id: str, category: str) -> str:
        loads.append(product_id)
        return product_id

    async def loaded_after(tag: str) -> list[str]:
        await read("a", "lamps"), await read("b", category="chairs")
        loads.clear()
        await client.invalidate(tags=[tag])
        await read("a", "lamps"), await read("b", category="chairs")
        return loads

    assert await loaded_after("category:lamps") == ["a"]
    assert await loaded_after("category:chairs") == ["b"]
    assert await loaded_after("products") == ["a", "b"]
    assert await loaded_after("{braces}") == ["a", "b"]
    assert await loaded_after("category:{category}") == []


async def test_an_eviction_of_such_a_tag_voids_the_load_in_flight(client: Client) -> None:
    began, finish = asyncio.Event(), asyncio.Event()

    @client.cached("k", tags=["t:{number}"])
    async def read(number: int) -> int:
        began.set()
        await finish.wait()
        return number

    reading = asyncio.create_task(read(1))
    await began.wait()
    await client.invalidate(tags=["t:1"])
    finish.set()
    assert await reading == 1
    assert await served(client, "k") is None


async def test_a_hit_makes_no_tags(client: Client) -> None:
    @client.cached("k", tags=["t:{argument}"])
    async def read(argument: Counted) -> int:
        return 1

    argument = Counted("x")
    await read(argument)
    assert argument.formatted == 1
    await read(argument)  # the first hit judges the entry, and the others rest on that
    formatted = argument.formatted
    await read(argument)
    assert argument.formatted == formatted


# What is refused


async def reads(number: int) -> int:
    return number


@pytest.mark.parametrize(
    "template",
    ["k:{missing}", "k:{}", "k:{0}", "k:{missing.x}", "k:{number:{missing}}", "k:{", "k:{number", ""],
)
def test_a_template_that_cannot_work_is_refused_at_once(template: str, namespace: str) -> None:
    client = Client(Settings(broker_url="memory://", database_url="", namespace=namespace))
    with pytest.raises(InvalidKeyError, match="key template"):
        client.cached(template)(reads)
    with pytest.raises(InvalidKeyError, match="tag template"):
        client.cached("k", tags=[template])(reads)
    with pytest.raises(InvalidKeyError, match="key template"):
        client.invalidates(template)(reads)
    with pytest.raises(InvalidKeyError, match="tag template"):
        client.invalidates(tags=[template])(reads)


async def test_what_is_wrong_with_a_template_is_said(client: Client) -> None:
    with pytest.raises(InvalidKeyError) as refused:
        client.cached("k:{number}", tags=["t:{nubmer}"])(reads)
    assert str(refused.value) == (
        "tag template 't:{nubmer}' names 'nubmer'; accepted: the arguments of reads(number: int) -> int"
    )
    with pytest.raises(InvalidKeyError, match="not the single str 'products'"):
        client.cached("k", tags="products")(reads)
    with pytest.raises(InvalidKeyError, match="is a function, not a string"):
        client.cached("k", tags=[lambda product: "t"])(reads)  # type: ignore[list-item]
    with pytest.raises(InvalidKeyError, match="nothing to invalidate"):
        client.invalidates()


def plain(number: int) -> int:
    return number


async def generator(number: int) -> AsyncIterator[int]:
    yield number


@pytest.mark.parametrize("function", [plain, generator, int, staticmethod(reads)])
async def test_what_is_no_coroutine_function_is_refused(client: Client, function: Any) -> None:
    for decorate in (client.cached("k"), client.invalidates("k")):
        with pytest.raises(TypeError, match=r"is no coroutine function; accepted: async def without yield"):
            decorate(function)


async def test_what_is_as_good_as_a_coroutine_function_is_accepted(client: Client) -> None:
    class Reader:
        async def __call__(self, number: int) -> int:
            return number

    by_object = client.cached("object:{number}")(Reader())
    partly = client.cached("part:{number}")(functools.partial(reads, number=2))
    assert [await by_object(1), await partly(), await partly(number=3)] == [1, 2, 3]


# What is not stored


async def test_what_is_skipped_is_returned_and_not_stored(client: Client) -> None:
    found: list[int | None] = [None, None, 0, 1]

    @client.cached("k", skip_if=lambda value: value is None)
    async def read() -> int | None:
        await asyncio.sleep(0)
        return found.pop(0)

    assert await asyncio.gather(read(), read()) == [None, None], "one load for both"
    assert [await read(), await read(), await read()] == [None, 0, 0]
    assert found == [1]


async def test_what_is_built_of_a_skipped_value_is_not_stored_either(client: Client) -> None:
    @client.cached("part", skip_if=lambda value: value == [])
    async def part() -> list[int]:
        return []

    @client.cached("whole")
    async def whole() -> list[Any]:
        return [await part()]

    await whole()
    assert await served(client, "whole") is None


async def test_a_refresh_that_is_skipped_drops_what_was_there(client: Client) -> None:
    values: list[int | None] = [1, None, 2]

    @client.cached("k", skip_if=lambda value: value is None)
    async def read() -> int | None:
        return values.pop(0)

    assert [await read(), await read.refresh(), await read()] == [1, None, 2]


async def test_a_test_that_fails_fails_the_load(client: Client) -> None:
    @client.cached("k", skip_if=lambda value: value["missing"])
    async def read() -> dict[str, int]:
        return {}

    with pytest.raises(KeyError):
        await read()
    assert await served(client, "k") is None


async def test_what_the_primary_gave_is_tested_too(client: Client) -> None:
    async def of_primary() -> None:
        return None

    @client.cached("k", version=lambda value: None, primary=of_primary, skip_if=lambda value: value is None)
    async def of_replica() -> int | None:
        return 1

    await client.invalidate("k")
    assert await of_replica() is None
    assert await served(client, "k") is None


# Key, invalidate, refresh


async def test_the_key_of_a_function(client: Client) -> None:
    @client.cached("sum:{first}:{second}")
    async def add(first: int, second: int = 2) -> int:
        return first + second

    await add(1)
    assert add.key(1) == add.key(first=1, second=2) == "sum:1:2"
    assert await client.cache.get_or_set(add.key(1), refuse) == 3
    with pytest.raises(TypeError, match="third"):
        add.key(1, third=3)  # type: ignore[call-arg]


async def test_invalidating_one_result_reaches_everyone(client: Client, namespace: str) -> None:
    loads: list[int] = []

    def reader(client: Client) -> Any:
        @client.cached("k:{number}")
        async def read(number: int) -> int:
            loads.append(number)
            return number

        return read

    async with Client(Settings(broker_url="memory://", database_url="", namespace=namespace)) as other:
        await other.wait_ready(30)
        here, there = reader(client), reader(other)
        await here(1), await there(1), await there(2)
        await here.invalidate(1)
        async with asyncio.timeout(30):
            while await served(other, "k:1"):
                await asyncio.sleep(0.01)
        assert await served(client, "k:1") is None
        assert await served(other, "k:2") is not None


async def test_refreshing_loads_now_and_stores_here_alone(client: Client, namespace: str) -> None:
    values = iter(range(10))

    @client.cached("k:{number}", tags=["t:{number}"], ttl=60)
    async def read(number: int) -> int:
        return next(values)

    before = client.stats()["publisher"]
    assert [await read(7), await read.refresh(7), await read(7)] == [0, 1, 1]
    assert client.stats()["publisher"] == before
    await client.invalidate(tags=["t:7"])
    assert await read(7) == 2, "the tags of a refresh are those of a read"
    assert client.stats()["publisher"] != before


async def test_an_eviction_voids_a_refresh(client: Client) -> None:
    began, finish = asyncio.Event(), asyncio.Event()

    @client.cached("k")
    async def read() -> str:
        began.set()
        await finish.wait()
        return "old"

    refreshing = asyncio.create_task(read.refresh())
    await began.wait()
    await read.invalidate()
    finish.set()
    assert await refreshing == "old"
    assert await served(client, "k") is None


async def test_methods_leave_self_out(client: Client) -> None:
    class Prices:
        def __init__(self, price: int) -> None:
            self.price = price

        @client.cached("price:{product_id}")
        async def read(self, product_id: str, /, currency: str = "EUR") -> int:
            return self.price

        @classmethod
        @client.cached("class:{product_id}")
        async def of_class(cls, product_id: str) -> str:
            return cls.__name__

        @staticmethod
        @client.cached("static:{product_id}")
        async def of_none(product_id: str) -> str:
            return product_id

    one, two = Prices(1), Prices(2)
    assert [await one.read("a"), await two.read("a"), await two.read("b")] == [1, 1, 2]
    assert one.read.key("a") == Prices.read.key("a", currency="USD") == "price:a"
    await two.read.invalidate("a")
    assert await two.read("a") == 2
    assert await Prices.read.refresh(one, "a") == 1
    assert [await two.read("a"), await two.read("b")] == [1, 2]
    with pytest.raises(TypeError, match="product_id"):
        await one.read.refresh("a")  # type: ignore[attr-defined]  # no object to load by

    assert await Prices.of_class("a") == await one.of_class("a") == "Prices"
    assert Prices.of_class.key("a") == "class:a"  # type: ignore[attr-defined]
    assert await Prices.of_none("a") == "a"
    assert Prices.of_none.key("a") == "static:a"


async def test_a_method_whose_key_names_self_does_not_leave_it_out(client: Client) -> None:
    class Prices:
        shop = "here"

        @client.cached("price:{self.shop}:{product_id}")
        async def read(self, product_id: str) -> int:
            return 1

    prices: Any = Prices()
    await prices.read("a")
    assert Prices.read.key(prices, "a") == "price:here:a"  # type: ignore[call-arg,arg-type]
    with pytest.raises(TypeError, match="product_id"):
        prices.read.key("a")


# Copies


@pytest.mark.parametrize("copy", [True, lambda value: {"list": list(value["list"])}], ids=["deep", "by hand"])
async def test_copies_keep_what_is_stored_as_it_was(client: Client, copy: Any) -> None:
    @client.cached("k", copy=copy)
    async def read() -> dict[str, list[int]]:
        await asyncio.sleep(0)
        return {"list": [1]}

    def change(value: Any) -> None:
        assert value == {"list": [1]}
        value["list"].append(2)
        value["more"] = []

    one, two = await asyncio.gather(read(), read())
    change(one), change(two)
    for _ in range(3):  # the first hit judges the entry, and the others rest on that
        change(await read())
    change(await read.refresh())
    change(await read())


async def test_without_copies_everybody_shares_one_object(client: Client) -> None:
    @client.cached("k")
    async def read() -> list[int]:
        return [1]

    assert await read() is await read()


# Invalidating when a function has run


async def test_what_a_function_names_is_evicted_when_it_has_returned(client: Client) -> None:
    cached: dict[str, Any] = {}

    async def cache_all() -> None:
        for key in ("price:a", "price:b", "fixed"):
            await client.cache.get_or_set(key, lambda: reads(1))
        await client.cache.get_or_set("tagged", lambda: reads(1), tags=["shop:here"])

    async def left() -> set[str]:
        return {key for key in ("price:a", "price:b", "fixed", "tagged") if await served(client, key)}

    @client.invalidates("price:{product_id}", "fixed", tags=["shop:{shop}"])
    async def change(product_id: str, *, shop: str, fails: bool = False) -> str:
        """Changes."""
        cached["while it runs"] = await left()
        if fails:
            raise LookupError
        return "changed"

    assert (change.__name__, change.__doc__) == ("change", "Changes.")
    await cache_all()
    with pytest.raises(LookupError):
        await change("a", shop="here", fails=True)
    assert await left() == {"price:a", "price:b", "fixed", "tagged"}, "nothing has changed"
    assert await change("a", shop="here") == "changed"
    assert cached["while it runs"] == {"price:a", "price:b", "fixed", "tagged"}
    assert await left() == {"price:b"}


async def test_a_function_that_names_what_could_not_be_evicted_does_not_run(client: Client) -> None:
    @client.invalidates("{name}", tags=["{tag}"])
    async def change(name: str, tag: str = "t") -> None:
        pytest.fail("ran")

    with pytest.raises(InvalidKeyError, match="key '' is empty"):
        await change("")
    with pytest.raises(InvalidKeyError, match=r"tag .* contains NUL"):
        await change("k", tag="\0")


async def test_methods_that_invalidate(client: Client) -> None:
    class Prices:
        @client.cached("price:{product_id}")
        async def read(self, product_id: str) -> int:
            return 1

        @client.invalidates("price:{product_id}")
        async def change(self, product_id: str) -> None: ...

    prices = Prices()
    await prices.read("a")
    await prices.change("a")
    assert await served(client, prices.read.key("a")) is None


# Types


# Both work offline: pyright itself would fetch its program when it first runs, basedpyright brings it along.
CHECKERS = {
    "mypy": ["-m", "mypy", "--strict", "--no-error-summary"],
    "pyright": ["-m", "basedpyright", "--pythonpath", sys.executable],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_types_are_kept(checker: str) -> None:
    """Of the function that is decorated, and of what is read: see `typed_decorating.py`."""
    snippet = Path(__file__).with_name("typed_decorating.py")
    command = [sys.executable, *CHECKERS[checker], snippet]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.stderr == ""
    refused = {int(line) for line in re.findall(rf"{snippet.name}:(\d+)(?::\d+ -|:) error: ", checked.stdout)}
    wrong = {
        number
        for number, line in enumerate(snippet.read_text().splitlines(), 1)
        if line.endswith("  # wrong")
    }
    assert refused == wrong, checked.stdout
    assert len(wrong) > 5


async def test_a_template_may_name_an_argument_in_how_another_is_written(client: Client) -> None:
    @client.cached("k:{number:{width}}")
    async def read(number: int, width: int = 3) -> int:
        return number

    assert await read(7) == 7
    assert read.key(7) == "k:  7"


def test_parameters_that_the_compiled_function_would_hide_are_refused(client: Client) -> None:
    with pytest.raises(ValueError, match=r"cacheinval_key.*accepted"):

        @client.cached("k:{cacheinval_key}")
        async def read(cacheinval_key: int) -> int:
            return cacheinval_key
