"""What to do, by what broker and database say: the same words for the doctor, `status` and the page. Pure."""

import re
from shlex import quote
from urllib.parse import SplitResult, unquote, urlsplit

from cacheinval.overview import Leader

__all__ = [
    "CONFIGURE",
    "NO_EXCHANGE",
    "READ",
    "RELAY",
    "TIME_SERVICE",
    "WRITE",
    "broker",
    "cache_server",
    "database",
    "delete",
    "grant",
    "set_permissions",
    "silent_leader",
    "vhost_of",
]

CONFIGURE = r"^(cacheinval\.[A-Za-z0-9_.-]+|amq\.gen-.*)$"
WRITE = r"^(cacheinval\.[A-Za-z0-9_.-]+|amq\.gen-.*|amq\.default)$"
READ = r"^(cacheinval\.[A-Za-z0-9_.-]+|amq\.gen-.*)$"
"""As `config/definitions.json` has them."""

RELAY = (
    "see that a relay runs (`cacheinval relay`, or CACHEINVAL_RELAY=auto) and reaches database and broker; one that hangs "
    "counts as none: restart a process whose /healthz does not answer"
)

SILENT = (
    "see whether its process runs, and what its log says last; its own page and /status answer without the broker, and say "
    "so where it may not subscribe or answer"
)

NO_EXCHANGE = (
    "it is made by whoever subscribes next, and within 3 ticks by an instance that runs: see that one does, and that "
    "CACHEINVAL_BROKER_URL, with its virtual host, and CACHEINVAL_NAMESPACE here are those of the instances"
)

TIME_SERVICE = "run a time service (chrony) on both; CACHEINVAL_MAX_CLOCK_SKEW says what is accepted"


def broker(reason: str, url: str, host: str = "here") -> str:
    """What to do where the broker cannot be used.

    Args:
        reason: why, in the words of broker or system.
        url: how it is reached; its password may be masked.
        host: from where.
    """
    user = _split(url).username or "guest"
    if re.search(r"access to (?!vhost)\w+ .*refused for user", reason):
        return f"grant what is needed: {set_permissions(url)}"
    if "vhost" in re.sub(" in vhost '.*?'", "", reason):  # and not only as the place of something else
        vhost = vhost_of(url)
        make = f"`rabbitmqctl add_vhost {quote(vhost)}`"
        if vhost == "/":  # which is there unless somebody has deleted it
            return f"{set_permissions(url)}; should the default vhost have been deleted, {make} first"
        return f"correct the path of CACHEINVAL_BROKER_URL, or {make} and {set_permissions(url)}"
    if re.search(r"(?i)login|access_refused|authentication|credentials", reason):
        return (
            f"correct user and password in CACHEINVAL_BROKER_URL (guest logs in from the broker's own host only); "
            f"`rabbitmqctl authenticate_user {user}` tries them, `rabbitmqctl change_password {user}` sets a new one"
        )
    if re.search(r"WRONG_VERSION_NUMBER|PACKET_LENGTH_TOO_LONG|RECORD_LAYER_FAILURE", reason):
        return (
            "that port speaks no TLS: name the port that does in CACHEINVAL_BROKER_URL (5671 by default), or use amqp:// "
            "where the way there is safe"
        )
    if "reset" in reason and re.match(r"amqp://[^/]*:5671\b", url):
        return "that port speaks TLS by default: use amqps:// in CACHEINVAL_BROKER_URL"
    if re.search(r"(?i)certificate|ssl|tls", reason):
        return (
            "name the authority that signed the broker's certificate in CACHEINVAL_BROKER_CA_FILE, and, where the broker "
            "asks for one, a certificate and its key in CACHEINVAL_BROKER_CERT_FILE and CACHEINVAL_BROKER_KEY_FILE"
        )
    if "blocks publishers" in reason:
        return (
            "`rabbitmq-diagnostics alarms` says which (memory or disk): free some. Writes go on meanwhile, their rows "
            "wait"
        )
    named = re.search(r"inequivalent arg .* for (exchange|queue) '([^']*)' in vhost '(.*?)'(?:: |$)", reason)
    if named is not None:
        return delete(*named.groups())
    if "home node" in reason:
        return "start that node; `rabbitmqctl cluster_status` at another one says how they see it"
    if "is missing" in reason or "no exchange '" in reason:
        return NO_EXCHANGE
    if re.search(r"within [\d.]+ s|no sign of life", reason):
        return (
            "see whether the broker is overloaded, frozen or blocked by an alarm (`rabbitmq-diagnostics status`, "
            "`rabbitmq-diagnostics alarms`)"
        )
    return f"see that RabbitMQ runs (`rabbitmq-diagnostics status`), and that CACHEINVAL_BROKER_URL leads to it from {host}"


def delete(sort: str, name: str, vhost: str) -> str:
    """What to do about an exchange or a queue of another kind."""
    command = f"rabbitmqctl delete_queue -p {quote(vhost)} {quote(name)}"
    if sort == "exchange":  # for which there is none; this one, unlike rabbitmqadmin, needs no plugin
        resource = f"rabbit_misc:r({_binary(vhost)}, exchange, {_binary(name)})"
        command = "rabbitmqctl eval " + quote(f'rabbit_exchange:delete({resource}, false, <<"operator">>).')
    return f"`{command}` deletes it, at best while nothing else uses it: instances declare it as it has to be"


