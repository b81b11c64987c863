"""What can be seen of the stream that all instances of a namespace read, with `BUS=stream`."""

from aio_pika.abc import AbstractChannel
from aio_pika.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import ChannelAccessRefused

from cacheinval.bus.connecting import explain, is_away, within
from cacheinval.bus.streaming import STREAM
from cacheinval.doctor.findings import Finding, failed, of_refusal, ok, warning
from cacheinval.verdict import remedies

__all__ = ["READ_WITHIN", "of_stream"]

READ_WITHIN = 3.0  # seconds


async def of_stream(channel: AbstractChannel, name: str, url: str, node: str) -> Finding:
    """Whether the stream is there, as it has to be, and can be read.

    Args:
        channel: used for nothing else; it may be closed afterwards.
        url: the broker's address, secrets included.
        node: the host and port that `channel` leads to.
    """
    try:
        await channel.declare_queue(name, passive=True)
        await channel.declare_queue(name, durable=True, arguments=STREAM)
    except ChannelNotFoundEntity as error:
        if is_away(error):
            remedy = "start that node; if it is up, see OPERATING.md, One stream"
            return failed("stream", explain(error), remedy)
        return warning("stream", f"{name} is missing", "the next instance that subscribes makes it")
    except ChannelPreconditionFailed as error:
        remedy = f"`rabbitmqctl delete_queue -p {remedies.vhost_of(url)} {name}`: instances make it as it has to be"
        return failed("stream", f"set up differently: {explain(error)}", remedy)
    except ChannelAccessRefused as error:
        return of_refusal(url, explain(error), {"queue": "configure"})
    return await _of_reading(channel, name, url, node)


async def _of_reading(channel: AbstractChannel, name: str, url: str, node: str) -> Finding:
    """As an instance reads it; that it is there says little in a cluster."""
    try:
        await channel.set_qos(1)
        underlay = await channel.get_underlay_channel()
        reading = underlay.basic_consume(name, _ignore, arguments={"x-stream-offset": "next"})
        await within(READ_WITHIN, reading)
        await channel.close()
    except ChannelPreconditionFailed as error:
        add = f"`rabbitmq-streams add_replica --vhost {remedies.vhost_of(url)} {name} NODE`"
        return failed(
            "stream",
            f"at {node}: {explain(error)}",
            f"start the nodes that are down, for it needs most of its copies; if none is, {add} for the one at {node}",
        )
    except ChannelAccessRefused as error:
        return of_refusal(url, explain(error), {"queue": "read"})
    return ok("stream", f"{name} is there, and can be read")


async def _ignore(message: DeliveredMessage) -> None:
    """What the stream holds is of no interest."""
