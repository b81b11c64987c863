"""The fleet as one process sees it: who answers, who should, and what each has told; no I/O, no clock."""

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from math import inf
from typing import Any

from cacheinval.coherence.registration import Registered
from cacheinval.overview import Overview
from cacheinval.verdict.member import Member
from cacheinval.verdict.reports import Identity, Report, understand
from cacheinval.verdict.writes import Line, Writes

__all__ = ["MISSED_AFTER", "Condition", "Fate", "Fleet"]

SILENT_AFTER = 3.5
"""Seconds without an answer, at about one question a second."""

MISSED_AFTER = 1.5
"""Seconds without an answer after which the last question was missed; an answer may be a little late."""

ANSWERED_AFTER = 2.0

FORGOTTEN_AFTER = 60.0
FORGOTTEN_UNKNOWN_AFTER = 3600.0  # where no registry tells who has left from who hangs
"""Seconds for which one that has left, or of which nothing is heard and nobody knows, is shown."""

LATE_AFTER = 2.5
"""Seconds without a word of its eviction after which a write is late somewhere."""

MOST_MEMBERS = 1_000


class Condition(StrEnum):
    """How an instance is, the worst first."""

    SUSPECT = "suspect"
    SILENT = "silent"
    UNKNOWN = "unknown"
    UNPROVEN = "unproven"
    STARTING = "starting"
    FRESH = "fresh"
    GONE = "gone"


class Fate(StrEnum):
    """What has become of a write at one instance."""

    EVICTED = "evicted"
    DROPPED = "dropped"  # with everything else, later
    PENDING = "pending"  # it has not been asked since, most likely
    LATE = "late"
    UNKNOWN = "unknown"  # it was not there yet, or no more, or has evicted more than it could tell


