"""python -m benchmarks [NAME…] [--rounds 5] [--json FILE]       (from tests/)

Exits with 1, and says which, when a target does not hold.
"""

import argparse
import importlib
import sys
import time
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
    "starting": "imports, the command line, a worker until it is ready",
}


def main() -> int:
    """Runs the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"{unknown[0]}: accepted: {', '.join(BENCHMARKS)}")
    report = Report()
    began = time.monotonic()
    print(machine())
    for name in arguments.names or BENCHMARKS:
        module = importlib.import_module(f".{name}", __package__)
        print(f"\n== {name}: {BENCHMARKS[name]}", flush=True)
        uvloop.run(module.run(report, arguments.rounds))
    if arguments.json is not None:
        report.write(arguments.json, machine())
    missed = report.missed
    print(
        f"\n{len(report.targets) - len(missed)} of {len(report.targets)} targets hold; {time.monotonic() - began:.0f} s"
    )
    for what in missed:
        print(f"missed: {what}")
    return 1 if missed else 0


sys.exit(main())
