"""Everything that can be configured, from the environment (prefix `CACHEINVAL_`), secret files, or keyword arguments."""

import os
import re
import secrets
import socket
from collections.abc import Callable
from difflib import get_close_matches
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit, urlunsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from cacheinval.errors import ConfigurationError

__all__ = ["Settings", "addresses", "mask_url", "refuse_memory", "unknown_variables"]

PREFIX = "CACHEINVAL_"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SECRET_PARAMETER = re.compile(
    r"(?i)\b(password|passwd|pwd|secret|token|sslpassword)(\s*=\s*)('[^']*'?|[^&#\s]*)"
)
_PORT = re.compile(r"[^/?#]*://(?:[^/?#]*@)?[^/?#@]*:([0-9]+)(?=[/?#]|$)")
_BOUNDS = {  # of a number, in the words of its schema and in those of the errors
    "exclusiveMinimum": "greater than",
    "minimum": "greater than or equal to",
    "maximum": "less than or equal to",
}


def mask_url(url: str) -> str:
    """`url` with its password replaced by `***`; text that is no URL comes back without anything that looks like one."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if "@" in url.replace(parts.netloc, "", 1):
        return "***"  # a password with a character that should be escaped: where it ends cannot be told
    userinfo, at, host = parts.netloc.rpartition("@")
    if at:
        user, colon, _ = userinfo.partition(":")
        url = urlunsplit(parts._replace(netloc=f"{user}{':***' if colon else ''}@{host}"))
    return _SECRET_PARAMETER.sub(r"\1\2***", url)


def addresses(url: str) -> list[str]:
    """One URL for each host of `url`, which may name several: `amqp://user@one:5672,two:5672/vhost`."""
    scheme, mark, rest = url.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    userinfo, at, hosts = authority.rpartition("@")
    return [f"{scheme}{mark}{userinfo}{at}{host}{rest[len(authority) :]}" for host in hosts.split(",")]


def _url_of_several(*schemes: str, empty: bool = False) -> Callable[[str], str]:
    check_one = _url(*schemes, empty=empty)

    def check(url: str) -> str:
        hosts = addresses(url)
        for number, address in enumerate(hosts, 1):
            try:
                check_one(address)
            except ValueError as error:
                which = f"host {number} of {len(hosts)} cannot be used; " if len(hosts) > 1 else ""
                raise ValueError(f"{which}{error}") from None
        return url

    return check


def _url(*schemes: str, empty: bool = False) -> Callable[[str], str]:
    accepted = ", ".join(f"{scheme}://…" for scheme in schemes) + (", or empty for none" if empty else "")

    def names_socket(parts: SplitResult) -> bool:  # libpq's way to name one of the same machine
        return parts.scheme.startswith("postgres") and "host=" in parts.query

    def check(url: str) -> str:
        if empty and not url:
            return url
        try:
            parts = urlsplit(url)
            usable = (
                parts.scheme in schemes
                and "://" in url
                and (parts.scheme == "memory" or bool(parts.hostname) or names_socket(parts))
            )
            usable &= parts.port != 0  # raises where the port is none
        except ValueError:
            usable = False
        if not usable:
            number = _PORT.match(url)
            beyond = number is not None and not 1 <= float(number[1]) <= 65535
            port = ", with a port of 1 to 65535" if beyond else ""
            cut = "@" in url and "@" not in url.partition("://")[2].partition("#")[0].partition("?")[0]
            encode = "; in a user or password # and ? are written as %23 and %3F" if cut else ""
            raise ValueError(f"accepted: {accepted}{port}{encode}")
        return url

    return check


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("accepted: 1 to 64 letters, digits, '_' and '-'")
    return value


def _instance_name(value: str) -> str:
    if _name(value) in ("dead", "stream"):
        raise ValueError("accepted: any name but 'dead' and 'stream', which queues of the namespace have")
    return value


def _new_instance_id() -> str:
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:40] or "host"
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


def _none_if_empty(value: object) -> object:
    return None if value == "" else value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, AfterValidator(_name)]


class Settings(BaseSettings):
    """How one instance is set up.

    Each field is read from the keyword argument, else from the environment variable of the same name in upper case with
    the prefix `CACHEINVAL_`, else from a file of that name in `CACHEINVAL_SECRETS_DIR` (default `/run/secrets`).

    >>> settings = Settings(namespace="shop", max_staleness=5)  # everything else from the environment, or the default
    >>> settings.max_staleness, settings.cache_ttl
    (5.0, 300)

    Raises:
        ConfigurationError: a value cannot be used; one line for each names the variable, the value (secrets masked)
            and what is accepted.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=False
    )

    broker_url: Annotated[str, AfterValidator(_url_of_several("amqp", "amqps", "memory"))] = Field(
        default="amqp://guest:guest@127.0.0.1:5672/",
        description="`amqp(s)://…`, of a cluster `amqp://user:password@one:5672,two:5672/vhost`; or `memory://` within "
        "one process",
    )
    broker_ca_file: Annotated[str | None, BeforeValidator(_none_if_empty)] = Field(
        default=None,
        description="PEM file of the authority that signed the broker's certificate (`amqps://`)",
    )
    broker_cert_file: Annotated[str | None, BeforeValidator(_none_if_empty)] = Field(
        default=None, description="PEM file of this client's certificate, for a broker that asks for one"
    )
    broker_key_file: Annotated[str | None, BeforeValidator(_none_if_empty)] = Field(
        default=None, description="PEM file of its key, without a passphrase; unset: in the same file"
    )
    bus: Annotated[Literal["fanout", "stream"], BeforeValidator(_lower)] = Field(
        default="fanout",
        description="`fanout`: a queue for each instance; `stream`: one RabbitMQ stream that all of them read, for caches in "
        "the process",
    )
    database_url: Annotated[str, AfterValidator(_url_of_several("postgresql", "postgres", empty=True))] = (
        Field(
            default="postgresql://postgres@127.0.0.1:5432/postgres",
            description="may name several hosts; empty: no database (no outbox, no relay)",
        )
    )
    cache_url: Annotated[str, AfterValidator(_url("memory", "redis", "memcached"))] = Field(
        default="memory://",
        description="`memory://` in the process; `redis://…` or `memcached://…` outside it",
    )
    namespace: Name = Field(
        default="default", description="a family of caches; letters, digits, `_`, `-`, at most 64"
    )
    instance_id: Annotated[str, AfterValidator(_instance_name)] = Field(
        default_factory=_new_instance_id,
        description="host, pid and a random part; must be set, and stay the same, for a cache outside the process",
    )
    cache_ttl: Seconds = Field(default=300, description="seconds that an entry is kept")
    cache_ttl_jitter: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0, description="up to which part of its ttl an entry expires early, at random; 0 to 1"
    )
    stale_if_error: NotNegative = Field(
        default=0, description="seconds; for how long a stale value is given where loading fails; 0: never"
    )
    stale_while_revalidate: NotNegative = Field(
        default=0,
        description="seconds past its ttl for which a value is given while it is loaded again; 0: never",
    )
    cache_max_entries: Annotated[int, Field(ge=1)] = Field(
        default=100_000, description="bound of the cache in the process"
    )
    cache_local_entries: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="entries kept in the process in front of a cache outside it; 0: none, each read asks that cache",
    )
    cache_serializer: Annotated[Literal["json", "msgpack", "pickle"], BeforeValidator(_lower)] = Field(
        default="json",
        description="how values are written in a cache outside the process: `json`, `msgpack`, or `pickle`, which lets "
        "whoever can write to that cache run code here",
    )
    cache_compress_above: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="bytes; longer values are compressed (zlib) in a cache outside the process; 0: none",
    )
    max_staleness: Annotated[Seconds | None, BeforeValidator(_none_if_empty)] = Field(
        default=None,
        description="seconds for which a value may still be served after it was replaced; unset: no bound",
    )
    max_concurrent_loads: Annotated[int, Field(ge=1)] = Field(
        default=64, description="loaders that run at a time; further ones wait"
    )
    warm_keys: Annotated[int, Field(ge=0, le=10_000)] = Field(
        default=0,
        description="keys read last that are loaded again after an eviction, at most 10000; 0: none",
    )
    warm_interval: Seconds = Field(
        default=1, description="seconds between two such loads of one key, however often it is evicted"
    )
    max_replica_lag: Seconds = Field(
        default=30, description="seconds by which a replica that loaders read may lag behind"
    )
    relay: Annotated[Literal["auto", "off"], BeforeValidator(_lower)] = Field(
        default="auto", description="`auto`: take part in relaying the outbox; `off`: leave it to others"
    )
    tick_interval: Seconds = Field(default=1, description="seconds between the relay's signs of life")
    max_clock_skew: NotNegative = Field(
        default=0.1, description="seconds that clocks of hosts and database may differ"
    )
    publish_timeout: Seconds = Field(default=5, description="seconds to wait for the broker's confirm")
    prefetch: Annotated[int, Field(ge=1, le=65535)] = Field(
        default=500, description="messages under way to an instance and not yet acknowledged"
    )
    audit_interval: NotNegative = Field(
        default=0, description="seconds between audits of some entries against their source; 0: none"
    )
    http_host: str = Field(default="127.0.0.1", description="address for health, metrics and products")
    http_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, description="0 is any free port, and the default of `worker` and `relay`"
    )
    page: Annotated[Literal["on", "off"], BeforeValidator(_lower)] = Field(
        default="on",
        description="`on`: the fleet, with keys of its last writes, is shown at `/`; `off`: it is not",
    )
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = Field(
        default="INFO", description="`DEBUG`, `INFO`, `WARNING` or `ERROR`"
    )
    log_format: Annotated[Literal["text", "json"], BeforeValidator(_lower)] = Field(
        default="text", description="`text` or `json`"
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(_secrets_dir=_secrets_dir(), **values)
        except ValidationError as error:
            raise ConfigurationError(
                "\n".join(_explain(problem, values) for problem in error.errors(include_input=True))
            ) from None

    @model_validator(mode="after")
    def _staleness_can_be_proven(self) -> "Settings":
        least = 2 * self.tick_interval + 0.25 + 2 * self.max_clock_skew
        if self.max_staleness is not None and self.max_staleness < least:
            raise ValueError(
                f"max_staleness={self.max_staleness:g}: accepted: at least {least:g} "
                "(2 x TICK_INTERVAL + 0.25 + 2 x MAX_CLOCK_SKEW seconds)"
            )
        return self

    @model_validator(mode="after")
    def _key_has_a_certificate(self) -> "Settings":
        if self.broker_key_file is not None and self.broker_cert_file is None:
            raise ValueError(
                f"broker_key_file={self.broker_key_file}: accepted: unset unless CACHEINVAL_BROKER_CERT_FILE names the "
                "certificate of this key"
            )
        return self

    @model_validator(mode="after")
    def _levels_are_two(self) -> "Settings":
        if self.cache_local_entries and not self.cache_is_external:
            raise ValueError(
                f"cache_local_entries={self.cache_local_entries}: accepted: 0 unless CACHEINVAL_CACHE_URL names a cache "
                "outside the process (CACHEINVAL_CACHE_MAX_ENTRIES bounds the one in it)"
            )
        return self

    @model_validator(mode="after")
    def _streams_are_read_by_caches_in_the_process(self) -> "Settings":
        if self.bus == "stream" and self.cache_is_external:
            raise ValueError(
                "bus=stream: accepted: fanout where CACHEINVAL_CACHE_URL names a cache outside the process"
            )
        if self.bus == "stream" and self.broker_url.startswith("memory:"):
            raise ValueError(
                "bus=stream: accepted: fanout where CACHEINVAL_BROKER_URL names no RabbitMQ (memory://)"
            )
        return self

    @property
    def cache_is_external(self) -> bool:
        """Whether the cache lives outside this process, and so outlives it.

        >>> Settings(cache_url="redis://127.0.0.1:6379/0", instance_id="shop-1").cache_is_external
        True
        """
        return not self.cache_url.startswith("memory:")

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        return [
            (name, mask_url(value) if isinstance(name, str) and name.endswith("_url") else value)
            for name, value in self
        ]


def unknown_variables() -> list[str]:
    """A warning for each `CACHEINVAL_…` variable in the environment that no setting reads (a typing error, most likely)."""
    known = {name.upper() for name in Settings.model_fields} | {"SECRETS_DIR"}
    warnings = []
    for variable in sorted(os.environ):
        prefix, name = variable.upper()[: len(PREFIX)], variable.upper()[len(PREFIX) :]
        if prefix == PREFIX and name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {PREFIX}{close[0]}?" if close else ""
            warnings.append(f"{variable} is not a setting{hint}")
    return warnings


def refuse_memory(settings: Settings) -> None:
    """For what speaks to other processes alone.

    Raises:
        ConfigurationError: the broker is within this process.
    """
    if settings.broker_url.startswith("memory:"):
        raise ConfigurationError(
            "CACHEINVAL_BROKER_URL=memory://: accepted: amqp://…, amqps://… (nobody hears what one process tells itself)"
        )


def _secrets_dir() -> str | None:
    folder = os.environ.get(f"{PREFIX}SECRETS_DIR")
    if folder and not os.path.isdir(folder):
        raise ConfigurationError(f"{PREFIX}SECRETS_DIR={folder}: accepted: a folder")
    return folder or ("/run/secrets" if os.path.isdir("/run/secrets") else None)


def _explain(problem: Any, values: dict[str, Any]) -> str:
    text = problem["msg"].removeprefix("Value error, ")
    text = text.replace("Input should be ", "accepted: ").partition(", unable to parse")[0]
    text = text.partition(", got a number with")[0]
    if not problem["loc"]:  # from the validator of the whole: it names its field itself
        name, _, rest = text.partition("=")
        return f"{PREFIX}{name.upper()}={rest}"
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        close = get_close_matches(name, Settings.model_fields, n=1)
        return f"{name} is not a setting" + (f"; did you mean {close[0]}?" if close else "")
    value = problem["input"]
    shown = mask_url(value) if isinstance(value, str) else repr(value)
    if not shown.isprintable():
        shown = repr(shown)  # it is to be one line
    return f"{PREFIX}{name.upper()}={shown}: {text}{_range(name) if 'accepted: a valid ' in text else ''}"


def _range(name: str) -> str:
    """Within which that number has to be."""
    told = Settings.model_json_schema()["properties"][name]
    bounds = {
        key: bound for one in (told, *told.get("anyOf", ())) for key, bound in one.items() if key in _BOUNDS
    }
    return "".join(f", {words} {bounds[key]}" for key, words in _BOUNDS.items() if key in bounds)
