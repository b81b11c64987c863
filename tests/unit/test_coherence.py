"""The rules of coherence, without I/O: a machine that tries to make a cache stale, and each rule by itself."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cacheinval.coherence import (
    GAP_INTERVAL,
    NO_TAGS,
    Coherence,
    Entry,
    Eviction,
    Load,
    WriteOutcome,
    epochs,
    numbers,
    outcome_of_error,
    owed_after,
)
from cacheinval.coherence.loads import JOIN_AGE
from cacheinval.coherence.proof import NUMBERS_TOLD_FOR
from cacheinval.messages import Beat, Invalidate, Message, Probe, Tick, Unknown

COMMITTED, ABORTED, UNKNOWN = WriteOutcome.COMMITTED, WriteOutcome.ABORTED, WriteOutcome.UNKNOWN

# Which tag each key carries. Changes of keys with a tag are announced by the tag alone. The sum of p and q names no tag
# of its own: it has to go because of what it was built from.
TAGS = {"a": None, "b": None, "p": "tp", "q": "tq", "r": "tq", "sum": None}
BASE = ["a", "b", "p", "q", "r"]


@dataclass(eq=False)
class Loading:
    """One load as the machine sees it: when it began, and what it has read so far."""

    token: Load
    began: int
    value: Any = None
    parts: dict[str, int] = field(default_factory=dict)
    part_of: "Loading | None" = None


class World(RuleBasedStateMachine):
    """One instance, its cache and its queue, a database, other writers, and everything that can go wrong between them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.step = 0
        self.database = dict.fromkeys(BASE, 0)
        self.cache: dict[str, tuple[Entry, int]] = {}
        self.loads: list[Loading] = []
        self.evicted: dict[
            str, int
        ] = {}  # the last step at which something had to be evicted, by name of key or tag
        self.queue: dict[
            str, list[Message | Unknown]
        ] = {}  # what waits here, by origin: only these keep their order
        self.seen: list[Message | Unknown] = []
        self.seqs: dict[str, int] = {}
        self.known: set[str] = set()  # origins whose numbers this subscription has seen
        self.consuming = self.bound = False
        self.own = 0  # the number of the present publishing channel
        self.skippable: set[tuple[str | None, int | None]] = set()
        self.uncertain: list[str] = []  # commits whose reply was lost and that may yet become visible

    @initialize(
        durable=st.booleans(),
        max_staleness=st.sampled_from([None, 3.0]),
        most_tags=st.sampled_from([1, 2, 100_000]),
        joined=st.sampled_from([True, True, False]),
    )
    def begin(self, durable: bool, max_staleness: float | None, most_tags: int, joined: bool) -> None:
        self.durable, self.max_staleness = durable, max_staleness
        self.saved = epochs.MAX_EVICTED_TAGS
        epochs.MAX_EVICTED_TAGS = most_tags
        self.coherence = Coherence(max_staleness)
        if joined:
            self.join(False)

    def teardown(self) -> None:
        if not hasattr(self, "coherence"):
            return
        try:
            self.everything_comes_to_rest()
        finally:
            epochs.MAX_EVICTED_TAGS = self.saved

    # What the machine does for the rules: it is the cache, the bus and the clock

    def tick(self) -> int:
        self.step += 1
        return self.step

    def apply(self, eviction: Eviction) -> None:
        self.coherence.evict(eviction, self.now)
        if eviction.everything:
            self.cache.clear()
        for key in eviction.keys:
            self.cache.pop(key, None)

    def must_go(self, message: Invalidate) -> None:
        step = self.tick()
        for name in [*message.keys, *message.tags] if not message.all else [*TAGS, "tp", "tq"]:
            self.evicted[name] = step

    def last_eviction(self, key: str, tags: frozenset[str] = NO_TAGS) -> int:
        names = {key, *tags} | ({TAGS[key]} - {None})
        return max(self.evicted.get(name, 0) for name in names)

    def publish(self, origin: str, **names: Any) -> Invalidate:
        seq = self.seqs[origin] = self.seqs.get(origin, 0) + 1
        message = Invalidate(v=1, origin=origin, seq=seq, **names)
        if self.bound:
            self.queue.setdefault(origin, []).append(message)
        return message

    def names_of(self, key: str) -> dict[str, list[str]]:
        tag = TAGS[key]
        return {"tags": [tag]} if tag else {"keys": [key]}

    def receive(self, message: Message | Unknown) -> None:
        if isinstance(message, Invalidate):
            own = (message.origin, message.seq)
            if own in self.skippable:
                self.skippable.discard(own)
            else:
                self.must_go(message)
            if message.origin:
                self.known.add(message.origin)
        eviction = self.coherence.received(message, self.now)
        if eviction is not None:
            self.apply(eviction)
        self.coherence.evicted(0.0)

    def check_served(self, key: str, entry: Entry, began: int) -> None:
        assert began > self.last_eviction(key, entry.tags), "served what an eviction should have removed"
        age = self.now - entry.load_started
        if self.max_staleness is not None:
            assert age <= self.max_staleness
        elif self.coherence.suspect:
            assert age <= 1.0
        assert self.now < entry.expires_at

    # Reading

    @rule(key=st.sampled_from(BASE), tags=st.booleans())
    def read(self, key: str, tags: bool) -> None:
        if key in self.cache:
            entry, began = self.cache[key]
            if self.coherence.serving.may_serve(entry, self.now):
                self.check_served(key, entry, began)
                return
        tag = TAGS[key]
        named = frozenset([tag]) if tag else NO_TAGS
        joined = self.coherence.loads.joinable(key, self.now, named)
        if joined is not None:
            (loading,) = (loading for loading in self.loads if loading.token is joined)
            assert loading.began > self.last_eviction(key, joined.tags), (
                "joined a load older than an eviction"
            )
            limit = self.max_staleness if self.max_staleness is not None else 1.0
            if self.max_staleness is not None or self.coherence.suspect:
                assert self.now - joined.started <= limit
            return
        self.start(key, named)

    def start(self, key: str, tags: frozenset[str], part_of: Loading | None = None) -> Loading:
        token = self.coherence.loads.begin(key, self.now, tags, part_of.token if part_of else None)
        loading = Loading(token, self.tick(), part_of=part_of)
        self.loads.append(loading)
        return loading

    @rule()
    def fill(self) -> None:
        """Every key is read, and loaded at once where that is needed."""
        for key in BASE:
            cached = key in self.cache and self.coherence.serving.may_serve(self.cache[key][0], self.now)
            if not cached and self.coherence.loads.joinable(key, self.now) is None:
                tag = TAGS[key]
                self.finish(self.start(key, frozenset([tag]) if tag else NO_TAGS), False, 1000.0)

    @rule(parts=st.sampled_from([[], ["p", "q"], ["q", "p"]]), ends=st.booleans())
    def load_sum(self, parts: list[str], ends: bool) -> None:
        if self.coherence.loads.joinable("sum", self.now) is None:
            whole = self.start("sum", NO_TAGS)
            for part in parts:
                self.take_part(whole, part)
                for loading in [one for one in self.loads if one.part_of is whole]:
                    self.finish(loading, False, 1000.0)
            if parts and ends:
                self.finish(whole, False, 1000.0)

    @precondition(lambda self: any(one.token.key == "sum" for one in self.loads))
    @rule(data=st.data(), part=st.sampled_from(["p", "q"]))
    def go_on_with_sum(self, data: st.DataObject, part: str) -> None:
        self.take_part(
            data.draw(st.sampled_from([one for one in self.loads if one.token.key == "sum"])), part
        )

    def take_part(self, whole: Loading, part: str) -> None:
        if part in self.cache and self.coherence.serving.may_serve(self.cache[part][0], self.now):
            entry = self.cache[part][0]
            self.coherence.loads.inherit(whole.token, entry)
            whole.parts[part] = entry.value
            assert whole.token.started <= entry.load_started
        elif not any(one.part_of is whole and one.token.key == part for one in self.loads):
            self.start(part, frozenset([TAGS[part] or ""]), whole)

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def look_into_the_database(self, data: st.DataObject) -> None:
        loading = data.draw(st.sampled_from(self.loads))
        if loading.token.key != "sum":
            loading.value = self.database[loading.token.key]

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), fails=st.booleans(), ttl=st.sampled_from([0.5, 1000.0]))
    def end(self, data: st.DataObject, fails: bool, ttl: float) -> None:
        self.finish(data.draw(st.sampled_from(self.loads)), fails, ttl)

    def finish(self, loading: Loading, fails: bool, ttl: float) -> None:
        for part in [one for one in self.loads if one.part_of is loading]:
            self.finish(part, fails, ttl)
        token = loading.token
        if token.key == "sum":
            fails |= len(loading.parts) < 2
            loading.value = (loading.parts.get("p"), loading.parts.get("q"))
        elif loading.value is None:
            loading.value = self.database[token.key]
        if not fails and self.coherence.loads.may_store(token):
            assert loading.began > self.last_eviction(token.key, token.tags), (
                "stored what was evicted meanwhile"
            )
            entry = token.entry(loading.value, self.now + ttl)
            self.cache[token.key] = (entry, loading.began)
        if loading.part_of is not None and not fails:
            self.coherence.loads.inherit(loading.part_of.token, token)
            loading.part_of.parts[token.key] = loading.value
        self.coherence.loads.end(token)
        self.loads.remove(loading)

    # Writing

    @rule(key=st.sampled_from(BASE), origin=st.sampled_from(["o1", "o2"]))
    def another_writes(self, key: str, origin: str) -> None:
        self.database[key] += 1
        self.publish(origin, **self.names_of(key))

    @rule(origin=st.sampled_from(["o1", "o2"]))
    def another_changes_everything(self, origin: str) -> None:
        for key in BASE:
            self.database[key] += 1
        self.publish(origin, all=True)

    @rule(key=st.sampled_from(BASE))
    def a_program_without_numbers_writes(self, key: str) -> None:
        self.database[key] += 1
        if self.bound:
            self.queue.setdefault("", []).append(Invalidate(v=1, **self.names_of(key)))

    @rule(key=st.sampled_from(BASE), outcome=st.sampled_from(WriteOutcome))
    def write(self, key: str, outcome: WriteOutcome) -> None:
        if outcome is COMMITTED:
            self.database[key] += 1
        elif outcome is UNKNOWN:
            self.uncertain.append(key)
        owed = owed_after(outcome)
        names = self.names_of(key)
        if not owed.publish:
            return
        self.must_go(Invalidate(v=1, **names))
        self.apply(Eviction(names.get("keys", []), names.get("tags", [])))
        origin = f"own{self.own}"
        if owed.may_skip_echo:
            self.coherence.expect_echo(origin, self.seqs.get(origin, 0) + 1)
        message = self.publish(origin, **names)
        if owed.may_skip_echo and self.bound:
            self.skippable.add((message.origin, message.seq))
        if outcome is UNKNOWN and owed.delete_rows:
            self.uncertain[-1] += " without row"

    @precondition(lambda self: self.uncertain)
    @rule(committed=st.booleans())
    def an_uncertain_commit_is_decided(self, committed: bool) -> None:
        key, _, without_row = self.uncertain.pop(0).partition(" ")
        if committed:
            self.database[key] += 1
            if not without_row:
                self.publish("relay", **self.names_of(key))

    @rule()
    def the_publishing_channel_is_replaced(self) -> None:
        self.coherence.forget_echoes(f"own{self.own}")
        self.skippable.clear()
        self.own += 1

    # Delivering

    @precondition(lambda self: self.consuming and any(self.queue.values()))
    @rule(data=st.data(), count=st.integers(1, 4))
    def deliver(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            origins = sorted(origin for origin, waiting in self.queue.items() if waiting)
            if origins:
                message = self.queue[data.draw(st.sampled_from(origins))].pop(0)
                self.seen.append(message)
                self.receive(message)

    def deliver_all(self) -> None:
        for waiting in self.queue.values():
            while waiting:
                self.receive(waiting.pop(0))

    @precondition(lambda self: self.consuming and self.seen)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        self.receive(data.draw(st.sampled_from(self.seen[-5:])))

    @precondition(lambda self: self.consuming and self.known)
    @rule(data=st.data(), key=st.sampled_from(BASE), last=st.booleans())
    def a_message_is_lost(self, data: st.DataObject, key: str, last: bool) -> None:
        """What a purged queue or a full one does. A later message of the origin betrays it, if an earlier one came."""
        origin = data.draw(st.sampled_from(sorted(self.known)))
        self.database[key] += 1
        self.publish(origin, **self.names_of(key))
        self.queue[origin].pop(-1 if last else 0)

    @precondition(lambda self: self.consuming)
    @rule()
    def an_unreadable_message_arrives(self) -> None:
        eviction = self.coherence.gap("malformed message", self.now)
        if eviction is not None:
            self.apply(eviction)
        else:
            assert self.coherence.suspect

    @precondition(lambda self: self.consuming)
    @rule()
    def lose_the_subscription(self) -> None:
        self.consuming = False
        self.coherence.lost("cut")
        if not self.durable:
            self.bound = False
            self.queue.clear()
        assert self.coherence.suspect

    @precondition(lambda self: not self.consuming)
    @rule(lost_meanwhile=st.booleans())
    def join(self, lost_meanwhile: bool) -> None:
        self.consuming = True
        if self.durable and self.bound:
            assert self.coherence.resumed("marker", 0.0, self.coherence.proof_state()) is None
            self.queue.setdefault("probes", []).append(Probe(v=1, id="stranger"))
            for origin in list(self.queue):
                while self.queue[origin]:
                    self.receive(self.queue[origin].pop(0))
                    assert self.coherence.suspect
            self.receive(Probe(v=1, id="marker"))
            return
        self.bound = True
        self.known.clear()
        self.seen.clear()
        self.skippable.clear()
        eviction = self.coherence.joined_anew(0.0)
        assert eviction.everything
        if lost_meanwhile:
            self.apply(eviction)
            self.consuming = self.bound = False
            self.coherence.lost("cut again")
            self.coherence.trust()
            assert self.coherence.suspect, "trusted a subscription that was lost meanwhile"
            return
        self.apply(eviction)
        self.coherence.trust()

    @rule(seconds=st.sampled_from([0.1, 0.6, 1.1, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        eviction = self.coherence.take_due_gap(self.now)
        if eviction is not None:
            self.apply(eviction)
            self.coherence.gap_done()

    # What always holds

    @invariant()
    def suspect_unless_subscribed(self) -> None:
        if hasattr(self, "coherence") and not self.consuming:
            assert self.coherence.suspect

    @invariant()
    def nothing_too_old_is_servable(self) -> None:
        for key, (entry, began) in self.cache.items():
            if self.coherence.serving.may_serve(entry, self.now):
                self.check_served(key, entry, began)

    def everything_comes_to_rest(self) -> None:
        """All is sent, received and evicted, and no load is in flight: whatever would be served is true."""
        if not self.consuming:
            self.join(False)
        self.deliver_all()
        self.fill()
        while self.uncertain:
            self.an_uncertain_commit_is_decided(True)
        for origin in self.known & self.seqs.keys():
            self.publish(origin, keys=["betrays what was lost before it"])
        self.deliver_all()
        self.time_passes(GAP_INTERVAL)
        while self.loads:
            self.finish(self.loads[0], False, 1000.0)
        assert self.coherence.suspect is None
        assert not self.coherence.loads._loads
        for key, (entry, _) in self.cache.items():
            if self.coherence.serving.may_serve(entry, self.now):
                truth = (self.database["p"], self.database["q"]) if key == "sum" else self.database[key]
                assert entry.value == truth, f"{key} is stale for ever"


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)


# Each rule by itself


def ready(max_staleness: float | None = None) -> Coherence:
    coherence = Coherence(max_staleness)
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    return coherence


def stored(coherence: Coherence, key: str = "k", now: float = 100.0, tags: frozenset[str] = NO_TAGS) -> Entry:
    load = coherence.loads.begin(key, now, tags)
    assert coherence.loads.may_store(load)
    coherence.loads.end(load)
    return load.entry("value", math.inf)


EVICTIONS = {
    "its key": Eviction(["other", "k"]),
    "its tag": Eviction(tags=["other", "t"]),
    "everything": Eviction(everything=True),
}


@pytest.mark.parametrize("what", EVICTIONS)
def test_an_eviction_voids_the_token(what: str) -> None:
    coherence = ready()
    load = coherence.loads.begin("k", 100.0, frozenset(["t"]))
    assert coherence.loads.joinable("k", 100.0, frozenset(["t"])) is load
    coherence.evict(EVICTIONS[what], 100.0)
    assert not coherence.loads.may_store(load)
    assert coherence.loads.joinable("k", 100.0, frozenset(["t"])) is None


@pytest.mark.parametrize("eviction", [Eviction(["other"]), Eviction(tags=["other"]), Eviction()])
def test_an_eviction_of_something_else_voids_nothing(eviction: Eviction) -> None:
    coherence = ready()
    load = coherence.loads.begin("k", 100.0, frozenset(["t"]))
    entry = stored(coherence, "l", tags=frozenset(["t"]))
    coherence.evict(eviction, 100.0)
    assert coherence.loads.may_store(load)
    assert coherence.serving.may_serve(entry, 100.0)


@pytest.mark.parametrize("what", EVICTIONS)
def test_a_voided_token_is_never_revived(what: str) -> None:
    coherence = ready()
    old = coherence.loads.begin("k", 100.0, frozenset(["t"]))
    coherence.evict(EVICTIONS[what], 100.0)
    new = coherence.loads.begin("k", 100.0, frozenset(["t"]))
    coherence.loads.end(old)
    assert coherence.loads.may_store(new)
    assert coherence.loads.joinable("k", 100.0) is new, "the end of the old load took the new one's place"
    assert not coherence.loads.may_store(old)


def test_of_two_loads_of_one_key_only_the_younger_stores() -> None:
    coherence = ready(max_staleness=3)
    old = coherence.loads.begin("k", 100.0)
    assert coherence.loads.joinable("k", 103.1) is None
    new = coherence.loads.begin("k", 103.1)
    assert not coherence.loads.may_store(old)
    assert coherence.loads.may_store(new)


def test_a_reader_of_an_evicted_tag_does_not_join_a_load_that_did_not_name_it() -> None:
    coherence = ready()
    load = coherence.loads.begin("k", 100.0)
    coherence.evict(Eviction(tags=["t"]), 100.0)
    assert coherence.loads.joinable("k", 100.0, frozenset(["t"])) is None
    assert coherence.loads.joinable("k", 100.0) is load


def test_a_load_goes_with_the_tags_of_whoever_joins_it() -> None:
    coherence = ready()
    load = coherence.loads.begin("k", 100.0, frozenset(["t"]))
    assert coherence.loads.joinable("k", 100.0, frozenset(["u"])) is load
    assert load.tags == {"t", "u"}
    coherence.evict(Eviction(tags=["u"]), 100.0)
    assert not coherence.loads.may_store(load)


def test_tags_learned_while_loading_void_as_well() -> None:
    coherence = ready()
    load = coherence.loads.begin("k", 100.0)
    coherence.evict(Eviction(tags=["t"]), 100.0)
    assert coherence.loads.may_store(load)
    coherence.loads.inherit(load, stored(coherence, "part", tags=frozenset(["t"])))
    assert not coherence.loads.may_store(load)


def test_a_value_is_as_old_as_its_oldest_part_and_goes_with_its_tags() -> None:
    coherence = ready()
    part = stored(coherence, "part", now=90.0, tags=frozenset(["t"]))
    whole = coherence.loads.begin("whole", 100.0, frozenset(["w"]))
    coherence.loads.inherit(whole, part)
    coherence.loads.inherit(whole, coherence.loads.begin("young", 101.0, frozenset(["y"])))
    assert (whole.started, whole.tags) == (90.0, {"w", "t", "y"})
    entry = whole.entry("value", math.inf)
    assert entry.load_started == 90.0
    coherence.evict(Eviction(tags=["t"]), 100.0)
    assert not coherence.serving.may_serve(entry, 101.0)


def test_a_voided_part_voids_the_whole() -> None:
    coherence = ready()
    whole = coherence.loads.begin("whole", 100.0)
    part = coherence.loads.begin("part", 100.0, parent=whole)
    coherence.evict(Eviction(["part"]), 100.0)
    coherence.loads.inherit(whole, part)
    assert not coherence.loads.may_store(whole)


def test_a_flood_of_tags_is_bounded_and_evicts_rather_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epochs, "MAX_EVICTED_TAGS", 10)
    coherence = ready()
    tagged, plain = stored(coherence, "tagged", tags=frozenset(["t"])), stored(coherence, "plain")
    load = coherence.loads.begin("k", 100.0, frozenset(["t"]))
    for n in range(1000):
        coherence.evict(Eviction(tags=[f"flood {n}"]), 100.0)
    assert len(coherence._epochs._tag_evicted) <= 10
    assert not coherence.serving.may_serve(tagged, 100.0)
    assert not coherence.loads.may_store(load)
    assert coherence.serving.may_serve(plain, 100.0)
    assert coherence.serving.may_serve(stored(coherence, tags=frozenset(["t"])), 100.0)


def test_an_entry_ends_with_its_ttl() -> None:
    coherence = ready()
    load = coherence.loads.begin("k", 100.0)
    entry = load.entry("value", 160.0)
    assert coherence.serving.may_serve(entry, 159.9)
    assert not coherence.serving.may_serve(entry, 160.0)


@pytest.mark.parametrize(("max_staleness", "limit"), [(None, 1.0), (3.0, 3.0)])
def test_a_suspect_instance_serves_by_age_alone(max_staleness: float | None, limit: float) -> None:
    coherence = ready(max_staleness)
    entry, load = stored(coherence), coherence.loads.begin("l", 100.0)
    coherence.lost("cut")
    assert coherence.serving.may_serve(entry, 100.0 + limit)
    assert not coherence.serving.may_serve(entry, 100.001 + limit)
    assert coherence.loads.joinable("l", 100.0 + limit) is load
    assert coherence.loads.joinable("l", 100.001 + limit) is None
    assert coherence.serving.bypassing(entry, 100.0)


def test_a_healthy_instance_serves_for_the_whole_ttl_unless_a_limit_is_set() -> None:
    coherence = ready()
    assert coherence.serving.may_serve(stored(coherence), 1e9)
    coherence = ready(max_staleness=3)
    entry = stored(coherence)
    assert coherence.serving.may_serve(entry, 103.0)
    assert not coherence.serving.may_serve(entry, 103.1)
    assert coherence.serving.bypassing(entry, 103.1)
    assert not coherence.serving.bypassing(entry, 103.0)
    assert not coherence.serving.bypassing(None, 103.0)


def test_before_it_has_ever_joined_it_is_suspect() -> None:
    coherence = Coherence()
    assert coherence.suspect == "not subscribed yet"
    assert not coherence.serving.may_serve(stored(coherence), 101.1)


def test_joining_evicts_everything_before_it_is_trusted() -> None:
    coherence = ready()
    entry, load = stored(coherence), coherence.loads.begin("l", 100.0)
    coherence.lost("cut")
    eviction = coherence.joined_anew(0.0)
    assert eviction.everything
    assert coherence.suspect
    coherence.evict(eviction, 100.0)
    coherence.trust()
    assert coherence.suspect is None
    assert not coherence.serving.may_serve(entry, 100.0)
    assert not coherence.loads.may_store(load)


def test_trust_does_not_outrun_a_loss() -> None:
    coherence = Coherence()
    eviction = coherence.joined_anew(0.0)
    coherence.lost("cut")
    coherence.evict(eviction, 100.0)
    coherence.trust()
    assert coherence.suspect == "cut"


def test_one_doubt_does_not_settle_another() -> None:
    coherence = ready()
    coherence.doubt("eviction", "the cache is down")
    coherence.lost("cut")
    coherence.settle("eviction")
    assert coherence.suspect == "cut"


# Resuming a durable queue


def test_resumed_it_is_suspect_until_its_own_marker_is_evicted() -> None:
    coherence = ready()
    entry = stored(coherence)
    coherence.lost("cut")
    coherence.resumed("mine", 0.0, coherence.proof_state())
    epoch = coherence.epoch
    for message in (Probe(v=1, id="another's"), Invalidate(v=1, keys=["x"])):
        coherence.received(message, 100.0)
        coherence.evicted(0.0)
        assert coherence.suspect == "catching up with the queue"
    coherence.received(Probe(v=1, id="mine"), 100.0)
    assert coherence.suspect, "trusted before what came before the marker was evicted"
    coherence.evicted(0.0)
    assert coherence.suspect is None
    assert coherence.epoch == epoch
    assert coherence.serving.may_serve(entry, 1e6)


def test_resumed_it_refuses_what_stood_in_front_of_the_cache_outside() -> None:
    """Another process of the same name may have had the queue, and has evicted nothing here."""
    coherence = Coherence(in_front=True)
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    entry, load = stored(coherence), coherence.loads.begin("k", 100.0)
    coherence.lost("cut")
    assert coherence.serving.may_serve(entry, 100.5), (
        "what is a second old at most may be served while it is suspect"
    )
    assert coherence.resumed("mine", 100.5, coherence.proof_state()) is None
    assert not coherence.serving.may_serve(entry, 100.5)
    assert not coherence.loads.may_store(load)
    found = coherence.serving.found("value", 100.0, math.inf, frozenset(), coherence.serving.moment)
    assert coherence.serving.may_serve_found(found, 100.5, coherence.serving.moment), (
        "outside everything stays"
    )


def test_a_marker_of_a_lost_subscription_does_not_count() -> None:
    coherence = ready()
    coherence.lost("cut")
    coherence.resumed("first", 0.0, coherence.proof_state())
    coherence.received(Probe(v=1, id="first"), 100.0)
    coherence.lost("cut again")
    coherence.evicted(0.0)
    assert coherence.suspect == "cut again"
    coherence.resumed("second", 0.0, coherence.proof_state())
    coherence.received(Probe(v=1, id="first"), 100.0)
    coherence.evicted(0.0)
    assert coherence.suspect
    coherence.received(Probe(v=1, id="second"), 100.0)
    coherence.evicted(0.0)
    assert coherence.suspect is None


def test_a_marker_does_not_outlive_its_subscription() -> None:
    coherence = ready()
    coherence.lost("cut")
    coherence.resumed("mine", 0.0, coherence.proof_state())
    coherence.received(Probe(v=1, id="mine"), 100.0)
    coherence.lost("queue deleted")
    coherence.joined_anew(0.0)
    coherence.evicted(0.0)
    assert coherence.suspect, "trusted before it was cleared"


def test_resumed_without_what_was_kept_everything_goes() -> None:
    coherence = ready()
    coherence.lost("cut")
    eviction = coherence.resumed("mine", 0.0, None)
    assert eviction is not None
    assert eviction.everything
    coherence.evict(eviction, 0.0)
    coherence.evicted(0.0)
    assert coherence.suspect == "catching up with the queue"
    assert coherence.counters.gap_reasons == {"nothing kept with the cache": 1}


def test_the_numbers_that_were_kept_count_in_the_next_process() -> None:
    before, after = ready(), Coherence()
    before.received(numbered(7), 100.0)
    assert after.resumed("mine", 0.0, before.proof_state()) is None
    after.received(numbered(7), 100.0)  # it was not acknowledged
    assert after.counters.duplicates == 1
    eviction = after.received(numbered(9), 100.0)
    assert eviction is not None
    assert eviction.everything


def test_of_many_origins_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "MAX_ORIGINS_KEPT", 2)
    coherence = ready()
    for origin in ("o", "p", "q"):
        coherence.received(numbered(1, origin), 100.0)
    coherence.received(numbered(2, "o"), 100.0)
    assert coherence.proof_state().seqs == {"q": 1, "o": 2}


# Gaps


def numbered(seq: int, origin: str = "o", key: str = "k") -> Invalidate:
    return Invalidate(v=1, origin=origin, seq=seq, keys=[key])


def test_the_first_number_of_an_origin_is_a_baseline_and_a_jump_a_gap() -> None:
    coherence = ready()
    for message in (numbered(7), numbered(8), numbered(3, "p"), numbered(9), numbered(4, "p")):
        eviction = coherence.received(message, 100.0)
        assert eviction is not None
        assert not eviction.everything
    eviction = coherence.received(numbered(11), 100.0)
    assert eviction is not None
    assert eviction.everything
    assert coherence.counters.gap_reasons == {"missing messages": 1}
    assert coherence.last_gap == (100.0, "missing messages")


def test_a_new_subscription_has_baselines_of_its_own() -> None:
    coherence = ready()
    assert coherence.last_gap is None
    coherence.received(numbered(7), 100.0)
    coherence.lost("cut")
    coherence.lost("stopped")  # as whoever subscribes anew stops the old subscription first
    assert coherence.suspect == "cut"
    coherence.evict(coherence.joined_anew(100.0), 100.0)
    coherence.trust()
    assert coherence.received(numbered(20), 100.0) == Eviction(["k"], [], False)
    assert coherence.counters.gaps == 0
    assert coherence.last_gap == (100.0, "new subscription: cut")


@pytest.mark.parametrize("seq", [1, 4, 5])
def test_a_duplicate_is_no_gap_and_is_evicted_again(seq: int) -> None:
    coherence = ready()
    for n in range(1, 6):
        coherence.received(numbered(n), 100.0)
    eviction = coherence.received(numbered(seq, key="dup"), 100.0)
    assert eviction == Eviction(["dup"], [], False)
    assert coherence.counters.gaps == 0
    assert coherence.counters.duplicates == 1
    assert coherence.received(numbered(6), 100.0) == Eviction(["k"], [], False)


def test_messages_without_numbers_are_evicted_and_never_a_gap() -> None:
    coherence = ready()
    for message in (Invalidate(v=1, keys=["k"], seq=9), Invalidate(v=1, keys=["k"], origin="o")):
        assert coherence.received(message, 100.0) == Eviction(["k"], [], False)
    assert coherence.counters.gaps == 0


def test_gaps_are_coalesced_to_one_epoch_a_second_and_suspect_meanwhile() -> None:
    coherence = ready()
    eviction = coherence.gap("malformed message", 100.0)
    assert eviction is not None
    assert eviction.everything
    assert coherence.suspect is None
    assert coherence.gap("malformed message", 100.2) is None
    assert coherence.gap("malformed message", 100.9) is None
    assert coherence.suspect == "malformed message"
    assert coherence.gap_due_at == 101.0
    assert coherence.take_due_gap(100.99) is None
    eviction = coherence.take_due_gap(101.0)
    assert eviction is not None
    assert eviction.everything
    assert coherence.suspect, "trusted before the epoch that was put off has begun"
    assert coherence.gap("another", 101.5) is None
    coherence.gap_done()
    assert coherence.suspect == "another", "the end of one gap settled the next"
    assert coherence.take_due_gap(102.0) is not None
    coherence.gap_done()
    assert coherence.suspect is None
    assert coherence.take_due_gap(200.0) is None
    assert coherence.counters.gaps == 4


def test_the_message_behind_a_gap_that_is_put_off_is_evicted_itself() -> None:
    coherence = ready()
    coherence.received(numbered(1), 100.0)
    assert coherence.received(numbered(3), 100.0) == Eviction(everything=True, reason="missing messages")
    assert coherence.received(numbered(5, key="now"), 100.5) == Eviction(["now"], [], False)


def test_origins_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "MAX_ORIGINS", 10)
    coherence = ready()
    for n in range(100):
        coherence.received(numbered(n + 1, "busy"), 100.0)
        coherence.received(numbered(1, f"o{n}"), 100.0)
        assert "busy" in coherence._numbers.seqs, "the busiest origin was forgotten"
    assert len(coherence._numbers.seqs) == 10


