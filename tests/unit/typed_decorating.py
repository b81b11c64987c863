"""What type checkers say about decorators, reads and writes: each line that ends in `# wrong` is refused, and no other;
`assert_type` says what is revealed. Checked by `test_decorating.py`, never run."""

from typing import Any, assert_type

from cacheinval import Client, Read, Receipt, Transaction


async def of_functions(client: Client) -> None:
    @client.cached("sum:{first}:{second}", tags=["first:{first}"], skip_if=lambda total: total is None)
    async def add(first: int, second: int = 2, *, exact: bool = False) -> int | None:
        return first + second

    assert_type(await add(1), int | None)
    assert_type(await add(1, second=2, exact=True), int | None)
    assert_type(await add.refresh(1, exact=True), int | None)
    assert_type(add.key(1), str)
    await add.invalidate(1, 2)
    await add("1")  # wrong
    add.key(third=1)  # wrong
    await add.refresh()  # wrong
    await add.invalidate(1, 2, 3)  # wrong

    @client.cached("list:{n}", copy=True)
    async def numbers(n: int) -> list[int]:
        return [n]

    assert_type(await numbers(1), list[int])

    @client.cached("list:{n}", copy=list, primary=numbers)
    async def replicated(n: int) -> list[int]:
        return [n]

    assert_type(await replicated(1), list[int])

    @client.invalidates("sum:{first}")
    async def change(first: int) -> str:
        return ""

    assert_type(await change(1), str)
    await change("1")  # wrong

    @client.cached("k")  # wrong
    def plain() -> int:
        return 1


def decorating(client: Client) -> type[Any]:
    class Prices:
        @client.cached("price:{product_id}")
        async def read(self, product_id: str) -> float:
            return 1.0

        @client.invalidates("price:{product_id}")
        async def change(self, product_id: str) -> None: ...

    async def of_methods(prices: Prices) -> None:
        assert_type(await prices.read("a"), float)
        assert_type(await Prices.read(prices, "a"), float)
        assert_type(await Prices.read.refresh(prices, product_id="a"), float)
        assert_type(prices.read.key("a"), str)
        assert_type(Prices.read.key(product_id="a"), str)
        await prices.read.invalidate("a")
        await Prices.read.invalidate("a")
        await prices.change("a")
        await prices.read(1)  # wrong
        await prices.read.refresh("a")  # wrong
        prices.read.key(prices, "a")  # wrong
        await Prices.read("a")  # wrong

    return Prices


async def of_reads_and_writes(client: Client) -> None:
    async def load() -> list[int]:
        return [1]

    assert_type(await client.cache.get_or_set("k", load, primary=load), list[int])
    assert_type(await client.cache.read("k", load), Read)
    await client.cache.get_or_set("k", [1])  # wrong
    await client.cache.get_or_set("k", load, 300)  # wrong

    assert_type(await client.invalidate("k", wait=1.0), Receipt)
    await client.invalidate(1)  # wrong
    async with client.transaction(wait=1.0) as tx:
        assert_type(tx, Transaction)
        tx.invalidate("k", versions=[1, None])
        tx.invalidate("k", versions=1)  # wrong
    assert_type(tx.receipt, Receipt | None)
    assert_type(await client.execute("DELETE FROM prices", invalidate=["k"]), str)