def cache_server(which: str, host: str) -> str:
    """What to do where a cache outside the process cannot be used from `host`."""
    return f"see that the cache server {which} runs and can be reached from {host}"


def _binary(text: str) -> str:
    """As Erlang writes it."""
    escaped = text.replace("\\", r"\\").replace('"', r"\"")
    return f'<<"{escaped}">>' if text.isascii() else f'<<"{escaped}"/utf8>>'


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # it is what others tell
        return urlsplit("")


def vhost_of(url: str) -> str:
    """The virtual host that this address leads to."""
    return unquote(_split(url).path[1:]) or "/"


def set_permissions(url: str) -> str:
    """The command that grants what a user of cacheinval needs."""
    user = unquote(_split(url).username or "guest")
    return f"`rabbitmqctl set_permissions -p {quote(vhost_of(url))} {quote(user)} '{CONFIGURE}' '{WRITE}' '{READ}'`"


def silent_leader(leader: Leader) -> str:
    """What to do where a relay leads, and sends no ticks."""
    return (
        f"the relay that leads ({leader}) sends none: see its page at /, or what its log says last (`no ticks` says why: its "
        "clock may differ from the database's, or many rows wait); if it hangs, restart it"
    )


def grant(role: str) -> str:
    """The command that grants what a role needs that is a client, a worker or a relay."""
    return f"`cacheinval schema grant {quote(role)}` as the schema's owner (with `--print` it shows the SQL)"


def _way_in(reason: str) -> str | None:
    """What to do where Postgres runs, and lets nobody in; None where that is not what it says."""
    if (named := re.search('role "(.*)" is not permitted to log in', reason)) is not None:
        return f"`ALTER ROLE {_identifier(named[1])} LOGIN;`, or name another role in CACHEINVAL_DATABASE_URL"
    if (named := re.search('password authentication failed for user "(.*)"', reason)) is not None:
        change = f"`ALTER ROLE {_identifier(named[1])} PASSWORD '…';`"
        return f"correct the password in CACHEINVAL_DATABASE_URL; {change} sets a new one, and so does \\password in psql"
    if (named := re.search('role "(.*)" does not exist', reason)) is not None:
        make = f"`CREATE ROLE {_identifier(named[1])} LOGIN PASSWORD '…';`"
        return (
            f"correct the user in CACHEINVAL_DATABASE_URL, or make the role: {make}, then {grant(named[1])}"
        )
    if (named := re.search('database "(.*)" does not exist', reason)) is not None:
        make = f"`CREATE DATABASE {_identifier(named[1])};`"
        return f"correct the path of CACHEINVAL_DATABASE_URL, or make the database: {make}"
    named = re.search('no pg_hba.conf entry for host "(.*?)", user "(.*)", database "(.*)"', reason)
    if named is not None:
        line = f"`{_line_of_pg_hba(*named.groups())}`"
        steps = f"have {line} in pg_hba.conf on the server, or a line that says more, and run `SELECT pg_reload_conf();`"
        return f"{steps}; where it admits TLS only, ?sslmode=require" if "no encryption" in reason else steps
    if re.search(r"authentication|pg_hba", reason):
        return (
            "correct user and password in CACHEINVAL_DATABASE_URL, or let pg_hba.conf on the server admit it"
        )
    return None


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _line_of_pg_hba(host: str, user: str, database: str) -> str:
    who = " ".join(
        name if re.fullmatch("[a-z_][a-z0-9_]*", name) else _identifier(name) for name in (database, user)
    )
    if host == "[local]":
        return f"local {who} scram-sha-256"
    return f"host {who} {host}/{128 if ':' in host else 32} scram-sha-256"


def database(reason: str, host: str = "here", role: str | None = None) -> str:
    """What to do where the database cannot be used.

    Args:
        reason: why, in the words of database or system.
        host: from where.
        role: as whom; None where that is not known.
    """
    if "schema apply" in reason:
        return "run `cacheinval schema apply` as the role that owns the schema, or is to"
    if "permission denied" in reason or "GRANT " in reason:
        if role is not None:
            return f"run {grant(role)}"
        return f"run {grant('ROLE')}, for the role of CACHEINVAL_DATABASE_URL; `cacheinval doctor` says what it lacks"
    if "clock" in reason:
        return TIME_SERVICE
    if re.search(r"standby|recovery|read-only", reason):
        return "CACHEINVAL_DATABASE_URL has to lead to the primary: name its host, or a name that follows it"
    refused = _way_in(reason)
    if refused is not None:
        return refused
    if re.search(r"too many|connection slots", reason):
        return "raise max_connections, or have fewer and smaller pools"
    if re.search(r"ertificate|SSL", reason):
        return "see sslmode, sslrootcert, sslcert and sslkey in CACHEINVAL_DATABASE_URL"
    return f"see that Postgres runs (`pg_isready`), and that CACHEINVAL_DATABASE_URL leads to it from {host}"