def test_messages_that_are_no_invalidation_evict_nothing() -> None:
    coherence = ready()
    for message in (Unknown("news"), Probe(v=1, id="x"), Tick(v=1, origin="o", seq=1, as_of=1.0)):
        assert coherence.received(message, 100.0) is None
    assert coherence.counters.unknown_messages == 1


# Echoes


def test_an_echo_is_skipped_once() -> None:
    coherence = ready()
    coherence.expect_echo("mine", 1)
    assert coherence.received(numbered(1, "mine"), 100.0) is None
    assert coherence.received(numbered(1, "mine"), 100.0) == Eviction(["k"], [], False)
    assert coherence.counters.skipped_echoes == 1


def test_an_unexpected_message_of_ones_own_is_a_strangers() -> None:
    coherence = ready()
    coherence.expect_echo("mine", 2)
    assert coherence.received(numbered(1, "mine"), 100.0) == Eviction(["k"], [], False)
    assert coherence.received(numbered(2, "mine"), 100.0) is None


def test_what_comes_late_of_a_channel_that_is_closed_is_a_strangers() -> None:
    coherence = ready()
    for origin in ("mine", "mine too"):
        coherence.expect_echo(origin, 1)
    coherence.forget_echoes("mine")
    assert coherence.received(numbered(1, "mine"), 100.0) == Eviction(["k"], [], False)
    assert coherence.received(numbered(1, "mine too"), 100.0) is None


