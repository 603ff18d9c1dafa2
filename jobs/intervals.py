"""How sure a figure is: percentile intervals by bootstrap, and of the difference of two systems on the same items.

Every resample is a pure function of (seed, number of items). Two statistics of the same items therefore see the same
resamples, and what is common to both, an easy question, an odd document, falls out of their difference.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from model.errors import InputError

log = logging.getLogger(__name__)

SAMPLES = 2_000
LEVEL = 0.95
BLOCK_BYTES = 1 << 24

Statistic = Callable[[np.ndarray], np.ndarray]
"""From indices of items, (B, N) int64, to what they amount to, (B,) float64."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure, and the bounds between which 95 % of its resamples lie."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, slots=True)
class Measured:
    """What one system did on the items of one set, in one respect."""

    set: str
    system: str
    metric: str
    num_items: int
    statistic: Statistic


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of an evaluation."""

    name: str
    """`set/system/metric`, by which gates call it."""
    set: str
    system: str
    metric: str
    num_items: int
    interval: Interval
    against: str | None = None
    """The system that it is compared with, on the same items."""
    difference: Interval | None = None
    """This system's figure less that one's."""


def mean_of(values_N: np.ndarray) -> Statistic:
    """The mean over items."""
    values = np.asarray(values_N, dtype=np.float64)
    return lambda picks: values[picks].mean(axis=1)


def ratio_of(sums_N: np.ndarray, counts_N: np.ndarray) -> Statistic:
    """A mean over parts of items, as over a document's tokens: whole items are resampled, for their parts are alike."""
    sums, counts = np.asarray(sums_N, dtype=np.float64), np.asarray(counts_N, dtype=np.float64)
    return lambda picks: sums[picks].sum(axis=1) / np.maximum(counts[picks].sum(axis=1), 1e-12)


def resamples(num_items: int, *, seed: int, samples: int) -> Iterator[np.ndarray]:
    """The indices of all resamples, (B, N) at a time."""
    draw = np.random.default_rng([seed, num_items])
    rows = max(1, BLOCK_BYTES // (8 * num_items))
    for first in range(0, samples, rows):
        yield draw.integers(0, num_items, (min(rows, samples - first), num_items))


def value_of(statistic: Statistic, num_items: int) -> float:
    """A statistic over all items."""
    return float(statistic(np.arange(num_items)[None, :])[0])


def interval(statistic: Statistic, num_items: int, *, seed: int = 0, samples: int = SAMPLES) -> Interval:
    """A statistic over all items, with the 2.5 and 97.5 percentiles of its resamples.

    Raises:
        InputError: no item, or a statistic that is undefined on all of them, as the correlation of a constant.
    """
    if num_items < 1:
        raise InputError("an empty set has no figures; leave it out")
    value = value_of(statistic, num_items)
    if not np.isfinite(value):
        raise InputError("a figure is undefined: all its values are the same; leave the set out")
    drawn = np.concatenate([statistic(picks) for picks in resamples(num_items, seed=seed, samples=samples)])
    tail = 50 * (1 - LEVEL)
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])  # a tiny set's resample may be undefined
    return Interval(value, float(low), float(high))


def difference(first: Measured, second: Measured, *, seed: int = 0, samples: int = SAMPLES) -> Interval:
    """The first's figure less the second's, paired by item."""
    assert first.num_items == second.num_items
    a, b = first.statistic, second.statistic
    return interval(lambda picks: a(picks) - b(picks), first.num_items, seed=seed, samples=samples)


def make_figures(
    measured: Sequence[Measured],
    *,
    against: Mapping[str, str],
    baselines: Collection[str] = (),
    seed: int = 0,
    samples: int = SAMPLES,
) -> list[Figure]:
    """Figures with their intervals.

    Args:
        measured: in the order in which they are to be shown.
        against: system -> the system it is compared with, where the set has that one.
        baselines: systems whose figures are left out, with a warning, where they are undefined.

    Raises:
        InputError: a figure of another system is undefined, or a set is empty.
    """
    measured = [m for m in measured if is_defined(m, needed=m.system not in baselines)]
    by_name = {(m.set, m.system, m.metric): m for m in measured}
    figures = []
    for m in measured:
        other = by_name.get((m.set, against.get(m.system, ""), m.metric))
        figures.append(
            Figure(
                name=f"{m.set}/{m.system}/{m.metric}",
                set=m.set,
                system=m.system,
                metric=m.metric,
                num_items=m.num_items,
                interval=interval(m.statistic, m.num_items, seed=seed, samples=samples),
                against=other.system if other else None,
                difference=difference(m, other, seed=seed, samples=samples) if other else None,
            )
        )
    return figures


def is_defined(m: Measured, *, needed: bool) -> bool:
    """Whether there is a figure; words that no two texts of a set share, as across languages, have no correlation.

    Raises:
        InputError: there is none, and it is needed.
    """
    if m.num_items < 1 or np.isfinite(value_of(m.statistic, m.num_items)):
        return True
    why = f"{m.set}/{m.system}/{m.metric} is undefined: all its values are the same"
    if needed:
        raise InputError(f"{why}; leave the set {m.set} out")
    log.warning("%s; it is left out", why)
    return False
