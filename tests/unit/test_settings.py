"""Settings: where they come from, what is refused and how, and that secrets stay secret."""

from pathlib import Path

import pytest

from cacheinval.client import Client
from cacheinval.errors import ConfigurationError
from cacheinval.settings import Settings, addresses, mask_url, unknown_variables

WRONG = [
    ("BROKER_URL", "http://broker", "accepted: amqp://…, amqps://…, memory://…"),
    ("BROKER_URL", "", "accepted: amqp://…"),
    ("BROKER_URL", "amqp:host", "accepted: amqp://…"),
    ("BROKER_URL", "amqp://", "accepted: amqp://…"),
    ("BROKER_URL", "amqp://host:port/", "accepted: amqp://…"),
    ("BROKER_URL", "amqp://host:65536/", "memory://…, with a port of 1 to 65535"),
    ("BROKER_URL", "amqp://one:5672,host:0/", "memory://…, with a port of 1 to 65535"),
    ("BROKER_URL", "amqp://[::1", "accepted: amqp://…"),
    ("DATABASE_URL", "mysql://host/db", "accepted: postgresql://…, postgres://…, or empty for none"),
    ("DATABASE_URL", "host", "accepted: postgresql://…"),
    ("CACHE_URL", "file:///tmp/x", "accepted: memory://…, redis://…, memcached://…"),
    ("CACHE_URL", "", "accepted: memory://…"),
    ("NAMESPACE", "", "accepted: 1 to 64 letters, digits, '_' and '-'"),
    ("NAMESPACE", "a.b", "accepted: 1 to 64 letters"),
    ("NAMESPACE", "n" * 65, "accepted: 1 to 64 letters"),
    ("NAMESPACE", "naïve", "accepted: 1 to 64 letters"),
    ("NAMESPACE", "a\n", "accepted: 1 to 64 letters"),
    ("INSTANCE_ID", "dead", "any name but 'dead'"),
    ("INSTANCE_ID", "stream", "any name but 'dead' and 'stream'"),
    ("BUS", "queue", "'fanout' or 'stream'"),
    ("INSTANCE_ID", "a/b", "accepted: 1 to 64 letters"),
    ("INSTANCE_ID", "", "accepted: 1 to 64 letters"),
    ("CACHE_TTL", "0", "greater than 0"),
    ("CACHE_TTL", "-1", "greater than 0"),
    ("CACHE_TTL", "inf", "finite"),
    ("CACHE_TTL", "nan", "finite"),
    ("CACHE_TTL", "5m", "accepted: a valid number, greater than 0"),
    ("CACHE_TTL", "", "valid number"),
    ("CACHE_TTL_JITTER", "1.5", "less than or equal to 1"),
    ("STALE_IF_ERROR", "-1", "greater than or equal to 0"),
    ("STALE_WHILE_REVALIDATE", "inf", "finite"),
    ("CACHE_MAX_ENTRIES", "0", "greater than or equal to 1"),
    ("CACHE_MAX_ENTRIES", "1.5", "valid integer"),
    ("CACHE_SERIALIZER", "yaml", "'json', 'msgpack' or 'pickle'"),
    ("CACHE_COMPRESS_ABOVE", "-1", "greater than or equal to 0"),
    ("CACHE_LOCAL_ENTRIES", "-1", "greater than or equal to 0"),
    ("CACHE_LOCAL_ENTRIES", "10", "accepted: 0 unless CACHEINVAL_CACHE_URL names"),
    ("MAX_STALENESS", "0", "greater than 0"),
    ("MAX_STALENESS", "soon", "valid number, greater than 0"),
    ("MAX_STALENESS", "2.44", "at least 2.45 (2 x TICK_INTERVAL + 0.25 + 2 x MAX_CLOCK_SKEW seconds)"),
    ("MAX_CONCURRENT_LOADS", "0", "greater than or equal to 1"),
    ("MAX_CONCURRENT_LOADS", "many", "valid integer"),
    ("WARM_KEYS", "10001", "less than or equal to 10000"),
    ("WARM_INTERVAL", "0", "greater than 0"),
    ("MAX_REPLICA_LAG", "0", "greater than 0"),
    ("MAX_REPLICA_LAG", "inf", "finite"),
    ("RELAY", "on", "'auto' or 'off'"),
    ("TICK_INTERVAL", "0", "greater than 0"),
    ("TICK_INTERVAL", "inf", "finite"),
    ("MAX_CLOCK_SKEW", "-0.1", "greater than or equal to 0"),
    ("PUBLISH_TIMEOUT", "0", "greater than 0"),
    ("AUDIT_INTERVAL", "-1", "greater than or equal to 0"),
    ("AUDIT_INTERVAL", "inf", "finite"),
    ("PREFETCH", "0", "greater than or equal to 1"),
    ("PREFETCH", "65536", "less than or equal to 65535"),
    ("HTTP_PORT", "65536", "less than or equal to 65535"),
    ("HTTP_PORT", "-1", "greater than or equal to 0"),
    ("HTTP_PORT", "http", "valid integer, greater than or equal to 0, less than or equal to 65535"),
    ("PAGE", "yes", "'on' or 'off'"),
    ("LOG_LEVEL", "loud", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
    ("LOG_FORMAT", "xml", "'text' or 'json'"),
]

# Each with a secret in it, in all the shapes in which people get an address wrong.
WITH_SECRETS = [
    "amqp://user:s3cr3t@host:x/",
    "http://user:s3cr3t@host/",
    "amqp://user:s3cr3t@[::1",
    "amqp:/user:s3cr3t@host/",
    "amqp:user:s3cr3t@host/",
    "user:s3cr3t@host",
    "http://user:x/s3cr3t@host/",
    "http://user:x#s3cr3t@host/",
    "http://user:x?s3cr3t@host/",
    "http://user:x@y/s3cr3t@host/",
    "http://user:x@s3cr3t@host/",
    "http://:s3cr3t@host/",
    "http://host/?password=s3cr3t&x=1",
    "http://host/?PASSWORD=s3cr3t",
    "http://host/?token=s3cr3t",
    "host=db user=me password=s3cr3t",
    "host=db password = s3cr3t",
    "host=db password='x s3cr3t'",
]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in list(os.environ):
        if name.upper().startswith("CACHEINVAL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CACHEINVAL_SECRETS_DIR", str(tmp_path))


def test_a_fraction_where_none_can_be_is_refused_with_the_range() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings(prefetch=1.5)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "CACHEINVAL_PREFETCH=1.5: accepted: a valid integer, greater than or equal to 1, less than or equal to 65535"
    )