def test_a_new_subscription_expects_no_echo() -> None:
    coherence = ready()
    coherence.expect_echo("mine", 1)
    coherence.lost("cut")
    coherence.joined_anew(0.0)
    assert coherence.received(numbered(1, "mine"), 100.0) == Eviction(["k"], [], False)


def test_a_gap_counts_in_ones_own_messages_too() -> None:
    coherence = ready()
    for seq in (1, 2, 3):
        coherence.expect_echo("mine", seq)
    coherence.received(numbered(1, "mine"), 100.0)
    eviction = coherence.received(numbered(3, "mine"), 100.0)
    assert eviction is not None
    assert eviction.everything


def test_who_is_not_subscribed_does_not_collect_echoes() -> None:
    coherence = Coherence()
    for seq in range(100):
        coherence.expect_echo("mine", seq)
    assert not coherence._echoes


# What a write owes


@pytest.mark.parametrize(
    ("outcome", "publish", "delete_rows", "may_skip_echo"),
    [(COMMITTED, True, True, True), (ABORTED, False, False, False), (UNKNOWN, True, False, False)],
)
def test_what_is_owed(outcome: WriteOutcome, publish: bool, delete_rows: bool, may_skip_echo: bool) -> None:
    owed = owed_after(outcome)
    assert (owed.publish, owed.delete_rows, owed.may_skip_echo) == (publish, delete_rows, may_skip_echo)


