"""Running checks: each has a deadline, none stops the others, and what takes long is said."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

from cacheinval.doctor.findings import Finding, failed, unchecked

__all__ = ["Checks"]

QUIET = 2.0  # seconds before progress is shown

Findings = Finding | Iterable[Finding]


class Checks:
    """What has been found so far, and what is under way."""

    def __init__(self) -> None:
        self.found: list[Finding] = []
        self._running: list[str] = []

    def add(self, findings: Findings) -> None:
        self.found += [findings] if isinstance(findings, Finding) else findings

    def not_checked(self, names: Iterable[str], after: tuple[str, ...], why: str = "") -> None:
        """Says so of those of `names` of which nothing has been found; `after` are the checks without which they are not run."""
        self.add(unchecked(self.found, names, after, why))

    async def run(self, name: str, deadline: float, check: Callable[[], Awaitable[Findings]]) -> bool:
        """Whether the check came to its end, and found nothing that failed."""
        self._running.append(name)
        before = len(self.found)
        checking = asyncio.ensure_future(check())
        try:
            # Not by `asyncio.timeout`: what waits for room to write to a dead connection does not end when it is cancelled.
            await asyncio.wait({checking}, timeout=deadline)
            if not checking.done():
                raise TimeoutError
            self.add(checking.result())
        except TimeoutError as error:
            text = str(error) or f"no answer within {deadline:g} s"
            self.add(failed(name, text, "try again; the server or the way to it may be overloaded"))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self.add(
                failed(name, " ".join(text.split()), "that was not foreseen; the message says what it was")
            )
        finally:
            checking.cancel()
            checking.add_done_callback(
                lambda task: task.cancelled() or task.exception()
            )  # nobody looks at it any more
            self._running.remove(name)
        return all(finding.level != "failed" for finding in self.found[before:])

    @asynccontextmanager
    async def progress_of(self, *others: "Checks") -> AsyncIterator[None]:
        """Says on stderr what is under way where it takes longer than a moment; on a terminal, again and again."""

        def line() -> str:
            names = [name for checks in (self, *others) for name in checks._running]
            return f"cacheinval: checking {', '.join(names) or 'ticks'} …"

        async def tell() -> None:
            await asyncio.sleep(QUIET)
            if not sys.stderr.isatty():
                print(line(), file=sys.stderr, flush=True)
                return
            while True:
                print(f"\r\033[K{line()}", end="", file=sys.stderr, flush=True)
                await asyncio.sleep(0.5)

        telling = asyncio.create_task(tell())
        try:
            yield
        finally:
            telling.cancel()
            if sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr, flush=True)
