"""TLS to a real Postgres, both ways, by the parameters of its address."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
from waiting import Eventually

from cacheinval import Client, Settings
from cacheinval.doctor import examine
from cacheinval.sandbox import Postgres, RabbitMQ

ROLE = "knows_itself_by_certificate"


async def openssl(*words: str | Path) -> None:
    process = await asyncio.create_subprocess_exec("openssl", *words, stderr=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0


@dataclass
class Files:
    """PEM files: of an authority, and of a client's certificate and key."""

    ca: Path
    cert: Path
    key: Path


@pytest.fixture
async def files(postgres: Postgres, tmp_path: Path) -> Files:
    """Those of the client; those of the server are put where it finds them."""
    new = ("req", "-x509", "-nodes", "-days", "1", "-newkey", "rsa:2048")
    authority = (
        "-CA",
        tmp_path / "ca.pem",
        "-CAkey",
        tmp_path / "ca.key",
        "-addext",
        "basicConstraints=CA:FALSE",
    )
    await openssl(*new, "-subj", "/CN=authority", "-keyout", tmp_path / "ca.key", "-out", tmp_path / "ca.pem")
    for name, subject in (("server", "localhost"), ("client", ROLE)):
        names = ("-addext", "subjectAltName=DNS:localhost")
        to = ("-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.pem")
        await openssl(*new, "-subj", f"/CN={subject}", *names, *to, *authority)
    data = postgres.folder / "data"
    for name in ("server.pem", "server.key", "ca.pem"):
        shutil.copy(tmp_path / name, data / name)
        shutil.chown(data / name, data.owner(), data.group())
        (data / name).chmod(0o600)
    return Files(tmp_path / "ca.pem", tmp_path / "client.pem", tmp_path / "client.key")


@pytest.fixture
async def tls_url(postgres: Postgres, database_url: str, files: Files) -> AsyncIterator[str]:
    """The test's database, for a role that gets in with TLS and a certificate of its name only."""
    rules = postgres.folder / "data" / "pg_hba.conf"
    before = rules.read_text()
    connection = await asyncpg.connect(database_url, timeout=30)
    try:
        await connection.execute(f"CREATE ROLE {ROLE} LOGIN SUPERUSER")
        for name, value in {"cert": "server.pem", "key": "server.key", "ca": "ca.pem"}.items():
            await connection.execute(f"ALTER SYSTEM SET ssl_{name}_file = '{value}'")
        await connection.execute("ALTER SYSTEM SET ssl = on")
        rules.write_text(
            f"hostssl all {ROLE} all cert clientcert=verify-full\nhostnossl all {ROLE} all reject\n{before}"
        )
        await connection.execute("SELECT pg_reload_conf()")
        yield database_url.replace("postgres@127.0.0.1", f"{ROLE}@localhost")
    finally:
        rules.write_text(before)
        await connection.execute("ALTER SYSTEM RESET ALL")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.execute(f"DROP OWNED BY {ROLE} CASCADE")
        await connection.execute(f"DROP ROLE {ROLE}")
        await connection.close()


async def test_a_client_and_its_relay_work_over_tls_and_the_doctor_names_what_is_missing(
    tls_url: str, files: Files, rabbitmq: RabbitMQ, namespace: str, eventually: Eventually
) -> None:
    trust = f"{tls_url}?sslmode=verify-full&sslrootcert={files.ca}"
    both = f"{trust}&sslcert={files.cert}&sslkey={files.key}"
    settings = Settings(broker_url=rabbitmq.url, database_url=both, namespace=namespace, tick_interval=0.2)

    async def connects() -> bool:  # the server reads its configuration anew in its own time
        try:
            connection = await asyncpg.connect(both, timeout=30)
        except (OSError, asyncpg.PostgresError):
            return False
        await connection.close()
        return True

    await eventually(connects, 30)
    async with Client(settings) as client:
        await client.apply_schema()
        await client.wait_ready(30)
        await client.invalidate("a")
        await eventually(lambda: client.watermark_age is not None, 30)
        encrypted = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = current_user"
        assert await client.pool.fetchval(encrypted)
    for url, said in (
        (trust, "certificate"),
        (f"{tls_url}?sslmode=verify-full&sslrootcert={files.cert}", "ertificate"),
    ):
        findings = await examine(settings.model_copy(update={"database_url": url, "broker_url": "memory://"}))
        (finding,) = (one for one in findings if one.check == "database")
        assert (finding.level, said in finding.text) == ("failed", True), finding
