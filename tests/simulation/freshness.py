"""A world with time: writers, the outbox, relays that tick, a broker, and an instance that serves by proof.

The rules, and what decides when a tick may be sent (`outbox/ticks.py`), are the real ones; what lies between them does what
`publisher.py`, `relay.py`, `receiver.py` and `cache/` do, one step at a time. Time is real time in whole seconds; the
instance and the database each have a clock of their own.
"""

import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cacheinval.messages import Invalidate, Probe, Tick
from cacheinval.outbox.session import Confirmed, Look

from .copying import copied
from .explore import BrokenError
from .standing import rely_on

SOURCE = "the database"
TAG = "t"
FOREVER = 1e9
BUDGETS = (
    "writes", "slow_writes", "unknown_commits", "unrecorded", "kills", "renewals", "lost_deletes", "looks", "drops",
    "purges", "losses", "deaf", "malformed", "foreign_ticks", "failures", "clock_sets", "load_failures",
    "schema_drops",
)  # fmt: skip

Act = Callable[["Timed"], None]


@dataclass(frozen=True)
class Span:
    """How large the world is, and how much of what can happen in it."""

    staleness: int | None = 1
    skew: int = 0
    until: int = 5
    keys: tuple[str, ...] = ("k",)
    tagged: bool = False
    by_tag: bool = False
    readers: int = 1
    hung_loads: bool = False
    """Reading takes a while; otherwise a read that misses loads and stores at once."""
    writers: int = 1
    own: bool = False
    """The first writer is this instance's own client."""
    grace: bool = False
    """Relays leave alone what a client is about to publish."""
    relays: int = 1
    late_ticks: bool = False
    """A relay can be frozen between the decision to tick and the tick: it wakes up as a zombie."""
    baselined: bool = True
    """A tick has been processed before anything else happens."""
    durable: bool = False
    """The queue survives, and the cache is outside the process."""
    batches: bool = False
    """All that waits is received at once, and evicting takes a while, as in a cache outside the process."""
    most_waiting: int = 100
    """Rows that a look sees."""
    silence: int = 0
    """Seconds after which a deaf subscription is given up; 0: nobody listens for that."""
    database_ahead: int = 0
    clocks: tuple[int, ...] = ()
    """What the clock of the instance's host can be set to, in seconds ahead of real time."""
    ahead: int = 0
    writes: int = 1
    slow_writes: int = 0
    unknown_commits: int = 0
    unrecorded: int = 0
    """Writes whose client leaves them to the relay."""
    kills: int = 0
    renewals: int = 0
    lost_deletes: int = 0
    looks: int = 1
    drops: int = 0
    purges: int = 0
    losses: int = 0
    deaf: int = 0
    malformed: int = 0
    foreign_ticks: int = 0
    failures: int = 0
    clock_sets: int = 0
    load_failures: int = 0
    schema_drops: int = 0
    ttl: int = 0
    """Seconds; 0: for ever."""
    if_error: int = 0
    """Seconds for which a stale value is given where loading fails."""
    overtime: int = 0
    """Seconds past its ttl for which a value is given while it is loaded again."""


@dataclass(frozen=True)
class Relaying:
    """Where the code around the rules could go wrong; each name is a mutation of it."""

    by_cursor: bool = False
    time_after_look: bool = False
    numbers_of_look: bool = False
    schema_of_look: bool = False
    deletes_before_publishing: bool = False
    echo_without_evicting: bool = False
    forgets_failed_evictions: bool = False
    stores_what_is_given_instead: bool = False


@dataclass
class Reader:
    """One read under way."""

    key: str
    began: int
    least: int
    load: Any
    leads: bool
    value: int | None = None


@dataclass
class Relay:
    """One that takes itself for the leader."""

    origin: str
    ticks: Any
    cursor: int = 0
    half_look: set[int] | None = None
    seen: dict[str, int] = field(default_factory=dict)  # the numbers at the time of the look
    schema: int = 0  # which one it was at the time of the look
    in_hand: list[Any] = field(default_factory=list)  # a tick decided upon, and not sent yet


