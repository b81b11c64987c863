"""Which process leads, as far as the database can tell: a relay names its session after its process."""

import os
import re
import socket
from collections.abc import Mapping
from typing import Any

from cacheinval.overview import Leader

__all__ = ["LEADER", "leader_in", "session_name"]

LONGEST_NAME = 63  # bytes; Postgres cuts off what is longer

# An advisory lock of one bigint is listed as its two halves. Of another role's session the server tells the name, and no
# more to those without pg_read_all_stats.
LEADER = """
    SELECT pid AS leader, application_name AS leader_name, host(client_addr) AS leader_address,
        extract(epoch FROM backend_start)::float8 AS leader_since,
        extract(epoch FROM clock_timestamp() - state_change)::float8 AS leader_quiet
    FROM (SELECT hashtextextended('cacheinval.relay.' || $1, 0) AS key) AS lock
    JOIN pg_locks ON locktype = 'advisory' AND granted AND objsubid = 1
        AND classid = ((key >> 32) & 4294967295)::oid AND objid = (key & 4294967295)::oid
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    LEFT JOIN pg_stat_activity USING (pid)
"""


def session_name(host: str | None = None, pid: int | None = None) -> str:
    """What the relay of a process calls its session; by default that of this process."""
    told = (host or socket.gethostname()).encode("ascii", "replace").decode().replace(" ", "-")
    prefix, suffix = "cacheinval relay ", f" {pid or os.getpid()}"
    return prefix + told[: LONGEST_NAME - len(prefix) - len(suffix)] + suffix


def leader_in(row: Mapping[str, Any] | None) -> Leader | None:
    """Who leads by a row of `LEADER`; None where nobody does."""
    if row is None or row["leader"] is None:
        return None
    name = row["leader_name"] or ""
    process = re.fullmatch(r"cacheinval relay (\S+) (\d+)", name)
    return Leader(
        row["leader"],
        name,
        None if process is None else process[1],
        None if process is None else int(process[2]),
        row["leader_address"],
        row["leader_since"],
        row["leader_quiet"],
    )
