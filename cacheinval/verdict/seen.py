"""What is known of the fleet at one moment, in the order in which it is judged."""

from collections.abc import Sequence

from cacheinval.verdict.fleet import Condition, Fleet
from cacheinval.verdict.member import Member
from cacheinval.verdict.reports import Relay, Report
from cacheinval.verdict.words import named

__all__ = ["Seen"]


class Seen:
    """What is to be judged.

    Args:
        here: how the process is that looks.
        now: seconds since 1970.
    """

    def __init__(self, fleet: Fleet, here: Report, now: float) -> None:
        self.fleet, self.here, self.now = fleet, here, now
        self.by_condition: dict[Condition, list[Member]] = {condition: [] for condition in Condition}
        for member in sorted(fleet, key=lambda member: member.identity):
            self.by_condition[fleet.condition(member, now)].append(member)
        self.present = [member for member in fleet if member not in self.by_condition[Condition.GONE]]
        self.reports = [member.report for member in self.present if member.report is not None]

    def those(self, condition: Condition) -> list[Member]:
        """Those that are so, by id."""
        return self.by_condition[condition]

    def named(self, members: Sequence[Member]) -> str:
        """These, as a sentence names them."""
        return named([member.id for member in members], len(self.present))

    @property
    def relays(self) -> list[Relay]:
        """How each relay is of which something is known: also that of the process that looks."""
        reports = self.reports if self.fleet.own is not None else [*self.reports, self.here]
        return [report.relay for report in reports if report.relay is not None]

    @property
    def led(self) -> bool:
        """Whether a relay leads, as far as is known."""
        return self.fleet.overview is None or self.fleet.overview.led

    @property
    def oldest_row(self) -> float:
        """For how many seconds a change waits to be published, as far as is known."""
        overview = self.fleet.overview
        known = [relay.oldest_row_age for relay in self.relays]
        known.append(None if overview is None else overview.oldest_row_age)
        return max((age for age in known if age is not None), default=0.0)