@pytest.mark.parametrize(
    ("sqlstate", "outcome"),
    [
        (None, UNKNOWN),
        ("08006", UNKNOWN),  # connection failure
        ("57014", UNKNOWN),  # query canceled: by a timeout of the client, which cannot know how far it came
        ("57P01", UNKNOWN),  # administrator's shutdown
        ("57P02", UNKNOWN),  # crash
        ("58030", UNKNOWN),  # I/O error
        ("XX000", UNKNOWN),
        ("40003", UNKNOWN),  # statement completion unknown
        ("40001", ABORTED),  # serialization failure
        ("40P01", ABORTED),  # deadlock
        ("23503", ABORTED),  # foreign key, also a deferred one
        ("22001", ABORTED),
        ("42P01", ABORTED),
        ("25P02", ABORTED),
    ],
)
def test_outcome_of_an_error(sqlstate: str | None, outcome: WriteOutcome) -> None:
    assert outcome_of_error(sqlstate) is outcome


def test_merged() -> None:
    merged = Eviction.merged([Eviction(["a", "b"]), Eviction(["b", "c"], ["t"]), Eviction(tags=["t", "u"])])
    assert merged == Eviction(["a", "b", "c"], ["t", "u"])
    assert bool(merged)
    everything = Eviction(everything=True, reason="gap")
    assert Eviction.merged([Eviction(["a"]), everything, Eviction(["b"])]) == everything
    assert not Eviction.merged([])