@pytest.mark.parametrize(("name", "value", "accepted"), WRONG)
def test_a_wrong_value_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, accepted: str
) -> None:
    monkeypatch.setenv(f"CACHEINVAL_{name}", value)
    with pytest.raises(ConfigurationError) as caught:
        Settings()
    text = str(caught.value)
    assert text.startswith(f"CACHEINVAL_{name}=")
    assert value.strip().casefold() in text.casefold()
    assert accepted in text
    assert "accepted: " in text
    assert len(text.splitlines()) == 1


def test_every_setting_has_a_wrong_value_above() -> None:
    free_text = {"broker_ca_file", "broker_cert_file", "broker_key_file", "http_host"}
    assert {name.lower() for name, _, _ in WRONG} | free_text == set(Settings.model_fields)


def test_each_wrong_value_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEINVAL_PREFETCH", "0")
    monkeypatch.setenv("CACHEINVAL_RELAY", "on")
    with pytest.raises(ConfigurationError) as caught:
        Settings()
    assert [line.partition("=")[0] for line in str(caught.value).splitlines()] == [
        "CACHEINVAL_RELAY",
        "CACHEINVAL_PREFETCH",
    ]


def test_a_keyword_that_is_no_setting() -> None:
    with pytest.raises(ConfigurationError, match=r"^namspace is not a setting; did you mean namespace\?$"):
        Settings(namspace="x")


@pytest.mark.parametrize("field", ["broker_url", "database_url", "cache_url"])
@pytest.mark.parametrize("url", WITH_SECRETS)
def test_secrets_are_not_in_errors(field: str, url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings(**{field: url})
    shown = str(caught.value) + repr(caught.value)
    assert "s3cr3t" not in shown
    assert f"CACHEINVAL_{field.upper()}=" in shown
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("amqp://user:s3cr3t@host:5672/vhost", "amqp://user:***@host:5672/vhost"),
        ("redis://:s3cr3t@host/0", "redis://:***@host/0"),
        ("postgresql://user@host/db", "postgresql://user@host/db"),
        ("postgresql://host/db?password=s3cr3t&x=1", "postgresql://host/db?password=***&x=1"),
        ("amqp://u:s3cr3t@[::1]:5672/", "amqp://u:***@[::1]:5672/"),
        ("amqp://u:s3,cr3t@one:1,two:2/v", "amqp://u:***@one:1,two:2/v"),
        ("memory://", "memory://"),
        ("", ""),
    ],
)
def test_mask_url(url: str, masked: str) -> None:
    assert mask_url(url) == masked


