"""What a run measures of itself while it goes: how long documents are, how much was done when, and what is counted for
a metrics system.

Where nobody collects metrics a `Meter` is `Silent`, which costs a call. The metrics themselves, their units and how
they are exported are the cluster's business: `Job.meter` makes a meter for a table in every process that counts.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

MOST_TOKENS = 1 << 20
"""Longer documents are counted with those of this length."""
MOST_POINTS = 240
"""Points of a `Timeline`; with more, every other one goes."""


class Meter(Protocol):
    """Counts for a metrics system. Names are those of `cluster.metrics`, without the prefix."""

    def add(self, **counts: float) -> None:
        """Count further by so much."""

    def set(self, **gauges: float) -> None:
        """What is the case now."""

    def observe(self, **values: float) -> None:
        """One more value of a distribution."""


class Silent:
    """A meter that nobody reads."""

    def __init__(self, table: str = "") -> None:
        pass

    def add(self, **counts: float) -> None:
        pass

    set = observe = add


def bucket_edges() -> np.ndarray:
    """Lower ends of the buckets of a length histogram: half octaves, rounded up: 1, 2, 3, 4, 6, 8, 12, 16, 23, ..."""
    octaves = 2 * (MOST_TOKENS.bit_length() - 1)
    return np.unique(np.ceil(2 ** (np.arange(octaves + 1) / 2)).astype(np.int64))


def count_lengths(lengths: np.ndarray) -> list[int]:
    """How many of these lengths fall into each bucket; an empty document counts with those of one token."""
    edges = bucket_edges()
    at = np.searchsorted(edges, np.clip(lengths, 1, MOST_TOKENS), side="right") - 1
    return np.bincount(at, minlength=len(edges)).tolist()


def add_lengths(parts: Iterable[Sequence[int]]) -> list[int]:
    """The sum of some histograms; one that is empty counted nothing."""
    return [sum(bucket) for bucket in zip(*(part for part in parts if len(part)), strict=True)]


def shown_lengths(counts: Sequence[int]) -> list[list[int]]:
    """[[shortest length, documents], ...] of the buckets that hold any, for the record of a run."""
    if not len(counts):
        return []
    return [[int(edge), int(count)] for edge, count in zip(bucket_edges(), counts, strict=True) if count]


@dataclass(slots=True)
class Timeline:
    """How many documents and tokens had arrived at which second of a run.

    Counts are sums from the start, so that thinning loses resolution and nothing else: a run of seconds and one of
    hours both fill at most MOST_POINTS points.
    """

    begun: float = field(default_factory=time.monotonic)
    points: list[list[float]] = field(default_factory=lambda: [[0.0, 0, 0]])
    step_s: float = 0.0
    """Points are at least so far apart, but for the newest."""

    def add(self, documents: int, tokens: int, *, now: float | None = None) -> None:
        seconds = round((time.monotonic() if now is None else now) - self.begun, 2)
        _, *done = self.points[-1]
        point = [seconds, done[0] + documents, done[1] + tokens]
        if len(self.points) > 2 and seconds - self.points[-2][0] < self.step_s:
            self.points[-1] = point
            return
        self.points.append(point)
        if len(self.points) > MOST_POINTS:
            newest = self.points[-1]
            self.points = self.points[:-1:2]
            self.points.append(newest)
            self.step_s = 2 * seconds / MOST_POINTS

    def shown(self) -> dict[str, Any]:
        """For the record of a run."""
        return {"columns": ["seconds", "documents", "tokens"], "rows": self.points}