def test_nobody_joins_a_load_that_may_hang_for_good() -> None:
    coherence = Coherence()
    coherence.joined_anew(0.0)
    coherence.trust()
    load = coherence.loads.begin("k", 0.0)
    assert coherence.loads.joinable("k", JOIN_AGE) is load
    assert coherence.loads.joinable("k", JOIN_AGE + 0.1) is None


def test_a_gap_of_a_cache_that_outlives_the_process_is_not_put_off() -> None:
    coherence = Coherence(gap_interval=0)
    coherence.joined_anew(0.0)
    coherence.trust()
    assert coherence.gap("malformed message", 1.0)
    assert coherence.gap("malformed message", 1.0)
    assert coherence.gap_due_at is None


def tick(as_of: float, seq: int = 0, source: str = "db", schema: str | None = None, **seqs: int) -> Tick:
    return Tick(v=1, origin="relay", seq=seq, as_of=as_of, source=source, schema=schema, seqs=seqs)


def told(coherence: Coherence, message: Message, now: float) -> Eviction | None:
    eviction = coherence.received(message, now)
    coherence.evicted(now)
    return eviction


def proving() -> Coherence:
    """An instance that trusts its subscription and has its baselines, at 1."""
    coherence = Coherence(max_staleness=5.0, max_clock_skew=0.1)
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    assert told(coherence, tick(0.9), 1.0) is None
    return coherence


