"""Which sequences go through the encoder together: bins of a token budget, sequences of like length side by side.

Nothing is padded, so a full bin is not an end in itself; a bin of like lengths is, because attention over sequences of
one length is one product. Bins therefore are cut from the sequences sorted by length (next fit, decreasing).
"""

from collections.abc import Iterator

import numpy as np

from model.errors import InputError


def plan_bins(lengths_S: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Distribute sequences over bins, the longest first.

    A pure function of the lengths: in whatever order the sequences come, the bins hold the same lengths. Among equals
    the earlier goes first. For lengths [3, 9, 4, 5] and a budget of 10 the bins are [[1], [3, 2], [0]].

    Every bin is at least half full, except the last and those before a sequence that would not have fitted even so:
    two neighbouring bins always hold more than the budget together.

    Args:
        lengths_S: tokens of each sequence, positive.
        tokens_per_batch: most tokens of a bin; a longer sequence gets a bin of its own.

    Returns:
        int64 indices of the sequences of each bin. Every sequence is in exactly one.

    Raises:
        InputError: a budget that is not positive.
    """
    if tokens_per_batch <= 0:
        raise InputError(f"tokens_per_batch is {tokens_per_batch}; it must be positive")
    lengths_S = np.asarray(lengths_S, dtype=np.int64)
    order = np.argsort(-lengths_S, kind="stable")
    ends = np.cumsum(lengths_S[order])
    bins = []
    first = 0
    while first < len(order):
        before = ends[first - 1] if first else 0
        stop = max(int(np.searchsorted(ends, before + tokens_per_batch, side="right")), first + 1)
        bins.append(order[first:stop])
        first = stop
    return bins


def fill(lengths_S: np.ndarray, bins: list[np.ndarray], tokens_per_batch: int) -> float:
    """Share of the bins' budget that is used, 0 to 1; a bin over the budget counts as full."""
    if not bins:
        return 1.0
    used = [min(int(np.asarray(lengths_S)[chosen].sum()), tokens_per_batch) for chosen in bins]
    return sum(used) / (len(bins) * tokens_per_batch)


def look_ahead(lengths_D: np.ndarray, tokens: int) -> Iterator[slice]:
    """Cut consecutive documents into groups of at most `tokens` tokens, at least one document each.

    Bins are planned over one group at a time: far enough ahead to find like lengths, near enough to bound the memory.

    Args:
        lengths_D: tokens of each document, 0 or more.
    """
    if tokens <= 0:
        raise InputError(f"look_ahead_tokens is {tokens}; it must be positive")
    ends = np.cumsum(np.asarray(lengths_D, dtype=np.int64))
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        stop = max(int(np.searchsorted(ends, before + tokens, side="right")), first + 1)
        yield slice(first, stop)
        first = stop


def gather(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The ranges [starts[i], ends[i]) of a flat array, end to end, without a loop over them."""
    lengths = np.asarray(ends, dtype=np.int64) - starts
    total = int(lengths.sum())
    shift = np.repeat(np.asarray(starts, dtype=np.int64) - (np.cumsum(lengths) - lengths), lengths)
    return values[shift + np.arange(total)]
