"""The rules with one line changed: each must be caught, or the exploration proves nothing."""

from dataclasses import dataclass
from types import ModuleType

import cacheinval.coherence as rules

from .changing import Changes, changed
from .freshness import Relaying, Span
from .worlds import Glue, Shape

STORE = Shape(writes=2, readers=2)
TAGS = Shape(keys=("a", "b"), tagged=True, by_tag=True, writes=1, readers=2)
REJOIN = Shape(writes=2, readers=2, losses=1)
KEPT = Shape(writes=2, readers=1, losses=1, keeps_entries=True)
SLOW = Shape(writes=1, readers=1, losses=1, slow_join=True)
RESUME = Shape(writes=2, readers=1, losses=1, resumes=True)
BATCHED = Shape(writes=2, readers=1, losses=1, resumes=True, batches=True)
DROPPED = Shape(keys=("a", "b"), writes=3, readers=1, drops=1)
UNKNOWN = Shape(writes=1, readers=2, unknown_commits=1)
OWN = Shape(writes=1, readers=1, own=True)
OWN_TAGS = Shape(keys=("a", "b"), tagged=True, by_tag=True, own_tags=True, writes=2, readers=1)
BEATS = Shape(writes=2, readers=1, drops=1, beats=1)
DROPPED_AND_GARBLED = Shape(keys=("a", "b"), writes=3, readers=1, drops=1, malformed=1)

TOO_OLD = "        if self._trust.too_old(entry.load_started, now):\n            return False\n"
PAST_TTL = Span(staleness=0, until=4, ttl=1, overtime=2, if_error=2, losses=1, looks=0)
PAST_TTL_BY_TAG = Span(staleness=None, until=4, ttl=1, overtime=2, tagged=True, by_tag=True, looks=0)
IN_VAIN = Span(staleness=None, until=5, if_error=1, load_failures=1, looks=0)

FEW_TAGS = (("MAX_EVICTED_TAGS = 100_000", "MAX_EVICTED_TAGS = 1"),)
FEW_ORIGINS = (("MAX_ORIGINS = 10_000", "MAX_ORIGINS = 1"),)


@dataclass(frozen=True)
class Mutant:
    """A fault, where it shows, and how it is made: a changed line of the rules, or a changed caller."""

    name: str
    shape: Shape
    changes: Changes = ()
    glue: Glue | None = None

    def rules(self) -> ModuleType:
        """The changed module; importable by name, for worlds are pickled."""
        return changed(rules, self.changes, self.name)


@dataclass(frozen=True)
class TimedMutant:
    """The same for the world with time."""

    name: str
    span: Span
    changes: Changes = ()
    tick_changes: Changes = ()
    relaying: Relaying | None = None