@pytest.mark.parametrize("url", WITH_SECRETS)
def test_mask_url_leaves_no_secret_of_any_shape(url: str) -> None:
    assert "s3cr3t" not in mask_url(url)


# The nodes of a cluster


@pytest.mark.parametrize(
    ("url", "each"),
    [
        ("amqp://u:p@one/", ["amqp://u:p@one/"]),
        (
            "amqps://u:p,w@one:1,two,[::1]:3/v?heartbeat=9",
            [
                "amqps://u:p,w@one:1/v?heartbeat=9",
                "amqps://u:p,w@two/v?heartbeat=9",
                "amqps://u:p,w@[::1]:3/v?heartbeat=9",
            ],
        ),
        ("amqp://one,two", ["amqp://one", "amqp://two"]),
        ("memory://", ["memory://"]),
    ],
)
def test_the_addresses_of_a_cluster_share_all_but_the_host(url: str, each: list[str]) -> None:
    assert addresses(url) == each
    assert Settings(broker_url=url).broker_url == url


@pytest.mark.parametrize(
    ("hosts", "wrong"), [("one:1,", 2), ("one,two:x,three", 2), (",one", 1), ("a:1,:2", 2)]
)
def test_a_host_of_a_cluster_that_cannot_be_used_is_told_by_its_number(hosts: str, wrong: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings(broker_url=f"amqp://u:s3cr3t@{hosts}/")
    assert str(caught.value) == (
        f"CACHEINVAL_BROKER_URL=amqp://u:***@{hosts}/: host {wrong} of {len(hosts.split(','))} cannot be used; "
        "accepted: amqp://…, amqps://…, memory://…"
    )


def test_a_password_that_ends_the_host_is_said_to_want_encoding() -> None:
    with pytest.raises(
        ConfigurationError, match=r"=\*\*\*: accepted: .* # and \? are written as %23 and %3F$"
    ):
        Settings(broker_url="amqp://shop:s3c#r3t@host/")


def test_a_database_may_have_several_hosts() -> None:
    url = "postgresql://u:s3cr3t@one:5432,two:5433/db?target_session_attrs=read-write"
    assert Settings(database_url=url).database_url == url
    with pytest.raises(ConfigurationError, match=r"u:\*\*\*@one:5432,two:x/db: host 2 of 2 cannot be used"):
        Settings(database_url="postgresql://u:s3cr3t@one:5432,two:x/db")


def test_secrets_are_not_in_repr_or_str() -> None:
    settings = Settings(
        broker_url="amqp://user:s3cr3t@host/",
        database_url="postgresql://user:s3cr3t@host/db?sslpassword=s3cr3t",
        cache_url="redis://:s3cr3t@host",
        instance_id="one",
    )
    for shown in (repr(settings), str(settings), f"{settings}", repr([settings])):
        assert "s3cr3t" not in shown
        assert "user:***@host" in shown


# Where values come from


def test_defaults() -> None:
    settings = Settings()
    assert settings.broker_url == "amqp://guest:guest@127.0.0.1:5672/"
    assert settings.database_url == "postgresql://postgres@127.0.0.1:5432/postgres"
    assert (settings.cache_url, settings.namespace, settings.cache_ttl) == ("memory://", "default", 300)
    assert (settings.cache_max_entries, settings.max_staleness, settings.relay) == (100_000, None, "auto")
    assert (settings.tick_interval, settings.max_clock_skew, settings.publish_timeout) == (1, 0.1, 5)
    assert (settings.prefetch, settings.http_host, settings.http_port) == (500, "127.0.0.1", 8000)
    assert (settings.log_level, settings.log_format) == ("INFO", "text")
    assert not settings.cache_is_external


def test_the_keyword_wins_over_the_environment_and_that_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cacheinval_database_url").write_text("postgresql://from-file/db\n")
    assert Settings().database_url == "postgresql://from-file/db"
    monkeypatch.setenv("CACHEINVAL_DATABASE_URL", "postgresql://from-environment/db")
    assert Settings().database_url == "postgresql://from-environment/db"
    assert Settings(database_url="postgresql://from-keyword/db").database_url.endswith("from-keyword/db")


def test_a_file_may_have_the_name_of_the_variable(tmp_path: Path) -> None:
    (tmp_path / "CACHEINVAL_BROKER_URL").write_text("amqp://u:s3cr3t@from-file/")
    assert Settings().broker_url == "amqp://u:s3cr3t@from-file/"


def test_a_wrong_value_in_a_file_is_masked_as_well(tmp_path: Path) -> None:
    (tmp_path / "CACHEINVAL_BROKER_URL").write_text("amqps//u:s3cr3t@from-file/")
    with pytest.raises(ConfigurationError, match=r"^CACHEINVAL_BROKER_URL=\*\*\*: accepted"):
        Settings()


def test_a_secrets_folder_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CACHEINVAL_SECRETS_DIR", str(tmp_path / "missing"))
    with pytest.raises(ConfigurationError, match=r"^CACHEINVAL_SECRETS_DIR=.*missing: accepted: a folder$"):
        Settings()


def test_empty_means_none_where_that_makes_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "MAX_STALENESS", "BROKER_CA_FILE"):
        monkeypatch.setenv(f"CACHEINVAL_{name}", "")
    settings = Settings()
    assert (settings.database_url, settings.max_staleness, settings.broker_ca_file) == ("", None, None)


