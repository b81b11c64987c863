"""Proven freshness in every order of events that a small world with time allows."""

import pytest

import cacheinval.coherence as rules
import cacheinval.outbox.ticks as ticks

from .changing import changed
from .conftest import Exploring
from .freshness import Span, timed
from .mutants import (
    FEW_ORIGINS,
    FEW_ROWS,
    MANY_ROWS,
    PUT_OFF,
    SCHEMA_DROPPED,
    TIMED_MUTANTS,
    TimedMutant,
)

# With a staleness of 0 a second less has to pass before a wrong hit shows, so that more else can happen.
SPANS = {
    "a write and a tick": Span(),
    "two ticks": Span(looks=2, until=4),
    "the first tick": Span(staleness=0, until=3, baselined=False, drops=1),
    "two writers": Span(staleness=0, until=3, writers=2, writes=2, looks=0, grace=True),
    "a dropped message": Span(drops=1),
    "a purged queue": Span(staleness=0, until=3, writes=1, slow_writes=1, purges=1, grace=True),
    "a writer killed at any moment": Span(kills=1),
    "a write left to the relay, a delete lost": Span(
        staleness=0, until=4, writes=0, unrecorded=1, lost_deletes=1
    ),
    "a delete lost, a message dropped": Span(lost_deletes=1, drops=1, staleness=0, until=3),
    "a channel replaced, a message dropped": Span(staleness=0, until=3, renewals=1, drops=1),
    "own writes": Span(staleness=0, until=3, own=True, writes=2, renewals=1, looks=0),
    "an ambiguous commit": Span(writes=0, unknown_commits=1),
    "an own ambiguous commit": Span(staleness=0, until=4, own=True, writes=0, unknown_commits=1, renewals=1),
    "a long transaction": Span(writes=0, slow_writes=1),
    "two relays": Span(staleness=0, until=3, relays=2, looks=2, grace=True),
    "a zombie among the relays": Span(
        staleness=0, until=3, relays=2, looks=2, late_ticks=True, writes=0, unrecorded=1
    ),
    "another database's ticks": Span(foreign_ticks=1, until=4),
    "a schema that is made again": SCHEMA_DROPPED,
    "a schema that is made again, a queue that survives": Span(
        schema_drops=1, writes=0, unrecorded=1, staleness=0, until=3, durable=True, losses=1
    ),
    "a schema that is made again, gaps put off": Span(
        schema_drops=1, writes=0, unrecorded=1, malformed=1, looks=2, staleness=0, until=3
    ),
    "a lost subscription": Span(losses=1, until=4),
    "a lost subscription, a message dropped": Span(staleness=0, until=3, losses=1, drops=1),
    "a queue that survives": Span(staleness=0, until=3, durable=True, losses=1),
    "the same, in batches": Span(staleness=0, until=3, durable=True, losses=1, batches=True),
    "evictions that fail": Span(staleness=0, until=3, batches=True, failures=1, drops=1),
    "gaps put off": Span(staleness=0, until=3, malformed=1, drops=1, looks=2),
    "two gaps put off, three ticks": PUT_OFF,
    "gaps put off, clearing fails": Span(
        staleness=0, until=3, malformed=1, drops=1, looks=1, failures=1, batches=True
    ),
    "loads that hang": Span(hung_loads=True, until=4),
    "loads that hang, two readers": Span(hung_loads=True, readers=2, looks=1, staleness=0, until=3),
    "two keys with a shared tag": Span(staleness=0, until=3, keys=("k", "l"), tagged=True, by_tag=True),
    "clocks that differ": Span(skew=1, staleness=2, database_ahead=1, until=6),
    "clocks that differ, the other way": Span(skew=1, staleness=2, ahead=1, until=6),
    "ticks from the future": Span(database_ahead=1, until=4),
    "a clock set forwards and back": Span(clocks=(0, 2), clock_sets=2, until=4),
    "a clock put right": Span(database_ahead=2, ahead=2, clocks=(0,), clock_sets=1, staleness=0, until=5),
    "a clock put right within a batch": Span(
        database_ahead=1, ahead=1, clocks=(0,), clock_sets=1, batches=True, staleness=0, until=4
    ),
    "a clock put right between gaps": Span(
        ahead=2, clocks=(0,), clock_sets=1, malformed=2, looks=0, staleness=0, until=3
    ),
    "a deaf subscription": Span(staleness=0, until=4, silence=1, deaf=1, looks=0),
    "a deaf subscription, a clock put right": Span(
        silence=1, deaf=1, looks=0, writes=0, ahead=2, clocks=(0,), clock_sets=1
    ),
    "loads that fail": Span(staleness=0, until=4, ttl=1, if_error=1, load_failures=1, drops=1),
    "loads that hang and fail": Span(
        staleness=0, until=3, if_error=1, load_failures=1, hung_loads=True, readers=2, looks=0
    ),
    "loads that fail without a subscription": Span(
        staleness=None, until=5, if_error=2, load_failures=1, losses=1, looks=0
    ),
    "loads that fail, by tag": Span(
        staleness=None, until=4, if_error=1, load_failures=1, tagged=True, by_tag=True, looks=0
    ),
    "loads that fail, a clock set": Span(
        ahead=2, clocks=(0,), clock_sets=1, if_error=1, load_failures=1, looks=0, until=5
    ),
    "values past their ttl": Span(staleness=1, until=4, ttl=1, overtime=1, drops=1),
    "values past their ttl, loads that hang": Span(
        staleness=0, until=3, ttl=1, overtime=1, hung_loads=True, readers=2, looks=1
    ),
    "values past their ttl that are kept, by tag": Span(
        staleness=0, until=4, ttl=1, overtime=2, if_error=2, tagged=True, by_tag=True, losses=1, looks=0
    ),
    "no limit of staleness": Span(staleness=None, losses=1, drops=1, until=4, looks=0),
}
MOST = 100_000


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SPANS)
def test_no_hit_is_staler_than_promised(exploring: Exploring, name: str) -> None:
    exploring(name, timed(rules, ticks, SPANS[name]), MOST)


@pytest.mark.timeout(600)
def test_more_origins_than_are_remembered_cost_epochs_and_no_freshness(exploring: Exploring) -> None:
    few = changed(rules, FEW_ORIGINS, "few origins")
    span = Span(staleness=0, until=3, writes=1, unrecorded=1, drops=1, looks=1, grace=True)
    exploring("more origins than are remembered", timed(few, ticks, span), MOST)


@pytest.mark.timeout(600)
def test_a_look_that_sees_only_a_part_makes_no_tick(exploring: Exploring) -> None:
    few = changed(ticks, FEW_ROWS, "few rows")
    exploring("more rows than a look takes in", timed(rules, few, MANY_ROWS), MOST)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", TIMED_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_changed_line_is_caught(exploring: Exploring, mutant: TimedMutant) -> None:
    wrong_rules = changed(rules, mutant.changes, mutant.name)
    wrong_ticks = changed(ticks, mutant.tick_changes, mutant.name + " ticks")
    world = timed(wrong_rules, wrong_ticks, mutant.span, mutant.relaying)
    exploring(mutant.name, world, MOST, caught=True)