@dataclass
class Timed:
    """The state."""

    rules: str  # names of modules
    deciding: str
    span: Span
    relaying: Relaying
    coherence: Any
    relays: list[Relay]
    channels: list[str]  # of the writers
    left: dict[str, int]
    version: dict[str, int]
    floor: dict[str, int]
    """By key, what a read that begins now may not fall short of: what was evicted here last."""
    wall: int = 0
    ahead: int = 0
    """By how many seconds the host's wall clock, and what the instance takes for the time, are ahead of real time."""
    real: int = 1
    replaced_at: dict[tuple[str, int], int] = field(default_factory=dict)
    next_row: int = 1
    outbox: dict[int, str] = field(default_factory=dict)
    begun: list[tuple[int, str]] = field(
        default_factory=list
    )  # rows of transactions that have not committed yet
    invisible: list[tuple[int, str]] = field(default_factory=list)  # commits whose client gave up
    to_publish: list[tuple[int, int | None, str, bool]] = field(default_factory=list)
    to_delete: list[tuple[int, int, str, int]] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)  # the table of origins
    schema: int = 0  # how often it was made again
    seqs: dict[str, int] = field(default_factory=dict)
    queue: list[Any] = field(default_factory=list)
    taken: list[Any] = field(default_factory=list)  # received, and not acknowledged yet
    evicting: Any = None
    failing: bool = False
    clearing: bool = False  # for a gap that was put off
    uncleared: bool = False  # clearing failed, and nobody has done it since
    missing: list[tuple[str, int]] = field(
        default_factory=list
    )  # dropped from the queue since the last epoch
    behind: int = 0  # messages left of those that waited when the queue was resumed
    kept: Any = None  # with a cache outside the process: the proof state
    marker: int = 0
    marker_owed: bool = False
    bound: bool = False
    joined: bool = False
    heard_at: int = 1
    entries: dict[str, Any] = field(default_factory=dict)
    readers: list[Reader | None] = field(default_factory=list)

    @property
    def now(self) -> int:
        """What the instance takes for the time."""
        return self.real + self.ahead

    # What can happen

    def actions(self) -> Iterator[tuple[str, Act]]:
        if self.real < self.span.until:
            yield "a second passes", Timed.wait
        yield from self._reader_actions()
        yield from self._writer_actions()
        for number in range(len(self.relays)):
            yield from self._relay_actions(number)
        yield from self._instance_actions()
        yield from self._faults()

    def _writer_actions(self) -> Iterator[tuple[str, Act]]:
        span, left = self.span, self.left
        for key in span.keys:
            of = f" of {key}" if len(span.keys) > 1 else ""
            for writer in range(span.writers):
                by = f" by {self.channels[writer]}" if span.writers > 1 else ""
                if left["writes"]:
                    yield f"commit{of}{by}", partial(Timed.commit, key=key, writer=writer)
                if left["unknown_commits"]:
                    yield f"commit{of}{by}, reply lost", partial(Timed.commit_unknown, key=key, writer=writer)
            if left["slow_writes"]:
                yield f"a transaction takes its row{of}", partial(Timed.begin, key=key)
            if left["unrecorded"]:
                yield f"commit{of}, left to the relay", partial(Timed.commit_unpublished, key=key)
        if self.begun:
            yield "the long transaction commits", Timed.commit_begun
        if self.invisible:
            yield "the lost commit becomes visible", Timed.become_visible
        for writer in range(span.writers):
            name = self.channels[writer] if span.writers > 1 or left["renewals"] else "the writer"
            publishes = any(one[0] == writer for one in self.to_publish)
            deletes = any(one[0] == writer for one in self.to_delete)
            if publishes:
                yield f"{name} publishes", partial(Timed.publish, writer=writer)
                if left["renewals"]:
                    yield (
                        f"{name} publishes, its channel breaks",
                        partial(Timed.publish_unconfirmed, writer=writer),
                    )
            elif left["renewals"]:
                yield f"{name} is replaced", partial(Timed.renew, writer=writer)
            if deletes:
                yield f"{name} deletes its row", partial(Timed.delete, writer=writer)
                if left["lost_deletes"]:
                    yield f"{name}'s delete is lost", partial(Timed.lose_delete, writer=writer)
            if left["kills"] and (publishes or deletes):
                yield f"{name} is killed", partial(Timed.kill, writer=writer)

    def _relay_actions(self, number: int) -> Iterator[tuple[str, Act]]:
        relay = self.relays[number]
        name = f"relay {number}" if len(self.relays) > 1 else "the relay"
        if relay.half_look is not None:
            yield f"{name} takes the time", partial(Timed.finish_look, number=number)
        elif self.left["looks"] and relay.ticks.due(self.real):
            yield f"{name} looks", partial(Timed.look, number=number)
        for row in self._relayed(relay):
            yield f"{name} publishes row {row}", partial(Timed.relay, number=number, row=row)
            if self.left["lost_deletes"]:
                yield (
                    f"{name} publishes row {row}, delete lost",
                    partial(Timed.relay_unnoted, number=number, row=row),
                )
        if relay.in_hand:
            yield f"{name} wakes up and sends its tick", partial(Timed.send_tick, number=number)
        elif relay.ticks._look is not None and self._may_tick(relay):
            if self.span.late_ticks:
                yield (
                    f"{name} decides to tick, and is frozen",
                    partial(Timed.tick, number=number, at_once=False),
                )
            yield f"{name} ticks", partial(Timed.tick, number=number)

    def _instance_actions(self) -> Iterator[tuple[str, Act]]:
        if not self.joined:
            yield ("resumed" if self.span.durable else "joined"), Timed.join
        if self.marker_owed:
            yield "the marker is published", Timed.publish_marker
        if self.evicting is not None:
            if self.failing:
                yield "the eviction succeeds at last", Timed.finish_evicting
                yield "the eviction is given up", Timed.give_up_evicting
            else:
                yield "it is evicted", Timed.finish_evicting
                if self.left["failures"]:
                    yield "the eviction fails", Timed.fail_evicting
        elif self.joined and self.queue:
            if self.span.batches:
                yield f"deliver {', '.join(map(_label, self.queue))}", Timed.deliver_all
            else:
                yield f"deliver {_label(self.queue[0])}", Timed.deliver
        due_at = self.coherence.gap_due_at
        if self.clearing:
            yield "all is cleared", Timed.end_epoch_put_off
            if self.left["failures"]:
                yield "clearing fails", Timed.fail_epoch_put_off
        elif due_at is not None and due_at <= self.now:
            yield "the epoch that was put off begins", Timed.begin_epoch_put_off
        if self.wall != self.ahead:
            yield "the clock is seen to be set", Timed.notice_clock
            if self.left["failures"]:
                yield "the clock is seen to be set, clearing fails", Timed.notice_clock_in_vain
        if self.span.silence and self.joined and self.coherence.silent(self.now, self.span.silence):
            yield "silence", Timed.give_up_silent

    def _faults(self) -> Iterator[tuple[str, Act]]:
        left = self.left
        if self.bound and self.queue:
            if left["drops"]:
                yield f"{_label(self.queue[0])} is dropped", Timed.drop
            if left["malformed"] and self.queue[0] is not None:
                yield f"{_label(self.queue[0])} is garbled", Timed.garble
            if left["purges"]:
                yield "the queue is purged", Timed.purge
        if self.joined and left["losses"]:
            yield "subscription lost", Timed.lose
        if self.joined and left["foreign_ticks"]:
            yield "another database ticks", Timed.foreign_tick
        if self.joined and left["deaf"] and self.bound:
            yield "the exchange is declared again, without the queue", Timed.become_deaf
        if left["schema_drops"] and not self.begun and not self.invisible:  # which it would wait for
            yield "the schema is dropped and made again", Timed.drop_schema
        if left["clock_sets"]:
            for ahead in self.span.clocks:
                if ahead != self.wall:
                    yield f"the clock is set to {ahead:+d} s", partial(Timed.set_clock, ahead=ahead)

    def _reader_actions(self) -> Iterator[tuple[str, Act]]:
        idle = False
        for number, reader in enumerate(self.readers):
            name = f"reader {number}" if len(self.readers) > 1 else "it"
            if reader is None:
                if idle:
                    continue  # the same as the first idle one
                idle = True
                for key in self.span.keys:
                    of = f" of {key}" if len(self.span.keys) > 1 else ""
                    yield f"read{of}", partial(Timed.read, number=number, key=key)
                    if self.left["load_failures"] and not self.span.hung_loads:
                        yield f"read{of}, loading fails", partial(Timed.read_in_vain, number=number, key=key)
            elif reader.leads and reader.value is None:
                yield f"{name} loads", partial(Timed.load_reads, number=number)
                if self.left["load_failures"]:
                    yield f"{name} fails to load", partial(Timed.load_fails, number=number)
            elif reader.leads:
                yield f"{name} stores and returns", partial(Timed.load_returns, number=number)

    # Time and the clock

    def wait(self) -> None:
        self.real += 1

    def set_clock(self, ahead: int) -> None:
        self.left["clock_sets"] -= 1
        self.wall = ahead

    def notice_clock(self) -> None:
        self.ahead = self.wall
        eviction = self.coherence.clock_stepped(self.now)
        self._evict(eviction)

    def notice_clock_in_vain(self) -> None:
        self.left["failures"] -= 1
        self.notice_clock()
        self.uncleared = True
        if not self.relaying.forgets_failed_evictions:
            self.coherence.put_off_gap("not cleared")

    # Writers

    def _change(self, key: str) -> None:
        self.replaced_at[key, self.version[key]] = self.real
        self.version[key] += 1

    def _new_row(self) -> int:
        self.next_row += 1
        return self.next_row - 1

    def commit(self, key: str, writer: int) -> None:
        self.left["writes"] -= 1
        self._change(key)
        row = self._new_row()
        self.outbox[row] = key
        evicted = self._evict_own(key, writer)
        self.to_publish.append((writer, row, key, evicted))
        if self.relaying.deletes_before_publishing:
            del self.outbox[row]

    def _evict_own(self, key: str, writer: int) -> bool:
        own = self.span.own and writer == 0
        if own and not self.relaying.echo_without_evicting:
            self._evict(self._rules().Eviction([key]))
            self.floor[key] = self.version[key]
        return own

    def commit_unknown(self, key: str, writer: int) -> None:
        """COMMIT's reply is lost: evicted here and published at once; row and change become visible together, later."""
        self.left["unknown_commits"] -= 1
        self.invisible.append((self._new_row(), key))
        owed = self._rules().owed_after(self._rules().WriteOutcome.UNKNOWN)
        own = self._evict_own(key, writer)
        row = self.invisible[-1][0] if owed.delete_rows else None
        if owed.publish:
            self.to_publish.append((writer, row, key, own and owed.may_skip_echo))

    def become_visible(self) -> None:
        row, key = self.invisible.pop(0)
        self._change(key)
        self.outbox[row] = key

    def begin(self, key: str) -> None:
        self.left["slow_writes"] -= 1
        self.begun.append((self._new_row(), key))

    def commit_begun(self) -> None:
        """By a trigger, say: nobody but the relay publishes it."""
        row, key = self.begun.pop(0)
        self._change(key)
        self.outbox[row] = key

    def commit_unpublished(self, key: str) -> None:
        self.left["unrecorded"] -= 1
        self._change(key)
        self.outbox[self._new_row()] = key

    def publish(self, writer: int) -> None:
        _, row, key, evicted_here = self._take(self.to_publish, writer)
        origin = self.channels[writer]
        self._send(origin, key, evicted_here)
        if row is not None:
            self.to_delete.append((writer, row, origin, self.seqs[origin]))

    def publish_unconfirmed(self, writer: int) -> None:
        _, _, key, evicted_here = self._take(self.to_publish, writer)
        self._send(self.channels[writer], key, evicted_here)
        self.renew(writer)

    def renew(self, writer: int) -> None:
        """The channel is gone; the next one is an origin of its own."""
        self.left["renewals"] -= 1
        if self.span.own and writer == 0:
            self.coherence.forget_echoes(self.channels[writer])
        self.channels[writer] += "'"
        self.seqs[self.channels[writer]] = 0

    @staticmethod
    def _take(owed: list[Any], writer: int) -> Any:
        return owed.pop(next(at for at, one in enumerate(owed) if one[0] == writer))

    def delete(self, writer: int) -> None:
        _, row, origin, seq = self._take(self.to_delete, writer)
        self.outbox.pop(row, None)  # nothing, if its commit is not visible yet
        self.numbers[origin] = max(self.numbers.get(origin, 0), seq)

    def lose_delete(self, writer: int) -> None:
        self.left["lost_deletes"] -= 1
        self._take(self.to_delete, writer)

    def kill(self, writer: int) -> None:
        self.left["kills"] -= 1
        self.to_publish = [one for one in self.to_publish if one[0] != writer]
        self.to_delete = [one for one in self.to_delete if one[0] != writer]

    # Relays

    def look(self, number: int) -> None:
        self.left["looks"] -= 1
        rows = set(list(self.outbox)[: self.span.most_waiting])
        if self.relaying.time_after_look:
            self.relays[number].half_look = rows
        else:
            self._begin(self.relays[number], rows)

    def finish_look(self, number: int) -> None:
        relay = self.relays[number]
        rows, relay.half_look = relay.half_look, None
        assert rows is not None
        self._begin(relay, rows)

    def _begin(self, relay: Relay, rows: set[Any]) -> None:
        rows = {row for row in rows if not self.relaying.by_cursor or row > relay.cursor}
        relay.seen, relay.schema = dict(self.numbers), self.schema
        at = self.real + self.span.database_ahead
        relay.ticks.begin(Look(at, (at, at), SOURCE, rows), self.real - 1)

    def _relayed(self, relay: Relay) -> list[int]:
        spared = {one[1] for one in self.to_publish} if self.span.grace else ()
        return [
            row
            for row in self.outbox
            if row not in spared and (not self.relaying.by_cursor or row > relay.cursor)
        ]

    def relay(self, number: int, row: int) -> None:
        relay = self.relays[number]
        self._send(relay.origin, self.outbox.pop(row), False)
        self.numbers[relay.origin] = self.seqs[relay.origin]
        relay.ticks.confirmed([row])
        relay.cursor = max(relay.cursor, row)

    def relay_unnoted(self, number: int, row: int) -> None:
        """The database is lost before the DELETE: another session begins, and with it another look."""
        self.left["lost_deletes"] -= 1
        relay = self.relays[number]
        self._send(relay.origin, self.outbox[row], False)
        relay.ticks = sys.modules[self.deciding].Ticks(0)  # type: ignore[attr-defined]

    def _may_tick(self, relay: Relay) -> bool:
        return self._told(copied(relay)) is not None

    def _told(self, relay: Relay) -> Any:
        wanted = relay.ticks.wanted
        if wanted is None:
            return None
        schema = relay.schema if self.relaying.schema_of_look else self.schema
        relay.ticks.left(wanted & set(self.outbox), Confirmed(str(schema), dict(self.numbers)))
        return relay.ticks.take()

    def tick(self, number: int, at_once: bool = True) -> None:
        relay = self.relays[number]
        told = self._told(relay)
        if told is None:
            return
        look, (schema, numbers) = told
        if self.relaying.numbers_of_look:
            numbers = relay.seen
        seqs = {origin: seq for origin, seq in numbers.items() if origin != relay.origin}
        relay.in_hand.append((look.as_of, schema, tuple(seqs.items())))
        if at_once:
            self.send_tick(number)

    def send_tick(self, number: int) -> None:
        relay = self.relays[number]
        as_of, schema, seqs = relay.in_hand.pop()
        self._route(
            Tick(
                v=1,
                origin=relay.origin,
                seq=self.seqs[relay.origin],
                as_of=as_of,
                source=SOURCE,
                schema=schema,
                seqs=dict(seqs),
            )
        )

    def drop_schema(self) -> None:
        """What waits in it reaches nobody."""
        self.left["schema_drops"] -= 1
        self.outbox.clear()
        self.numbers.clear()
        self.schema += 1

    # The broker

    def _send(self, origin: str, key: str, evicted_here: bool) -> None:
        self.seqs[origin] += 1
        if evicted_here:
            self.coherence.expect_echo(origin, self.seqs[origin])
        names = {"tags": [TAG]} if self.span.by_tag else {"keys": [key]}
        # The two times carry what the world's own checks need to know: which version this was, and of which key.
        which = float(self.span.keys.index(key))
        # What was evicted here already says nothing of a version that became visible since.
        version = 0.0 if evicted_here else float(self.version[key])
        self._route(
            Invalidate(v=1, origin=origin, seq=self.seqs[origin], at=version, committed_at=which, **names)
        )

    def _route(self, message: Any) -> None:
        if self.bound:
            self.queue.append(message)
        elif isinstance(message, Invalidate) and (self.joined or self.span.durable):  # deaf, or will be
            self.missing.append((message.origin or "", message.seq or 0))

    def foreign_tick(self) -> None:
        self.left["foreign_ticks"] -= 1
        self._route(Tick(v=1, origin="x", seq=0, as_of=self.real, source="another"))

    def garble(self) -> None:
        self.left["malformed"] -= 1
        if isinstance(self.queue[0], Probe):
            self.marker_owed = True
        self.queue[0] = None

    def publish_marker(self) -> None:
        self.marker_owed = False
        self._route(Probe(v=1, id=str(self.marker)))

    def drop(self) -> None:
        self.left["drops"] -= 1
        self._drop_first()

    def purge(self) -> None:
        """By an operator; what was delivered already is not in the queue any more."""
        self.left["purges"] -= 1
        while self.queue:
            self._drop_first()
        if self.coherence.marker is not None:
            self.marker_owed = True  # the watch publishes it again

    def _drop_first(self) -> None:
        message = self.queue.pop(0)
        self.behind = max(0, self.behind - 1)
        if isinstance(message, Invalidate):
            self.missing.append((message.origin or "", message.seq or 0))
        elif isinstance(message, Probe):
            self.marker_owed = True
        elif message is None:
            self.missing.append(("", 0))  # what it was before it was garbled

    def become_deaf(self) -> None:
        self.left["deaf"] -= 1
        self.bound = False

    # The subscription

    def join(self) -> None:
        self.joined = self.bound = True
        self.heard_at = self.real
        if self.span.durable and self.coherence.epoch > 1:
            self.marker += 1
            eviction = self.coherence.resumed(str(self.marker), self.now, self.kept)
            if eviction is not None:
                self._evict(eviction)
            self.behind = len(self.queue)
            self.marker_owed = True
            return
        self._evict(self.coherence.joined_anew(self.now))
        self.uncleared = False
        self.kept = self.coherence.proof_state() if self.span.durable else None
        self.coherence.trust()

    def lose(self) -> None:
        self.left["losses"] -= 1
        self._lost("cut")

    def give_up_silent(self) -> None:
        self._lost("silence")

    def _lost(self, reason: str) -> None:
        self.coherence.lost(reason)
        self._cancel_evicting()
        self.joined = self.marker_owed = False
        self.queue[:0] = self.taken  # not acknowledged: they come again
        self.taken.clear()
        if not self.span.durable:
            self.bound = False
            self.queue.clear()
        elif not self.bound:
            self.joined = False

    # Receiving

    def deliver(self) -> None:
        self._receive([self.queue.pop(0)])

    def deliver_all(self) -> None:
        batch = self.queue[:]
        self.queue.clear()
        self._receive(batch)

    def _receive(self, batch: list[Any]) -> None:
        self.heard_at = self.real
        evictions = []
        for message in batch:
            if message is None:
                eviction = self.coherence.gap("malformed message", self.now)
            else:
                eviction = self.coherence.received(message, self.now)
            if eviction is not None:
                evictions.append(eviction)
        self.taken = batch
        merged = self._rules().Eviction.merged(evictions)
        if merged:
            self._evict(merged)
        self.evicting = merged
        if not self.span.batches or not merged:
            self.finish_evicting()

    def finish_evicting(self) -> None:
        for message in self.taken:
            if isinstance(message, Invalidate):
                key = self.span.keys[int(message.committed_at or 0)]
                self.floor[key] = max(self.floor[key], int(message.at or 0))
        if self.failing:
            self.failing = False
            self.coherence.settle("eviction")
        if self.evicting.everything:
            self.uncleared = False
        self.behind = max(0, self.behind - len(self.taken))
        self.evicting = None
        self.taken = []
        self.coherence.evicted(self.now)
        self.kept = self.coherence.proof_state() if self.span.durable else None

    def fail_evicting(self) -> None:
        self.left["failures"] -= 1
        self.failing = True
        self.uncleared = self.uncleared or self.evicting.everything
        self.coherence.doubt("eviction", "eviction failed")

    def give_up_evicting(self) -> None:
        """The subscription starts over."""
        self._lost("eviction failed")

    def _cancel_evicting(self) -> None:
        if self.failing:
            self.failing = False
            self.coherence.settle("eviction")
        evicting, self.evicting = self.evicting, None
        if evicting is not None and evicting.everything and not self.relaying.forgets_failed_evictions:
            self.coherence.put_off_gap(evicting.reason)

    def begin_epoch_put_off(self) -> None:
        eviction = self.coherence.take_due_gap(self.now)
        assert eviction is not None
        self._evict(eviction)
        self.clearing = True
        if not self.span.batches:
            self.end_epoch_put_off()

    def end_epoch_put_off(self) -> None:
        self.clearing = self.uncleared = False
        self.coherence.gap_done()

    def fail_epoch_put_off(self) -> None:
        self.left["failures"] -= 1
        self.clearing, self.uncleared = False, True
        self.coherence.put_off_gap("not cleared")

    def _evict(self, eviction: Any) -> None:
        """What an eviction under way names is not served either, so the entries may go at once."""
        self.coherence.evict(eviction, self.now)
        if eviction.everything:
            if not self.span.if_error:
                self.entries.clear()
            self.missing.clear()
            self.floor = dict(self.version)
        for key in eviction.keys:
            if self.span.if_error and key in self.entries:
                self.coherence.serving.expire(self.entries[key])
            else:
                self.entries.pop(key, None)
        if eviction.tags and self.span.durable:
            self.entries.clear()  # in a cache outside the process tags have stamps of their own

    # Reading

    def read_in_vain(self, number: int, key: str) -> None:
        self.read(number, key, fails=True)

    def read(self, number: int, key: str, fails: bool = False) -> None:
        least, tags = self.floor[key], frozenset({TAG} if self.span.tagged else ())
        entry = self._found(key)
        if entry is not None and self.coherence.serving.may_serve(entry, self.now):
            if self.span.staleness is None and self.coherence.suspect and self.now - entry.load_started > 1:
                raise BrokenError(f"a suspect instance serves what was loaded at {entry.load_started}")
            self._returned(key, entry.value, self.real, least, "hit")
            return
        if entry is not None and self.coherence.serving.may_serve(entry, self.now, self.span.overtime):
            self._returned(key, entry.value, self.real, least, "hit past its ttl")
            if self.coherence.loads.joinable(key, self.now, tags) is not None:
                return
        load = self.coherence.loads.joinable(key, self.now, tags)
        if load is not None:
            self.readers[number] = Reader(key, self.real, least, load, leads=False)
            return
        load = self.coherence.loads.begin(key, self.now, tags)
        self.readers[number] = Reader(key, self.real, least, load, leads=True)
        if fails:
            self.load_fails(number)
        elif not self.span.hung_loads:
            self.load_reads(number)
            self.load_returns(number)

    def _found(self, key: str) -> Any:
        entry = self.entries.get(key)
        if entry is None or not self.span.durable:
            return entry
        # As `SharedCache` finds it: with the epoch of this moment, and a load that began in no future.
        return self._rules().Entry(
            entry.value,
            min(entry.load_started, self.now),
            *self.coherence.serving.moment[:2],
            FOREVER,
            entry.tags,
        )

    def load_reads(self, number: int) -> None:
        reader = self.readers[number]
        assert reader is not None
        reader.value = self.version[reader.key]

    def load_returns(self, number: int) -> None:
        leader = self.readers[number]
        assert leader is not None
        asked = self.coherence.loads.may_store
        if asked(leader.load):
            expires_at = self.now + self.span.ttl if self.span.ttl else FOREVER
            self.entries[leader.key] = leader.load.entry(leader.value, expires_at)
        self.coherence.loads.end(leader.load)
        for at, reader in enumerate(self.readers):
            if reader is not None and reader.load is leader.load:
                self.readers[at] = None
                self._returned(reader.key, leader.value, reader.began, reader.least, "load")

    def load_fails(self, number: int) -> None:
        self.left["load_failures"] -= 1
        leader = self.readers[number]
        assert leader is not None
        self.coherence.loads.end(leader.load)
        for at, reader in enumerate(self.readers):
            if reader is not None and reader.load is leader.load:
                self.readers[at] = None
        entry = self.entries.get(leader.key)
        if entry is None or not self.coherence.serving.may_serve_instead(entry, self.now, self.span.if_error):
            return
        self._given_instead(leader.key, entry.value, leader.least)
        if self.relaying.stores_what_is_given_instead:
            self.entries[leader.key] = leader.load.entry(entry.value, FOREVER)

    # What must hold

    def _given_instead(self, key: str, version: int, least: int) -> None:
        replaced, limit = self.replaced_at.get((key, version)), self.span.if_error
        if version >= least and self.span.staleness is None:
            return  # not known to be evicted, and nothing is promised of such a value
        if version >= least:
            limit = max(limit, self.span.staleness or 0)
        if replaced is not None and self.real - replaced > limit:
            raise BrokenError(f"at {self.real} an error gave what was replaced at {replaced}")

    def _returned(self, key: str, version: int | None, began: int, least: int, how: str) -> None:
        assert version is not None
        if version < least:
            raise BrokenError(
                f"a read of {key} begun after version {least} was evicted gave {version} by a {how}"
            )
        replaced = self.replaced_at.get((key, version))
        limit = self.span.staleness
        if limit is not None and replaced is not None and began - replaced > limit:
            raise BrokenError(f"a {how} of a read that began at {began} gave what was replaced at {replaced}")

    def arrive(self) -> None:
        if not self.span.durable:
            for entry in self.entries.values():
                rely_on(self.coherence, entry, self.now)

    def check(self) -> None:
        c, now, span = self.coherence, self.now, self.span
        if c.proof.watermark > now + span.skew:
            raise BrokenError(f"at {now} the watermark is {c.proof.watermark}")
        if c.gap_due_at is not None:
            if c.gap_due_at > now + 1:
                raise BrokenError(f"at {now} a gap is put off until {c.gap_due_at}")
            if c.suspect is None:
                raise BrokenError("a gap is put off, and the instance is trusted")
        if c.suspect is None and self.uncleared:
            raise BrokenError("the instance is trusted, and did not clear what it had to")
        if c.suspect is None and not self.joined:
            raise BrokenError("the instance is trusted, and is not subscribed")
        if c.suspect is None and self.behind:
            raise BrokenError("the instance is trusted, and behind with the queue that it resumed")
        if (
            span.silence
            and self.joined
            and self.real - self.heard_at > span.silence
            and not c.silent(now, span.silence)
        ):
            raise BrokenError(f"nothing has arrived since {self.heard_at}, and at {now} that is no silence")
        if self._settled():
            for key in self.entries:
                entry = self._found(key)
                if c.serving.may_serve(entry, now) and entry.value != self.version[key]:
                    raise BrokenError(
                        f"all is settled, and {key} is served as {entry.value}, not {self.version[key]}"
                    )

    def _settled(self) -> bool:
        return not (
            self.queue or self.taken or self.to_publish or self.outbox or self.invisible or self.missing
        ) and (self.joined and self.coherence.suspect is None and self._knows_the_schema())

    def _knows_the_schema(self) -> bool:
        """Until a tick tells, nobody knows that it was made again; Δ has to do till then."""
        return not self.schema or bool(self.coherence.proof.schema == str(self.schema))

    # Comparing

    def _rules(self) -> Any:
        return sys.modules[self.rules]

    def key(self) -> Hashable:
        c, span, real, version = self.coherence, self.span, self.real, self.version
        held = {(key, e.value) for key, e in self.entries.items()}
        held |= {(r.key, r.value) for r in self.readers if r is not None and r.value is not None}
        return (
            real, self.ahead, self.wall, tuple(self.left.values()), tuple(version.values()), tuple(self.floor.values()),
            tuple(sorted((one, self.replaced_at[one]) for one in held if one in self.replaced_at)),
            self.next_row, tuple(self.outbox.items()), tuple(self.begun), tuple(self.invisible),
            tuple(self.to_publish), tuple(self.to_delete), tuple(sorted(self.numbers.items())),
            tuple(self.seqs.items()), tuple(self.channels),
            tuple(map(_message_key, self.queue)), tuple(map(_message_key, self.taken)),
            None if self.evicting is None else self.evicting.everything, self.failing, self.clearing, self.uncleared,
            tuple(self.missing), self.behind, self.marker, self.marker_owed, self.bound, self.joined,
            self.heard_at if span.silence else 0,
            tuple((key, e.value, e.load_started, c.epoch - abs(e.epoch), e.epoch < 0, e.expires_at, c._epochs.generation - e.generation)
                  for key, e in sorted(self.entries.items())),
            self._reading(),
            tuple((r.cursor, None if r.half_look is None else tuple(r.half_look), tuple(r.in_hand),
                   None if r.ticks._look is None else (r.ticks._look.as_of, tuple(sorted(r.ticks.waiting)), tuple(r.seen.items())))
                  for r in self.relays),
            tuple(sorted((tag, c._epochs.generation - at) for tag, at in c._epochs._tag_evicted.items())),
            c.epoch - c.serving._ages_since if span.if_error and span.clocks else None,
            tuple(c._trust.doubts), tuple(c._numbers.seqs.items()), tuple(sorted(c._echoes)), c._gap_due is None,
            c._last_gap if span.clocks or self.now - c._last_gap < 1 else None,
            c._marker, c._marker_passed, _message_key(c._tick_passed) if c._tick_passed else None, c._subscribed, c._heard_at if span.silence else 0,
            c.proof.watermark, c.proof.until, c.proof.extends, c.proof.source, c.proof.checked_until,
            self.schema, c.proof.schema, tuple(r.schema for r in self.relays) if span.schema_drops else None,
            self.kept and (tuple(self.kept.seqs.items()), self.kept.checked_until, self.kept.extends, self.kept.schema),
        )  # fmt: skip

    def _reading(self) -> Hashable:
        """The reads under way; which reader is which does not matter."""
        c = self.coherence
        loads: dict[int, tuple[Any, list[tuple[Any, ...]]]] = {}
        for reader in self.readers:
            if reader is not None:
                of = loads.setdefault(id(reader.load), (reader.load, []))
                of[1].append((reader.key, reader.began, reader.least, reader.leads, reader.value or 0))
        return tuple(
            sorted(
                (load.started, load.voided, c.epoch - load.epoch, c._epochs.generation - load.generation,
                 c.loads._loads.get(load.key) is load, tuple(sorted(readers)))
                for load, readers in loads.values()
            )
        )  # fmt: skip