def test_words_are_taken_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RELAY": "OFF", "LOG_LEVEL": "debug", "LOG_FORMAT": "JSON"}.items():
        monkeypatch.setenv(f"CACHEINVAL_{name}", value)
    settings = Settings()
    assert (settings.relay, settings.log_level, settings.log_format) == ("off", "DEBUG", "json")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:p@host:5432/db?sslmode=require",
        "postgres://host",
        "postgresql:///db?host=/var/run/postgresql",
    ],
)
def test_addresses_that_asyncpg_takes(url: str) -> None:
    assert Settings(database_url=url).database_url == url


def test_max_staleness_at_its_least() -> None:
    assert Settings(max_staleness=2.45).max_staleness == 2.45
    assert Settings(max_staleness=0.5, tick_interval=0.1, max_clock_skew=0.02).max_staleness == 0.5


def test_an_instance_id_is_made_and_differs_each_time() -> None:
    one, other = Settings().instance_id, Settings().instance_id
    assert one != other
    assert Settings(instance_id=one).instance_id == one  # and is one that would be accepted


def test_settings_cannot_be_changed() -> None:
    settings = Settings()
    with pytest.raises(Exception, match="frozen"):
        settings.namespace = "other"


@pytest.mark.parametrize("url", ["redis://127.0.0.1/0", "memcached://127.0.0.1"])
def test_a_cache_outside_the_process_needs_an_instance_id(url: str) -> None:
    settings = Settings(cache_url=url, broker_url="amqp://host")
    with pytest.raises(
        ConfigurationError, match=r"^CACHEINVAL_INSTANCE_ID is not set: accepted: .*stays the same"
    ):
        Client(settings)
    Client(settings, subscribe=False)
    Client(Settings(cache_url=url, broker_url="amqp://host", instance_id="one"))


@pytest.mark.parametrize("path", ["/one", "/-1", "/0/1"])
def test_the_number_of_a_redis_database_must_be_one(path: str) -> None:
    settings = Settings(cache_url=f"redis://u:s3cr3t@host{path}", broker_url="amqp://host", instance_id="one")
    with pytest.raises(ConfigurationError, match=r"^CACHEINVAL_CACHE_URL=redis://u:\*\*\*@host.*accepted"):
        Client(settings)


def test_misspelt_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unknown_variables() == []
    monkeypatch.setenv("CACHEINVAL_NAMESPCE", "x")
    monkeypatch.setenv("CACHEINVAL_ZZZZZZZZZ", "x")
    assert unknown_variables() == [
        "CACHEINVAL_NAMESPCE is not a setting; did you mean CACHEINVAL_NAMESPACE?",
        "CACHEINVAL_ZZZZZZZZZ is not a setting",
    ]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        (
            "cache_url",
            "redis://127.0.0.1",
            "fanout where CACHEINVAL_CACHE_URL names a cache outside the process",
        ),
        ("broker_url", "memory://", "fanout where CACHEINVAL_BROKER_URL names no RabbitMQ"),
    ],
)
def test_a_stream_is_refused_where_there_is_none_to_read(variable: str, value: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^CACHEINVAL_BUS=stream: accepted: {words}"):
        Settings(bus="stream", instance_id="one", **{variable: value})
    assert Settings(bus="STREAM").bus == "stream"
