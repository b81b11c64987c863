"""A look at what the database knows of a namespace, for whoever wants to know how it is."""

import time
from collections.abc import Callable

from cacheinval.outbox.instances import NOT_STOPPED, SETTLED_AFTER, Database, answer, registered_in
from cacheinval.outbox.leading import LEADER, leader_in
from cacheinval.overview import Lapsed, Overview

__all__ = ["OLDEST", "look"]

LOOK_WITHIN = 5.0  # seconds
ROWS_LOOKED_AT = 10_000
MOST_LAPSED = 20

OLDEST = """
    SELECT count(*) AS count, extract(epoch FROM clock_timestamp() - min(recorded_at))::float8 AS oldest
    FROM (SELECT recorded_at FROM cacheinval.outbox WHERE namespace = $1 AND publish_at <= clock_timestamp() LIMIT $2) AS rows
"""

_LOOK = f"""
    WITH known AS (
        SELECT *, expires_at > now() AS stands FROM cacheinval.instances WHERE namespace = $1 AND {NOT_STOPPED}
    ), live AS (
        SELECT *, since < now() - make_interval(secs => $3::float8) AS settled FROM known WHERE stands ORDER BY id, session
    ), lapsed AS (
        SELECT id, extract(epoch FROM now() - max(expires_at))::float8 AS seconds FROM known
        GROUP BY id HAVING NOT bool_or(stands) ORDER BY seconds LIMIT {MOST_LAPSED}
    )
    SELECT extract(epoch FROM clock_timestamp())::float8 AS told,
        (SELECT oldest FROM ({OLDEST}) AS due) AS oldest,
        ARRAY(SELECT id FROM live) AS ids, ARRAY(SELECT session FROM live) AS sessions,
        ARRAY(SELECT max_staleness FROM live) AS stalenesses, ARRAY(SELECT settled FROM live) AS settled,
        ARRAY(SELECT id FROM lapsed) AS lapsed, ARRAY(SELECT seconds FROM lapsed) AS lapsed_for, of_lead.*
    FROM (VALUES (1)) AS once LEFT JOIN ({LEADER}) AS of_lead ON true
"""  # noqa: S608 (constants)


async def look(database: Callable[[], Database], namespace: str) -> Overview:
    """What the database knows.

    Raises:
        DatabaseError: it cannot be used, and why.
    """
    before = time.time()
    row = await answer(
        LOOK_WITHIN, lambda: database().fetchrow(_LOOK, namespace, ROWS_LOOKED_AT, SETTLED_AFTER)
    )
    offset = max(0.0, row["told"] - time.time()) - max(0.0, before - row["told"])
    registered = registered_in(row)
    settled = [one for one, is_settled in zip(registered, row["settled"], strict=True) if is_settled]
    leader, lapsed = leader_in(row), list(map(Lapsed, row["lapsed"], row["lapsed_for"]))
    return Overview(registered, settled, leader is not None, row["oldest"], offset, leader, lapsed)