def _label(message: Any) -> str:
    if message is None:
        return "a malformed message"
    if isinstance(message, Tick):
        return f"a tick as of {message.as_of:g}" if message.source == SOURCE else "another database's tick"
    return "the marker" if isinstance(message, Probe) else f"{message.origin} {message.seq}"


def _message_key(message: Any) -> Hashable:
    if isinstance(message, Tick):
        return message.origin, message.seq, message.as_of, message.schema, tuple(message.seqs.items())
    if isinstance(message, Probe):
        return message.id
    return None if message is None else (message.origin, message.seq, message.at, message.committed_at)


def timed(rules: Any, deciding: Any, span: Span, relaying: Relaying | None = None) -> Timed:
    """The world at its start."""
    coherence = rules.Coherence(
        max_staleness=span.staleness, max_clock_skew=span.skew, gap_interval=0 if span.durable else None
    )
    if span.foreign_ticks:
        coherence.proof.trust_only(SOURCE)
    relays = [Relay(f"r{number}", deciding.Ticks(0)) for number in range(span.relays)]
    channels = [f"w{number}" for number in range(span.writers)]
    world = Timed(
        rules.__name__, deciding.__name__, span, relaying or Relaying(), coherence, relays, channels,
        left={name: getattr(span, name) for name in BUDGETS}, version=dict.fromkeys(span.keys, 1),
        floor=dict.fromkeys(span.keys, 0), seqs=dict.fromkeys([*channels, *(relay.origin for relay in relays)], 0),
        wall=span.ahead, ahead=span.ahead, readers=[None] * span.readers,
    )  # fmt: skip
    world.join()
    if span.baselined:
        world._begin(relays[0], set())
        world.tick(0)
        world.deliver()
        world.wait()
    return world