def test_a_tick_keeps_what_was_loaded_after_the_first_one() -> None:
    coherence = proving()
    entry = coherence.loads.begin("k", 2.0).entry("value", 1e9)
    assert coherence.serving.may_serve(entry, 7.0)
    assert not coherence.serving.may_serve(entry, 7.1)
    told(coherence, tick(9.0), 9.1)
    assert coherence.serving.may_serve(entry, 13.8)
    assert not coherence.serving.may_serve(entry, 14.0)  # 9.0 - 0.1 + 5


def test_the_first_tick_extends_nothing_that_was_loaded_before() -> None:
    coherence = Coherence(max_staleness=5.0, max_clock_skew=0.1)
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    entry = coherence.loads.begin("k", 0.5).entry("value", 1e9)
    told(coherence, tick(0.9), 1.0)
    told(coherence, tick(9.0), 9.1)
    assert not coherence.serving.may_serve(entry, 9.2)


def test_a_number_that_is_missing_is_a_gap_before_the_watermark_moves() -> None:
    coherence = proving()
    gap = told(coherence, tick(9.0, writer=1), 9.1)
    assert gap is not None
    assert gap.everything
    assert coherence.proof.watermark == 0.9
    assert told(coherence, tick(10.0, writer=1), 10.1) is None  # counted once
    assert coherence.proof.watermark == 10.0