MUTANTS = [
    Mutant("token check removed", STORE, (("return self._stands(load, load.tags)\n", "return True\n"),)),
    Mutant("suspension between check and store", STORE, glue=Glue(suspends_before_store=True)),
    Mutant("joiners of an old flight", STORE, glue=Glue(joins_any_flight=True)),
    Mutant("flush before bind", REJOIN, glue=Glue(clears_before_bind=True)),
    Mutant(
        "in-flight loads not voided by a new epoch",
        REJOIN,
        (
            ("and load.epoch == epochs.epoch and", "and"),
            (
                "return self._stands(load, load.tags)\n",
                "load.epoch = self._epochs.epoch\n        return self._stands(load, load.tags)\n",
            ),
        ),
    ),
    Mutant(
        "entries of an older epoch served", KEPT, (("if entry.epoch != epochs.epoch or now >=", "if now >="),)
    ),
    Mutant(
        "an evicted key does not void its load",
        STORE,
        (
            (
                "if load is not None:\n                load.voided = True",
                "if load is not None:\n                pass",
            ),
        ),
    ),
    Mutant(
        "a judgement outlives its epoch",
        Shape(writes=3, readers=1, drops=1, keeps_entries=True),
        (("self.epoch += 1\n        self._standing.shake()", "self.epoch += 1"),),
    ),
    Mutant(
        "a judgement outlives an evicted tag",
        TAGS,
        (("self.generation += 1\n        self._standing.shake()", "self.generation += 1"),),
    ),
    Mutant("an evicted tag does not void loads", TAGS, (("evicted.get(tag, 0) <= generation", "True"),)),
    Mutant(
        "gap tolerance 1",
        DROPPED,
        (("return seq == last + 1", "return seq <= last + 2"),),
    ),
    Mutant(
        "rows of an ambiguous commit deleted", UNKNOWN, (("delete_rows=committed,", "delete_rows=True,"),)
    ),
    Mutant("own echo skipped without a local eviction", OWN, glue=Glue(skips_echoes_without_evicting=True)),
    Mutant(
        "a resumed queue trusted before its marker",
        RESUME,
        (('self.doubt("subscription", "catching up with the queue")', 'self.settle("subscription")'),),
    ),
    Mutant(
        "a marker counts before what came first is evicted",
        BATCHED,
        (
            (
                "self._marker_passed = self._marker_passed or message.id == self._marker",
                "self.settle('subscription')",
            ),
        ),
    ),
    Mutant(
        "a subscription lost while clearing is trusted",
        SLOW,
        (
            (
                "        if self._subscribed:\n            self.settle",
                "        if True:\n            self.settle",
            ),
        ),
    ),
    Mutant(
        "entries of an evicted tag served",
        TAGS,
        (("if not epochs.tags_stand(entry.tags, entry.generation):", "if False:"),),
    ),
    Mutant(
        "an entry forgets its tags",
        TAGS,
        (("self.generation, expires_at, self.tags, kept=", "self.generation, expires_at, kept="),),
    ),
    Mutant(
        "loads joined whose tag was evicted",
        TAGS,
        (
            ("if load is None or not self._stands(load, tags):", "if load is None:"),
            ("            and self._stands(load, load.tags)\n", ""),
        ),
    ),
    Mutant("evicting a tag begins no generation", TAGS, (("self.generation += 1", "pass"),)),
    Mutant(
        "tags forgotten beyond the bound",
        OWN_TAGS,
        (*FEW_TAGS, ("self._tag_floor = self.generation", "pass")),
    ),
    Mutant(
        "the bound on tags not asked for",
        OWN_TAGS,
        (*FEW_TAGS, ("generation >= self._tag_floor and", "")),
    ),
    Mutant("a new epoch is the old one", REJOIN, (("self.epoch += 1", "pass"),)),
    Mutant(
        "everything is evicted, and no epoch begins",
        KEPT,
        (("            self._begin_epoch()\n            return\n", "            return\n"),),
    ),
    Mutant(
        "a lost subscription is trusted",
        REJOIN,
        (('self.doubt("subscription", self._lost)', "pass"),),
    ),
    Mutant(
        "a subscription that was lost counts as one",
        SLOW,
        (("        self._subscribed = False\n        self._lost = self", "        self._lost = self"),),
    ),
    Mutant(
        "every probe is taken for the marker",
        Shape(writes=1, readers=1, losses=2, resumes=True, probes=1),
        (("message.id == self._marker", "True"),),
    ),
    Mutant(
        "numbers of messages not looked at",
        DROPPED,
        (("return seq == last + 1", "return True"),),
    ),
    Mutant(
        "numbers of beats not looked at",
        BEATS,
        (("message.seq, unknown_counts=False):", "message.seq, unknown_counts=False) and False:"),),
    ),
    Mutant(
        "a message with a gap before it waits for the epoch",
        Shape(writes=3, readers=1, drops=1, malformed=1),
        (("return gap or _asked_by(message)", "return gap"),),
    ),
    Mutant(
        "everybody's message taken for one's own",
        STORE,
        (("own = (message.origin, message.seq) in self._echoes", "own = True"),),
    ),
    Mutant(
        "a gap put off is forgotten",
        DROPPED_AND_GARBLED,
        (("            self.put_off_gap(reason)\n", ""),),
    ),
    Mutant(
        "one of two doubts settles both",
        Shape(writes=2, readers=1, losses=1, malformed=2),
        (("self.doubts.pop(about, None)", "self.doubts.clear()"),),
    ),
]

