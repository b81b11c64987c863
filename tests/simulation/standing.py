"""What `InProcessCache` does so that a hit costs little: it judges once, and relies on that until something shakes it."""

from typing import Any

from .explore import BrokenError


def rely_on(coherence: Any, entry: Any, now: float) -> None:
    """Judges `entry` as of `now`, and remembers it; in every state, so that each step has a judgement to shake.

    Raises:
        BrokenError: an earlier judgement still stands, and is wrong by now.
    """
    may_serve = coherence.serving.may_serve(entry, now)
    if entry.standing == coherence.standing.number and now < entry.serve_until and not may_serve:
        raise BrokenError(f"at {now} a judgement stands, until {entry.serve_until}, that is wrong by now")
    if may_serve:
        entry.standing, entry.serve_until = coherence.standing.number, coherence.serving.good_until(entry)
