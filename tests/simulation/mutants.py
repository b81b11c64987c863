"""The rules with one line changed: each must be caught, or the exploration proves nothing."""

import inspect
import sys
from dataclasses import dataclass
from types import ModuleType

import cacheinval.coherence as rules

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


@dataclass(frozen=True)
class Mutant:
    """A fault, where it shows, and how it is made: a changed line of `coherence.py`, or a changed caller."""

    name: str
    shape: Shape
    changes: tuple[tuple[str, str], ...] = ()
    glue: Glue | None = None

    def rules(self) -> ModuleType:
        """The changed module; importable by name, for worlds are pickled."""
        return changed(rules, self.changes, self.name)


def changed(original: ModuleType, changes: tuple[tuple[str, str], ...], name: str) -> ModuleType:
    """A copy of `original` with these lines changed, importable by name."""
    if not changes:
        return original
    source = inspect.getsource(original)
    for line, instead in changes:
        assert source.count(line) == 1, f"{name}: {source.count(line)} places are {line!r}"
        source = source.replace(line, instead)
    module = ModuleType("cacheinval_mutant_" + "".join(c if c.isalnum() else "_" for c in name))
    sys.modules[module.__name__] = module
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module


@dataclass(frozen=True)
class TimedMutant:
    """The same for the world with time."""

    name: str
    span: Span
    changes: tuple[tuple[str, str], ...] = ()
    tick_changes: tuple[tuple[str, str], ...] = ()
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
            ("and load.epoch == self.epoch and", "and"),
            ("load.started, load.epoch, load.generation", "load.started, self.epoch, load.generation"),
        ),
    ),
    Mutant(
        "entries of an older epoch served", KEPT, (("if entry.epoch != self.epoch or now >=", "if now >="),)
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
]

DROPPED_IN_TIME = Span(drops=1)

TIMED_MUTANTS = [
    TimedMutant(
        "tick sent before the confirms",
        Span(),
        tick_changes=(("self._seqs = None if self.waiting else seqs", "self._seqs = seqs"),),
    ),
    TimedMutant(
        "tick from a cursor instead of a set",
        Span(writes=1, slow_writes=1, until=4),
        relaying=Relaying(by_cursor=True),
    ),
    TimedMutant(
        "numbers told as the look saw them", DROPPED_IN_TIME, relaying=Relaying(numbers_of_look=True)
    ),
    TimedMutant("tick time read after the snapshot", Span(), relaying=Relaying(time_after_look=True)),
    TimedMutant(
        "watermark moved before the numbers are checked",
        DROPPED_IN_TIME,
        (('            return self.gap("messages missing before a tick", now)', "            pass"),),
    ),
    TimedMutant(
        "the first tick extends what was loaded before",
        Span(drops=1, baselined=False, until=4),
        (("            self.extends = now\n", "            self.extends = -1\n"),),
    ),
    TimedMutant(
        "another database's tick believed",
        Span(foreign_ticks=2, looks=0),
        (("if tick.source != self.source:", "if False:"),),
    ),
    TimedMutant(
        "a late reader joining a hung load",
        Span(hung_loads=True, looks=1),
        (("            or self._too_old(load.started, now)\n", ""),),
    ),
    TimedMutant(
        "age counted from the end of a load",
        Span(hung_loads=True, looks=0),
        (
            (
                "return now - load_started > self._age_limit and",
                "return now - load_started > self._age_limit + 1 and",
            ),
        ),
    ),
]
