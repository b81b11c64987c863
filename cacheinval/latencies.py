"""How seconds are counted, for histograms."""

from bisect import bisect_left

__all__ = ["BUCKETS", "Latencies"]

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds, upper bounds; what takes longer is counted behind the last."""


class Latencies:
    """How often something took how long, since the start."""

    __slots__ = ("latencies", "latency_sum")

    def __init__(self) -> None:
        self.latencies = [0] * (len(BUCKETS) + 1)
        self.latency_sum = 0.0

    def observe(self, latency: float) -> None:
        """Counts one that took `latency` seconds."""
        self.latencies[bisect_left(BUCKETS, latency)] += 1
        self.latency_sum += latency
