"""python -m benchmarks [NAME…] [--rounds 5] [--json FILE] [--pictures FOLDER]       (from tests/)

Exits with 1, and says which, when a target does not hold.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from .measuring import machine
from .reporting import Report

BENCHMARKS = {
    "hit": "what a read costs that finds its entry, and one that does not",
    "fanout": "keys evicted per second in every instance",
    "latency": "from publish to evicted in every instance, at 200 writes a second",
    "writing": "a write with its invalidation, beside a bare transaction",
    "relay": "what is left in the outbox, and what triggers record",
    "tags": "evicting tags and clearing large caches",
    "stream": "one stream for all instances, beside a queue for each",
    "starting": "imports, the command line, a worker until it is ready",
}


def main(given: Sequence[str] | None = None) -> int:
    """Runs the benchmarks that are named, or all; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--pictures", type=Path, help="the folder where to draw them")
    arguments = parser.parse_args(given)
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"{unknown[0]}: accepted: {', '.join(BENCHMARKS)}")
    report = Report()
    began = time.monotonic()
    print(machine())
    for name in arguments.names or BENCHMARKS:
        module = importlib.import_module(f".{name}", __package__)
        print(f"\n== {name}: {BENCHMARKS[name]}", flush=True)
        with report.part(name):
            uvloop.run(module.run(report, arguments.rounds))
    if arguments.json is not None:
        report.write(arguments.json, machine())
    if arguments.pictures is not None:
        from .pictures import draw  # which imports matplotlib

        draw(report.pictures, arguments.pictures)
    missed = report.missed
    print(
        f"\n{len(report.targets) - len(missed)} of {len(report.targets)} targets hold; {time.monotonic() - began:.0f} s"
    )
    for what in missed:
        print(f"missed: {what}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