DROPPED_IN_TIME = Span(staleness=0, until=3, drops=1)
HUNG = Span(hung_loads=True, looks=1)
RESUMED_IN_TIME = Span(staleness=0, until=3, durable=True, losses=1, looks=0)
PUT_OFF = Span(staleness=0, until=3, malformed=2, looks=3, grace=True)
SCHEMA_DROPPED = Span(schema_drops=1, writes=0, unrecorded=1, looks=2, staleness=0, until=4)
SKEWED = Span(skew=1, staleness=0, ahead=-1, until=3, grace=True)
PUT_RIGHT = Span(database_ahead=2, ahead=2, clocks=(0,), clock_sets=1, staleness=0, until=5)
FEW_ROWS = (
    (
        "from cacheinval.outbox.session import MOST_WAITING, Confirmed, Look",
        "from cacheinval.outbox.session import Confirmed, Look\n\nMOST_WAITING = 1",
    ),
)
MANY_ROWS = Span(staleness=0, until=3, keys=("k", "l"), most_waiting=1, writes=0, unrecorded=2)

TIMED_MUTANTS = [
    TimedMutant(
        "tick sent before the confirms",
        Span(),
        tick_changes=(
            ("self._confirmed = None if self.waiting else confirmed", "self._confirmed = confirmed"),
        ),
    ),
    TimedMutant(
        "tick from a cursor instead of a set",
        Span(writes=1, slow_writes=1, staleness=0, until=3, grace=True),
        relaying=Relaying(by_cursor=True),
    ),
    TimedMutant(
        "numbers told as the look saw them", DROPPED_IN_TIME, relaying=Relaying(numbers_of_look=True)
    ),
    TimedMutant(
        "tick time read after the snapshot",
        Span(staleness=0, until=3, grace=True),
        relaying=Relaying(time_after_look=True),
    ),
    TimedMutant(
        "a tick of a look that saw only a part",
        MANY_ROWS,
        tick_changes=(*FEW_ROWS, ("if len(look.waiting) < MOST_WAITING:", "if True:")),
    ),
    TimedMutant(
        "rows deleted before they are published",
        Span(staleness=0, until=3, kills=1),
        relaying=Relaying(deletes_before_publishing=True),
    ),
    TimedMutant(
        "rows of an ambiguous commit deleted, with ticks",
        Span(writes=0, unknown_commits=1, staleness=0, until=3),
        (("delete_rows=committed,", "delete_rows=True,"),),
    ),
    TimedMutant(
        "own echo skipped without a local eviction, with ticks",
        Span(own=True, staleness=0, until=3),
        relaying=Relaying(echo_without_evicting=True),
    ),
    TimedMutant(
        "watermark moved before the numbers are checked",
        DROPPED_IN_TIME,
        (('            return self.gap("messages missing before a tick", now)', "            pass"),),
    ),
    TimedMutant(
        "gap tolerance 1 at ticks",
        DROPPED_IN_TIME,
        (("return seq > (last or 0) and (", "return seq > (last or 0) + 1 and ("),),
    ),
    TimedMutant(
        "an origin not heard of before is no gap at a tick",
        DROPPED_IN_TIME,
        (("(last is not None or unknown_counts)", "(last is not None)"),),
    ),
    TimedMutant(
        "the relay's own number not checked",
        DROPPED_IN_TIME,
        (("numbers = {**tick.seqs, tick.origin: tick.seq}", "numbers = tick.seqs"),),
    ),
    TimedMutant(
        "the numbers of others not checked",
        DROPPED_IN_TIME,
        (("numbers = {**tick.seqs, tick.origin: tick.seq}", "numbers = {tick.origin: tick.seq}"),),
    ),
    TimedMutant(
        "watermark trusted across epochs",
        Span(staleness=0, until=3, losses=1, drops=1, grace=True),
        (
            # The first tick of the new subscription tells numbers, as ever; but the proof of the old one stays.
            (
                "        self._gap_due: str | None = None\n",
                "        self._gap_due = None\n        self._first = False\n",
            ),
            (
                "        self._begin_to_count()\n        self.position.forget()",
                "        self._numbers.start_over()\n        self._first = True\n        self.position.forget()",
            ),
            (
                "if missing:",
                "first, self._first = self._first, False\n        if not first and missing:",
            ),
        ),
    ),
    TimedMutant(
        "watermark trusted across a step of the clock",
        PUT_RIGHT,
        (
            (
                "        self._tick_passed = None\n        self.proof.start_over()\n",
                "        self._tick_passed = None\n",
            ),
        ),
    ),
    TimedMutant(
        "a tick that was believed by another clock",
        Span(
            database_ahead=1,
            ahead=1,
            clocks=(0,),
            clock_sets=1,
            batches=True,
            staleness=0,
            until=2,
            grace=True,
        ),
        (
            (
                "        self._tick_passed = None\n        self.proof.start_over()\n",
                "        self.proof.start_over()\n",
            ),
        ),
    ),
    TimedMutant(
        "the last gap remembered by another clock",
        Span(ahead=2, clocks=(0,), clock_sets=1, malformed=2, looks=0, staleness=0, until=3),
        (
            (
                "        self._last_gap = self._heard_at = -math.inf\n",
                "        self._heard_at = -math.inf\n",
            ),
        ),
    ),
    TimedMutant(
        "a clock that was set begins no epoch",
        Span(staleness=0, ahead=2, clocks=(0,), clock_sets=1, looks=0, until=3, grace=True),
        (('return Eviction(everything=True, reason="clock stepped")', "return Eviction()"),),
    ),
    TimedMutant(
        "the first tick extends what was loaded before",
        Span(drops=1, baselined=False, staleness=0, until=2, grace=True),
        (("            self.extends = now\n", "            self.extends = -1\n"),),
    ),
    TimedMutant(
        "what was loaded as the first tick came is extended",
        Span(drops=1, baselined=False, staleness=0, until=2, looks=2, grace=True),
        (("load_started > self.extends", "load_started >= self.extends"),),
    ),
    TimedMutant(
        "another database's tick believed",
        Span(foreign_ticks=1, looks=0, staleness=0, until=3),
        (
            ("if tick.source != self.source:", "if False:"),
            ("if self._source_before not in (None, tick.source):", "if False:"),
        ),
    ),
    TimedMutant(
        "a schema that was made again goes unnoticed",
        SCHEMA_DROPPED,
        (("if tick.schema is not None and self.schema not in (None, tick.schema):", "if False:"),),
    ),
    TimedMutant(
        "of which schema the last tick was is forgotten",
        SCHEMA_DROPPED,
        (("        self.schema = tick.schema or self.schema\n", ""),),
    ),
    TimedMutant("the schema told as the look saw it", SCHEMA_DROPPED, relaying=Relaying(schema_of_look=True)),
    TimedMutant(
        "a tick from the future believed",
        Span(database_ahead=1, until=4),
        (("if tick.as_of > now + self._max_clock_skew:", "if False:"),),
    ),
    TimedMutant(
        "skew not subtracted",
        SKEWED,
        (("return self.watermark - self._max_clock_skew", "return self.watermark"),),
    ),
    TimedMutant(
        "a tick counts while a gap is put off",
        PUT_OFF,
        (
            (
                "        if self.suspect is None:\n            self.proof.advance",
                "        if True:\n            self.proof.advance",
            ),
        ),
    ),
    TimedMutant(
        "a gap put off raises no doubt",
        Span(staleness=0, until=1, malformed=1),
        (('        self.doubt("gap", reason)\n', ""),),
    ),
    TimedMutant(
        "a gap put off meanwhile is settled with the one before",
        Span(staleness=0, until=3, writes=0, malformed=3, looks=3, batches=True),
        (
            (
                "        if self._gap_due is None:\n            self.settle",
                "        if True:\n            self.settle",
            ),
        ),
    ),
    TimedMutant(
        "an eviction of everything that failed is forgotten",
        Span(ahead=1, clocks=(0,), clock_sets=1, failures=1, writes=0, looks=0, staleness=0, until=3),
        relaying=Relaying(forgets_failed_evictions=True),
    ),
    TimedMutant(
        "a late reader joining a hung load",
        Span(hung_loads=True, readers=2, looks=0, staleness=0, until=3),
        (("            and not self._trust.too_old(load.started, now)\n", ""),),
    ),
    TimedMutant(
        "a hung load stores beside the one that replaced it",
        Span(hung_loads=True, readers=2, looks=1, staleness=0, until=3),
        (("            older.voided = True", "            pass"),),
    ),
    TimedMutant(
        "age counted from the end of a load",
        Span(hung_loads=True, looks=0),
        (
            (
                "return now - load_started > self.age_limit and",
                "return now - load_started > self.age_limit + 1 and",
            ),
        ),
    ),
    TimedMutant(
        "a judgement outlives the trust that it rests on",
        Span(staleness=None, losses=1, looks=0, until=4),
        (("        if self.age_limit < before:\n            self.standing.shake()\n", ""),),
    ),
    TimedMutant(
        "a judgement outlives the source that it rests on",
        Span(foreign_ticks=1, until=4),
        (("            self._standing.shake()\n            return False", "            return False"),),
    ),
    TimedMutant(
        "a judgement lasts as long as the entry",
        Span(looks=0, staleness=0, until=3),
        (
            (
                "return min(entry.expires_at, self._trust.good_until(entry.load_started))",
                "return entry.expires_at",
            ),
        ),
    ),
    TimedMutant(
        "hits of any age",
        Span(looks=0, staleness=0, until=3),
        ((TOO_OLD, ""),),
    ),
    TimedMutant(
        "watermark without end",
        Span(looks=1, staleness=0, until=3),
        (("return now <= self.until and", "return"),),
    ),
    TimedMutant(
        "a suspect instance serves without limit",
        Span(staleness=None, losses=1, looks=0, until=5),
        (("SUSPECT_AGE if self.doubts else math.inf", "math.inf"),),
    ),
    TimedMutant(
        "a doubt that changes nothing",
        Span(staleness=None, losses=1, looks=0, until=5),
        (
            (
                "        self.doubts[about] = reason\n        self._set_age_limit()\n",
                "        self.doubts[about] = reason\n",
            ),
        ),
    ),
    TimedMutant(
        "a resumed queue trusted before its marker, with ticks",
        RESUMED_IN_TIME,
        (('self.doubt("subscription", "catching up with the queue")', 'self.settle("subscription")'),),
    ),
    TimedMutant(
        "the marker of an earlier subscription",
        Span(staleness=0, until=3, durable=True, losses=2, looks=0),
        (("message.id == self._marker", "True"),),
    ),
    TimedMutant(
        "an evicted value that is kept is served",
        IN_VAIN,
        (("before, entry.epoch = entry.epoch, -abs(entry.epoch)", "before = entry.epoch"),),
    ),
    TimedMutant("a judgement outlives what is expired", IN_VAIN, (("        entry.standing = -1\n", ""),)),
    TimedMutant(
        "an evicted value given while it is loaded again",
        PAST_TTL,
        (
            (
                "if entry.epoch != epochs.epoch or now >=",
                "if (entry.epoch != epochs.epoch and not overtime) or now >=",
            ),
        ),
    ),
    TimedMutant(
        "a value of an evicted tag given while it is loaded again",
        PAST_TTL_BY_TAG,
        (
            (
                "if not epochs.tags_stand(entry.tags, entry.generation):",
                "if not overtime and not epochs.tags_stand(entry.tags, entry.generation):",
            ),
        ),
    ),
    TimedMutant(
        "what cannot be proven given while it is loaded again",
        PAST_TTL,
        ((TOO_OLD, TOO_OLD.replace("if self", "if not overtime and self")),),
    ),
    TimedMutant(
        "an evicted value given instead of an error for as long after its ttl",
        Span(staleness=None, until=5, ttl=1, if_error=1, load_failures=1, looks=0),
        (("now - entry.load_started <= seconds", "now <= entry.expires_at + seconds"),),
    ),
    TimedMutant(
        "an evicted value of any age given instead of an error",
        IN_VAIN,
        ((" and now - entry.load_started <= seconds", ""),),
    ),
    TimedMutant(
        "ages told by a clock that was set",
        Span(ahead=2, clocks=(0,), clock_sets=1, if_error=1, load_failures=1, looks=0, until=5),
        (("abs(entry.epoch) >= self._ages_since and", ""),),
    ),
    TimedMutant(
        "what was given instead of an error is stored",
        IN_VAIN,
        relaying=Relaying(stores_what_is_given_instead=True),
    ),
    TimedMutant(
        "silence not heard",
        Span(silence=1, deaf=1, looks=0, writes=0),
        (("return self._subscribed and now - self._heard_at > limit", "return False"),),
    ),
]