class Fleet:
    """Every instance that was heard of, and the last writes.

    Args:
        own: the id of the instance that looks; None if it is none.
        patience: seconds for which somebody may not answer; 0 for a single look, after which all who were to answer have.
        missed_after: seconds without an answer after which one is missing.
    """

    def __init__(
        self, own: str | None, patience: float = SILENT_AFTER, missed_after: float = MISSED_AFTER
    ) -> None:
        self.own = own
        self.overview: Overview | None = None
        """What the database said last; None while it cannot be used, or nobody has looked."""
        self.overview_before: Overview | None = None
        """What it said before that."""
        self.database_problem: str | None = None
        """Why the database cannot be used."""
        self._patience, self._missed_after = patience, missed_after
        self.writes = Writes()
        self.problem: str | None = None
        """Why nobody can be asked."""
        self.problem_since: float | None = None
        self.asked_since: float | None = None
        """Since when everybody has been asked again and again."""
        self.asked_at: float | None = None
        """When the broker took a question last."""
        self.registry_known = False
        self.not_understood = 0
        self._odd: dict[str, float] = {}  # when it was heard last, by id
        self._newest_told = -inf
        self._stopped: bool | None = None
        self._members: dict[Identity, Member] = {}

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    def heard(self, status: Mapping[str, Any], now: float) -> None:
        """An answer has arrived."""
        report = understand(status)
        member = None if report is None else self._answering(report, now)
        if report is None or member is None:
            self.not_understood += 1
            if len(self._odd) < MOST_MEMBERS:
                self._odd[str(status.get("id"))] = now
            return
        member.heard(report, now, self._newest_told)
        self._newest_told = max(self._newest_told, -inf if member.tick is None else member.tick)
        self._stopped = None
        recent, report.evictions = report.evictions, None
        for evicted in [] if recent is None else member.told(recent):
            self.writes.told(member.identity, evicted)

    def asked(self, problem: str | None, now: float) -> None:
        """Everybody was asked; or could not be, and why. Where nobody is known, nobody need ever have made the exchange."""
        if problem is not None and "no exchange" in problem and not self._anybody_is_known:
            problem = None
        if (problem is None) != (self.problem is None) or self.asked_since is None:
            self.asked_since = now
            self.problem_since = None if problem is None else now
        self.problem = problem
        self._newest_told = self._newest_tick()  # nobody's word stands for longer than he
        if problem is None:
            self.asked_at = now

    @property
    def _anybody_is_known(self) -> bool:
        return any(member.registered or member.heard_at is not None for member in self)

    def _newest_tick(self) -> float:
        return max((tick for member in self if (tick := member.tick) is not None), default=-inf)

    @property
    def ticks_stopped(self) -> bool:
        """Whether no tick comes to anybody, as far as is known.

        Answers are of different age, and whoever answered a moment earlier was late by less, or was not. So all are compared
        as of the answer of one that is late: where nobody has told of a tick that it had not heard, its silence is that of
        the relay, and all are late as it is. What makes it late must not be its own clock.
        """
        if self._stopped is None:
            newest = self._newest_tick()
            self._stopped = any(
                member.late(by_clock_here=True) and newest <= member.reached for member in self
            )
        return self._stopped

    def cut_off(self, member: Member) -> bool:
        """Whether ticks come to others, and not to this one.

        Only what others had told before can be held against it: with the answer after that it has heard it too, unless
        ticks do not reach it. Of a single look all answers are of the same moment.
        """
        if self.asking_once:
            return member.late() and self._newest_tick() > member.reached
        return member.late() and member.behind

    @property
    def asking_once(self) -> bool:
        """Whether this is a single look."""
        return self._patience == 0.0

    def asking(self, now: float) -> bool:
        """Whether nobody can have answered yet."""
        return self.asked_since is None or now - self.asked_since < min(self._patience, ANSWERED_AFTER)

    def looked(self, seen: Overview | str, now: float) -> None:
        """What the database said; or why it cannot be used."""
        self.overview_before = self.overview
        self.overview, self.database_problem = (None, seen) if isinstance(seen, str) else (seen, None)
        if isinstance(seen, str):
            self.registry(None, now)
        else:
            self.registry(seen.settled if self.asking_once else seen.registered, now)

    def registry(self, registered: Iterable[Registered] | None, now: float) -> None:
        """Who is registered in the database; None where that is not known."""
        self.registry_known = registered is not None
        if registered is None:
            return  # who was in it mostly still is
        told = {(one.id, one.session) for one in registered}
        ids = {id_ for id_, _ in told}
        for member in self:
            member.registered = (member.id, member.session) in told or (
                member.session is None and member.id in ids
            )
        known = {(member.id, member.session) for member in self}
        for id_, session in told:
            if (
                known.isdisjoint({(id_, session), (id_, None)})
                and (new := self._member((id_, session), session, now)) is not None
            ):
                new.registered = True

    def _answering(self, report: Report, now: float) -> Member | None:
        """The one that has answered."""
        if report.identity in self._members or report.session:
            return self._member(report.identity, report.session, now)
        registered, seen_at = False, now
        for other in [other for other in self if other.id == report.id and not other.session]:
            other.succeeded = True
        for other in [other for other in self if other.id == report.id and other.report is None]:
            if report.session is None or other.session == report.session:  # it is the one that was expected
                registered, seen_at = other.registered, min(seen_at, other.seen_at)
                del self._members[other.identity]
        member = self._member(report.identity, report.session, seen_at)
        if member is not None:
            member.registered = registered
        return member

    def _member(self, identity: Identity, session: str | None, now: float) -> Member | None:
        member = self._members.get(identity)
        if member is None and len(self._members) < MOST_MEMBERS:
            member = self._members[identity] = Member(identity, session, now)
        return member

    def condition(self, member: Member, now: float) -> Condition:
        """How that instance is."""
        report, heard_at = member.report, member.heard_at
        left = self._left(member)
        if left and self.missed(member):
            return Condition.GONE
        if self._unanswered(member) > self._patience:
            return Condition.GONE if left else Condition.SILENT
        if report is None or heard_at is None or now - heard_at > SILENT_AFTER:
            return (
                Condition.UNKNOWN
            )  # what it told is too old to be told again, whoever could not be asked meanwhile
        if report.state == "starting":
            return Condition.STARTING
        if report.state != "ready":
            return Condition.SUSPECT
        if member.late() or (member.awaits_ticks and self.ticks_stopped):
            return Condition.UNPROVEN
        return Condition.FRESH

    def _unanswered(self, member: Member) -> float:
        """For how many seconds it was asked, and has not answered. What nobody could be asked does not count."""
        if self.problem is not None or self.asked_at is None or self.asked_since is None:
            return 0.0
        return self.asked_at - max(member.seen_at, self.asked_since, member.heard_at or 0.0)

    def missed(self, member: Member) -> bool:
        """Whether it has not answered when it was asked last, whoever could not be asked before that."""
        heard_at = max(member.seen_at, member.heard_at or 0.0)
        return self.asked_at is not None and self.asked_at - heard_at > self._missed_after

    def unheard(self, now: float) -> float:
        """Seconds since the one that was heard least lately has answered; not of those that have left."""
        return max((now - (member.heard_at or 0.0) for member in self if not self._left(member)), default=now)

    def _left(self, member: Member) -> bool:
        return member.succeeded or (self.registry_known and not member.registered)

    def odd(self, now: float) -> int:
        """How many ids have answered lately what cannot be understood, or are more than are looked at."""
        return sum(now - at <= max(self._patience, SILENT_AFTER) for at in self._odd.values())

    def forget(self, now: float) -> None:
        """Those of whom nothing has been heard for long, and of whom nobody knows."""
        self._odd = {id_: at for id_, at in self._odd.items() if now - at <= FORGOTTEN_AFTER}
        for member in list(self):
            silent = now - (member.seen_at if member.heard_at is None else member.heard_at)
            limit = FORGOTTEN_AFTER if self.registry_known else FORGOTTEN_UNKNOWN_AFTER
            if self.problem is None and (member.succeeded or not member.registered) and silent > limit:
                del self._members[member.identity]
                self._stopped = None

    def fate(self, line: Line, member: Member, now: float) -> Fate:
        """What has become of a write there."""
        if member.identity in line.evicted:
            return Fate.EVICTED
        if not member.could_tell(line.at):
            return Fate.UNKNOWN
        if self._left(member) and line.at > (member.heard_at or 0.0):
            return Fate.UNKNOWN
        if member.dropped_at >= line.at:
            return Fate.DROPPED
        return Fate.LATE if self.problem is None and now - line.at > LATE_AFTER else Fate.PENDING
