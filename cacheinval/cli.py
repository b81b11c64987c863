"""The command line: parses, calls, and turns errors into one line and an exit code."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cacheinval.errors import (
    CacheinvalError,
    ConfigurationError,
    DatabaseError,
    InvalidKeyError,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine

    from cacheinval.coherence.receipts import Receipt
    from cacheinval.settings import Settings

__all__ = ["app", "main"]

PUBLISH_PATIENCE = 2.0  # seconds that `invalidate` waits for the broker, where the row is the safety
HAD_ONE_BEFORE = (
    "only if it was there before: `cacheinval schema grant ROLE` and `SELECT cacheinval.track(…)` again, then "
    "`cacheinval invalidate --all`"
)
SILENT_WAIT = 2.0  # seconds for which `invalidate --wait` waits without a word

PACKAGE = Path(__file__).parent
GUIDE, PROTOCOL = PACKAGE / "GUIDE.md", PACKAGE / "PROTOCOL.md"
OPERATING = PACKAGE / "OPERATING.md"
if not OPERATING.exists():  # in a clone
    OPERATING = PACKAGE.parent / "config" / "OPERATING.md"


def _read_on(chapter: str, document: Path) -> str:
    return f"Read on: “{chapter}” in\n\n{document}"


# What a command needs is imported when it runs: --help must not wait for aio-pika and uvicorn.

app = typer.Typer(
    name="cacheinval",
    help="Keeps the caches of asyncio services honest. Configured by CACHEINVAL_… environment variables.",
    epilog=f"Read on: operating it, each call in depth, and the rules\n\n{OPERATING}\n\n{GUIDE}\n\n{PROTOCOL}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
schema_app = typer.Typer(no_args_is_help=True, help="The schema `cacheinval` in the database.")
app.add_typer(schema_app, name="schema")


def main() -> None:
    """The command `cacheinval`; ends the process: 0, 1 (failed), 2 (wrong use or configuration)."""
    try:
        app(prog_name="cacheinval")
    except (ConfigurationError, InvalidKeyError) as error:
        _say(error)
        sys.exit(2)
    except CacheinvalError as error:
        _say(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # a defect, most likely
        if os.environ.get("CACHEINVAL_LOG_LEVEL", "").upper() == "DEBUG":
            raise
        _say(" ".join(f"{type(error).__name__}: {error}".split()))
        sys.exit(1)


def _say(message: object) -> None:
    for line in str(message).splitlines():
        print(f"cacheinval: {line}", file=sys.stderr)


def _settings() -> "Settings":
    from cacheinval.settings import Settings, unknown_variables

    for warning in unknown_variables():
        _say(f"warning: {warning}")
    return Settings()


def _settings_for_asking() -> "Settings":
    from cacheinval.settings import refuse_memory

    settings = _settings()
    refuse_memory(settings)
    return settings


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("cacheinval"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


@app.command(epilog=_read_on("HTTP", PROTOCOL))
def serve() -> None:
    """Run the product service with its cache, over HTTP."""
    from cacheinval import worker

    raise typer.Exit(worker.serve(_settings()))


@app.command("worker", epilog=_read_on("The cache outside the process", PROTOCOL))
def work() -> None:
    """Keep a cache honest that lives outside the service (CACHEINVAL_CACHE_URL)."""
    from cacheinval import worker

    raise typer.Exit(worker.worker(_settings()))


@app.command(epilog=_read_on("Writing", PROTOCOL))
def relay() -> None:
    """Publish what is left in the outbox, alone."""
    from cacheinval import worker

    raise typer.Exit(worker.relay(_settings()))


@app.command(epilog=_read_on("Waiting for the others", GUIDE))
def invalidate(
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY", show_default=False)] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="All entries that carry this tag.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All entries of the namespace.")] = False,
    wait: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Wait until every instance has evicted, at most this long; 1 if one is missing, and why.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Evict keys, tags or everything, in every instance."""
    if not (keys or tag or everything):
        raise typer.BadParameter("accepted: at least one KEY, --tag or --all")
    if wait is not None and not 0 < wait < float("inf"):
        raise typer.BadParameter("accepted: seconds, more than 0 and finite", param_hint="--wait")
    _run(_invalidate(_settings(), keys or [], tag or [], everything, wait))