MADE_ANEW = {"the schema cacheinval was made anew": 1}


def test_a_schema_that_was_made_anew_is_a_gap_once() -> None:
    """What waited in its outbox reaches nobody."""
    coherence = proving()
    entry = coherence.loads.begin("k", 2.0).entry("value", 1e9)
    assert told(coherence, tick(3.0, schema="1"), 3.1) is None, "the first that says which one it is"
    assert told(coherence, tick(4.0), 4.1) is None, "of an older relay"
    gap = told(coherence, tick(9.0, schema="2"), 9.1)
    assert gap is not None
    assert gap.everything
    assert not coherence.serving.may_serve(entry, 9.2)
    assert told(coherence, tick(10.0, schema="2"), 10.1) is None
    assert (coherence.counters.gap_reasons, coherence.proof.watermark) == (MADE_ANEW, 10.0)


def test_what_cannot_be_evicted_explains_all_other_doubts() -> None:
    coherence = proving()
    coherence.lost("receiving failed")
    coherence.doubt("eviction", "eviction failed")
    assert coherence.suspect == "eviction failed"
    coherence.settle("eviction")
    assert coherence.suspect == "receiving failed"


@pytest.mark.parametrize("known", [None, "1"])
def test_ticks_of_one_batch_are_compared_with_each_other(known: str | None) -> None:
    """As they come after a process was stopped, or in a queue that is resumed."""
    coherence = proving()
    if known is not None:
        told(coherence, tick(3.0, schema=known), 3.1)
    entry = coherence.loads.begin("k", 3.5).entry("value", 1e9)
    assert coherence.received(tick(4.0, schema="1"), 9.0) is None
    gap = coherence.received(tick(8.0, schema="2"), 9.0)
    assert gap is not None
    assert gap.everything
    assert coherence.received(tick(9.0, schema="2"), 9.0) is None
    coherence.evict(gap, 9.0)
    coherence.evicted(9.0)
    assert coherence.counters.gap_reasons == MADE_ANEW
    assert coherence.gap_due_at is None
    assert not coherence.serving.may_serve(entry, 9.1)


def test_it_is_noticed_also_where_the_subscription_was_lost_or_the_process_was_away_meanwhile() -> None:
    coherence = proving()
    told(coherence, tick(3.0, schema="1"), 3.1)
    kept = coherence.proof_state()
    coherence.evict(coherence.joined_anew(4.0), 4.0)
    coherence.trust()
    told(coherence, tick(5.0, schema="2"), 5.1)
    assert coherence.counters.gap_reasons == MADE_ANEW
    another = Coherence(max_staleness=5.0, max_clock_skew=0.1, gap_interval=0)
    another.resumed("marker", 6.0, kept)
    another.received(Probe(v=1, id="marker"), 6.0)
    another.evicted(6.0)
    told(another, tick(7.0, schema="2"), 7.1)
    assert another.counters.gap_reasons == MADE_ANEW


def test_the_relays_own_numbers_count_as_well() -> None:
    coherence = proving()
    assert told(coherence, tick(9.0, seq=1), 9.1) is not None
    assert coherence.counters.gap_reasons == {"messages missing before a tick": 1}


@pytest.mark.parametrize(
    "wrong", [tick(9.3), tick(9.0, source="another")], ids=["future", "another database"]
)
def test_a_tick_that_cannot_be_believed_proves_nothing(wrong: Tick) -> None:
    coherence = proving()
    assert told(coherence, wrong, 9.1) is None
    assert coherence.proof.watermark < 9
    assert coherence.proof.refused
    told(coherence, tick(9.1), 9.2)
    assert coherence.proof.refused is None


def test_a_tick_counts_only_when_what_came_first_is_evicted() -> None:
    coherence = proving()
    coherence.received(tick(9.0), 9.1)
    assert coherence.proof.watermark == 0.9
    coherence.doubt("eviction", "redis is down")
    coherence.evicted(9.2)
    assert coherence.proof.watermark == 0.9


def test_a_new_subscription_starts_the_proof_over() -> None:
    coherence = proving()
    told(coherence, tick(9.0), 9.1)
    coherence.lost("cut")
    coherence.evict(coherence.joined_anew(10.0), 10.0)
    assert not coherence.proof.baselined


def test_a_beat_tells_what_is_missing_of_an_origin_that_is_known() -> None:
    coherence = proving()
    assert told(coherence, Beat(v=1, origin="stranger", seq=7), 2.0) is None
    assert told(coherence, Beat(v=1, origin="stranger", seq=7), 3.0) is None
    assert told(coherence, Beat(v=1, origin="stranger", seq=8), 4.0) is not None


def test_a_clock_that_was_set_costs_an_epoch_and_the_proof() -> None:
    coherence = proving()
    assert coherence.clock_stepped(100.0).everything
    assert not coherence.proof.baselined


