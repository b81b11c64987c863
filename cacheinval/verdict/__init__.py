"""Whether any cache may be stale, by what is known of the fleet: for `cacheinval status` and the page. Pure."""

from cacheinval.verdict.fleet import Fleet
from cacheinval.verdict.judging import Level, Verdict, judge

__all__ = ["Fleet", "Level", "Verdict", "judge"]