@app.command(epilog=_read_on("May any cache be stale?", OPERATING))
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Ask every live instance how it is."""
    try:
        _run(_status(_settings_for_asking(), interval if watch else None, as_json))
    except KeyboardInterrupt:
        if not watch:
            raise


@app.command(epilog=_read_on("Audit", PROTOCOL))
def audit(
    sample: Annotated[int, typer.Option(min=1, max=1000, help="Entries of each instance.")] = 100,
    delay: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=600,
            help="Seconds between the two looks at what differs; as long as an instance needs if not given.",
            show_default=False,
        ),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds within which the reports have to arrive.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Have every live instance compare some of its cached entries with their source."""
    _run(_audit(_settings_for_asking(), sample, delay, wait, as_json))


@app.command(epilog=_read_on("When `doctor` is red", OPERATING))
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Look at all that has to be right, and say what to do about what is not; 1 if anything failed."""
    _run(_doctor(_settings(), as_json))


@schema_app.command("show", epilog=_read_on("Postgres", PROTOCOL))
def show_schema() -> None:
    """Print the SQL of the schema."""
    from cacheinval.outbox import schema_sql

    print(schema_sql())


@schema_app.command("apply", epilog=_read_on("Deploying", OPERATING))
def apply_schema() -> None:
    """Make or update the schema; may be run again and again."""
    _run(_apply_schema(_settings()))


@schema_app.command("grant", epilog=_read_on("Postgres", PROTOCOL))
def grant_schema(
    role: Annotated[str, typer.Argument(help="A role that is a client, a worker or a relay.")],
    only_print: Annotated[bool, typer.Option("--print", help="Print the SQL, and run nothing.")] = False,
) -> None:
    """Give a role the least rights that it needs, as the role that owns the schema."""
    from cacheinval.outbox.grants import grants

    try:
        statements = grants(role)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="ROLE") from None
    if only_print:
        print("\n".join(statements))
    else:
        _run(_grant_schema(_settings(), role))


@app.command(context_settings={"ignore_unknown_options": True})
def sandbox(
    command: Annotated[list[str] | None, typer.Argument(metavar="-- COMMAND", show_default=False)] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="RabbitMQ is a cluster of three nodes.")] = False,
) -> None:
    """Start private RabbitMQ and Postgres servers, and run COMMAND with CACHEINVAL_… pointing at them."""
    import asyncio

    from cacheinval.sandbox import running

    raise typer.Exit(asyncio.run(running.run(command or [], cluster=cluster)))


@app.command()
def demo(
    bus: Annotated[
        Literal["rabbitmq", "memory"], typer.Option(help="`memory` needs no server at all.")
    ] = "rabbitmq",
) -> None:
    """See it work: stale reads, polling, events, and a broker that dies."""
    from cacheinval import demo

    raise typer.Exit(demo.run(bus))


def _run(work: "Coroutine[Any, Any, None]") -> None:
    import asyncio

    import asyncpg

    from cacheinval import logs

    # A command says by itself, in one line, what a service would log.
    logs.configure("CRITICAL", "text")
    try:
        asyncio.run(work)
    except (
        OSError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
    ) as error:  # those of the bus are PublishErrors
        reason = str(error) or "no answer in time"
        raise DatabaseError(f"the database cannot be used (CACHEINVAL_DATABASE_URL): {reason}") from error


async def _invalidate(
    settings: "Settings", keys: list[str], tags: list[str], everything: bool, wait: float | None
) -> None:
    from cacheinval.client import Client

    receipt = None
    async with Client(settings.model_copy(update={"relay": "off"}), subscribe=False) as client:
        if wait is None:
            await client.invalidate(*keys, tags=tags, everything=everything)
        else:
            telling = _tell_of_waiting(wait)
            try:
                receipt = await client.invalidate(*keys, tags=tags, everything=everything, wait=wait)
            finally:
                telling.cancel()
        published = await client.publisher.flush(PUBLISH_PATIENCE) and not client.publisher.failing
    if not published:
        _say("recorded, but not confirmed by the broker: the relay will send it")
    what = "everything" if everything else " ".join([*keys, *(f"#{tag}" for tag in tags)])
    if receipt is None:
        print("invalidated", what)
        return
    print(f"invalidated {what}: {_evicted_by(receipt)}")
    widest = max((len(who) for who, _ in receipt.missing), default=0)
    for who, why in receipt.missing:
        print(f"  {who:{widest}}  {why}")
    if not receipt.complete:
        raise typer.Exit(1)


def _tell_of_waiting(wait: float) -> "asyncio.TimerHandle":
    import asyncio

    def tell() -> None:
        if sys.stderr.isatty():
            _say(f"waiting for the instances, at most {wait:g} s")

    return asyncio.get_running_loop().call_later(SILENT_WAIT, tell)


def _evicted_by(receipt: "Receipt") -> str:
    if receipt.total is None:
        who = f" ({', '.join(receipt.answered)})" if receipt.answered else ""
        return f"evicted by {receipt.confirmed}{who}, of how many is unknown: {receipt.reason}"
    by_time = f", {len(receipt.by_time)} of them by time" if receipt.by_time else ""
    return f"evicted by {receipt.confirmed} of {receipt.total} instances{by_time}"


async def _status(settings: "Settings", interval: float | None, as_json: bool) -> None:
    from cacheinval import status_command
    from cacheinval.client import Client

    async with Client(settings.model_copy(update={"relay": "off"}), subscribe=False) as client:
        if interval is None:
            if not await status_command.status(client, as_json=as_json):
                raise typer.Exit(1)
        else:
            await status_command.watch(client, interval, as_json=as_json)


async def _audit(
    settings: "Settings", sample: int, delay: float | None, wait: float | None, as_json: bool
) -> None:
    from cacheinval import audit_command
    from cacheinval.client import Client

    settings = settings.model_copy(update={"relay": "off", "database_url": ""})
    async with Client(settings, subscribe=False) as client:
        await audit_command.audit(client, sample, delay, wait, as_json=as_json)


async def _grant_schema(settings: "Settings", role: str) -> None:
    from cacheinval.client import Client
    from cacheinval.outbox.grants import grant

    async with (
        Client(settings.model_copy(update={"relay": "off"}), subscribe=False) as client,
        client.pool.acquire(timeout=10) as connection,
    ):
        await grant(connection, role)
    print(f"role {role} may be a client, a worker or a relay")


async def _doctor(settings: "Settings", as_json: bool) -> None:
    from cacheinval import doctor

    if not await doctor.doctor(settings, as_json=as_json):
        raise typer.Exit(1)


async def _apply_schema(settings: "Settings") -> None:
    from cacheinval.client import Client
    from cacheinval.settings import mask_url

    async with Client(settings.model_copy(update={"relay": "off"}), subscribe=False) as client:
        made, has_tables = await client.pool.fetchval(
            "SELECT ARRAY[to_regclass('cacheinval.outbox') IS NULL, EXISTS (SELECT FROM pg_stat_user_tables)]",
            timeout=10,
        )
        await client.apply_schema()
    done = "made" if made else "is up to date"
    print(f"the schema cacheinval {done} in {mask_url(settings.database_url)}")
    if made and has_tables:  # whose triggers may be gone
        print(HAD_ONE_BEFORE, file=sys.stderr)
