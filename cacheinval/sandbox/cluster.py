"""Private RabbitMQ nodes that are one cluster, and what parts them."""

import asyncio
import secrets
from pathlib import Path

from cacheinval.sandbox.processes import LOOPBACK, Guard
from cacheinval.sandbox.rabbitmq import Epmd, Membership, RabbitMQ

__all__ = ["Cluster"]


SIZE = 3  # the fewest of which a part can be the larger side of a partition


class Cluster:
    """Three RabbitMQ nodes that share one epmd and one cookie; the smaller side of a partition pauses.

    folder: an existing one, in which each node gets its own.
    guard: is told of every process.
    """

    name = RabbitMQ.name

    def __init__(self, folder: Path, guard: Guard) -> None:
        cookie = secrets.token_hex(16)
        self._epmd = Epmd(_make(folder / "epmd"), guard)
        names = [f"cacheinval{number}@localhost" for number in range(1, SIZE + 1)]
        self.nodes = tuple(
            RabbitMQ(
                _make(folder / name.partition("@")[0]),
                guard,
                membership=Membership(name, names, self._epmd, cookie),
            )
            for name in names
        )

    @property
    def url(self) -> str:
        """The address that clients use: one with all nodes."""
        hosts = ",".join(f"{LOOPBACK}:{node.port}" for node in self.nodes)
        return f"amqp://guest:guest@{hosts}/"

    @property
    def running(self) -> bool:
        """Whether every node lives."""
        return all(node.running for node in self.nodes)

    async def start(self) -> None:
        """Start the nodes that do not run, all at once; returns when each answers like one that is ready.

        Raises SandboxError, as `Server.start` does.
        """
        if not self._epmd.running:
            await self._epmd.start()
        try:
            async with asyncio.TaskGroup() as group:
                for node in self.nodes:
                    if not node.running:
                        group.create_task(node.start())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def part(self, node: RabbitMQ) -> None:
        """Cut `node` off from the others, at once and on both sides; its clients still reach it.

        The Erlang runtime closes the connections between them, and refuses new ones, which would need the right cookie.
        """
        others = self._names_of_others(node)
        await node.ctl(
            "eval", f"[begin erlang:set_cookie(N, parted), erlang:disconnect_node(N) end || N <- {others}]."
        )

    async def heal(self, node: RabbitMQ) -> None:
        """Let `node` and the others reach each other again; what they make of it takes them seconds."""
        others = self._names_of_others(node)
        await node.ctl("eval", f"[erlang:set_cookie(N, erlang:get_cookie()) || N <- {others}].")

    async def set_partition_handling(self, how: str) -> None:
        """What all nodes do from now on when they lose each other: `pause_minority`, `autoheal` or `ignore`."""
        await self._call_all(f"application, set_env, [rabbit, cluster_partition_handling, {how}]")

    async def notice_silence_after(self, seconds: int) -> None:
        """For how long, within a quarter, a node may be silent before the others take it for gone (default 60)."""
        await self._call_all(f"net_kernel, set_net_ticktime, [{seconds}, 0]")

    async def _call_all(self, call: str) -> None:
        await self.nodes[0].ctl("eval", f"[rpc:call(N, {call}) || N <- [node() | nodes()]].")

    async def running_nodes(self, seen_by: RabbitMQ) -> set[str]:
        """The names of the nodes that run, as one of them sees it."""
        output = await seen_by.ctl("eval", "rabbit_mnesia:cluster_nodes(running).")
        return {node.node for node in self.nodes if node.node in output}

    async def close(self) -> None:
        """Kill all of it for good and give the ports back."""
        try:
            await asyncio.gather(*(node.close() for node in self.nodes))
        finally:
            await self._epmd.close()

    def _names_of_others(self, node: RabbitMQ) -> str:
        return "[" + ", ".join(f"'{other.node}'" for other in self.nodes if other is not node) + "]"


def _make(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