def test_after_the_clock_was_set_an_instance_has_to_prove_that_it_hears() -> None:
    coherence = proving()
    told(coherence, tick(5000.0), 5000.0)
    coherence.clock_stepped(0.0)
    assert coherence.silent(1000.0, 3.0)  # the last message came an hour later, by the clock as it was


def test_before_an_instance_knows_its_database_no_tick_is_believed() -> None:
    coherence = Coherence(max_staleness=5.0, max_clock_skew=0.1)
    coherence.proof.await_source()
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    told(coherence, tick(0.9, source="another"), 1.0)
    assert not coherence.proof.baselined
    coherence.proof.trust_only("db")
    told(coherence, tick(1.9, source="another"), 2.0)
    assert not coherence.proof.baselined
    assert coherence.proof.refused
    told(coherence, tick(2.9), 3.0)
    assert coherence.proof.watermark == 2.9


def test_once_a_tick_has_told_all_numbers_a_new_origin_begins_with_one() -> None:
    coherence = proving()
    first, jumped = told(coherence, numbered(1, "new"), 2.0), told(coherence, numbered(2, "newer"), 3.0)
    assert first is not None
    assert jumped is not None
    assert (first.everything, jumped.everything) == (False, True)


def test_a_tick_long_after_the_last_one_is_a_gap_and_the_first_again() -> None:
    coherence = proving()
    now = 0.9 + NUMBERS_TOLD_FOR
    assert told(coherence, tick(now), now) is None
    now += NUMBERS_TOLD_FOR + 1
    gap = told(coherence, tick(now, writer=3), now)
    assert gap is not None
    assert gap.everything
    assert coherence.counters.gap_reasons == {"no tick for too long": 1}
    assert coherence.proof.extends == now
    assert told(coherence, tick(now + 1, writer=3), now + 1) is None


def resumed(coherence: Coherence, now: float) -> Coherence:
    """The next process, which has come up to its marker."""
    after = Coherence(max_staleness=5.0, max_clock_skew=0.1)
    assert after.resumed("mine", now, coherence.proof_state()) is None
    told(after, Probe(v=1, id="mine"), now)
    assert after.suspect is None
    return after


def test_the_proof_goes_on_in_the_next_process_with_its_first_tick() -> None:
    before = proving()
    entry = before.loads.begin("k", 2.0).entry("value", 1e9)
    told(before, tick(9.0), 9.1)
    after = resumed(before, 9.2)
    entry.epoch = after.epoch
    assert not after.serving.may_serve(entry, 9.2), "the watermark of another process"
    told(after, tick(10.0), 10.1)
    assert after.serving.may_serve(entry, 10.2)
    assert resumed(before, 9.2).counters.gaps == 0
    assert told(resumed(before, 9.2), tick(10.0, writer=1), 10.1) is not None


def test_ticks_that_waited_in_the_queue_are_checked_too() -> None:
    before = proving()
    after = Coherence(max_staleness=5.0, max_clock_skew=0.1)
    late = 3 * NUMBERS_TOLD_FOR
    after.resumed("mine", late, before.proof_state())
    for as_of in (NUMBERS_TOLD_FOR, 2 * NUMBERS_TOLD_FOR, late - 1):
        assert told(after, tick(as_of), late) is None
        assert after.proof.watermark == float("-inf")
    told(after, Probe(v=1, id="mine"), late)
    assert told(after, tick(late), late) is None
    assert after.proof.watermark == late


def test_another_database_than_before_the_restart_is_a_gap() -> None:
    after = resumed(proving(), 9.2)
    after.proof.trust_only("another")
    gap = told(after, tick(10.0, source="another"), 10.1)
    assert gap is not None
    assert gap.everything
    assert told(after, tick(11.0, source="another"), 11.1) is None


def test_of_more_channels_than_are_remembered_none_is_a_gap_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The relay tells all that were open within an hour."""
    monkeypatch.setattr(numbers, "MAX_ORIGINS", 10)
    monkeypatch.setattr(numbers, "MAX_ORIGINS_KEPT", 5)
    coherence = Coherence(max_staleness=5.0, max_clock_skew=0.1)
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    many = {f"w{number}": 1 for number in range(15)}
    for now in (1.0, 2.0, 3.0):
        assert told(coherence, tick(now, **many), now) is None
        assert coherence.proof.watermark == now
    after = resumed(coherence, 4.0)
    assert told(after, tick(5.0, **many), 5.0) is None


def test_what_is_missing_of_a_channel_that_was_heard_is_a_gap_at_a_first_tick_too() -> None:
    coherence = Coherence(max_staleness=5.0, max_clock_skew=0.1)
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    told(coherence, numbered(4, "w"), 1.0)
    gap = told(coherence, tick(2.0, w=5, stranger=7), 2.0)
    assert gap is not None
    assert gap.everything
    assert told(coherence, tick(3.0, w=5, stranger=7), 3.0) is None


# What is looked up elsewhere


def found(coherence: Coherence, load_started: float, now: float) -> bool:
    """Whether a read that begins at `now` and looks at once is answered by what another host says to have loaded then."""
    moment = coherence.serving.moment
    entry = coherence.serving.found("value", load_started, 1e9, NO_TAGS, moment)
    return coherence.serving.may_serve_found(entry, now, moment)


def test_what_another_host_has_loaded_counts_as_older_by_the_skew() -> None:
    coherence = proving()  # max_staleness 5, skew 0.1
    told(coherence, tick(2.0), 2.0)
    assert found(coherence, 20.0, 24.8)
    assert not found(coherence, 20.0, 25.0), "its clock may be ahead"
    assert found(coherence, 20.0, 19.95)
    assert not found(coherence, 20.0, 19.8), "dated later than clocks may differ"


def test_what_is_proven_during_a_look_does_not_concern_what_it_saw() -> None:
    """The proof rests on an eviction that came after the look."""
    coherence = proving()
    moment = coherence.serving.moment
    entry = coherence.serving.found("value", 2.0, 1e9, NO_TAGS, moment)
    told(coherence, Invalidate(v=1, keys=["k"]), 20.0)
    told(coherence, tick(19.9), 20.0)
    assert coherence.proof.covers(entry.load_started, 20.0)
    assert not coherence.serving.may_serve_found(entry, 20.0, moment)
    assert found(coherence, 2.0, 20.0)
