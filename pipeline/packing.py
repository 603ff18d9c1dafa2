"""Which sequences go through the encoder together: bins of a token budget, sequences of like length side by side.

Nothing is padded, so a full bin is not an end in itself; a bin of like lengths is, because attention over sequences of
one length is one product. Bins therefore are cut from the sequences sorted by length (next fit, decreasing).

Training is another matter: steps must be equally large and their company random, so its bins are filled by best fit
(`fill_bins`), and dealt so that all workers have as much to do (`deal_bins`).
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


def fill_bins(lengths_S: np.ndarray, tokens_per_bin: int) -> list[np.ndarray]:
    """Distribute sequences over as few bins as best fit finds: each goes where the least room is left after it.

    Longer ones go first, but only by powers of two; among those of like length the order given decides, so that
    shuffled sequences meet other company in every epoch. For lengths [3, 9, 4, 5, 1] and a budget of 10 the bins are
    [[1], [2, 3, 4], [0]].

    Args:
        lengths_S: tokens of each sequence, from 1 to `tokens_per_bin`.

    Returns:
        int64 indices of the sequences of each bin, ascending. Every sequence is in exactly one.
    """
    lengths_S = np.asarray(lengths_S, dtype=np.int64)
    if not len(lengths_S):
        return []
    assert 0 < lengths_S.min() <= lengths_S.max() <= tokens_per_bin
    order = np.argsort(-np.frexp(lengths_S)[1], kind="stable")
    bin_S = np.empty(len(lengths_S), dtype=np.int64)
    # Bit r of `rooms` says that there is a bin with r tokens of room: the best fit for n is the lowest bit from n on.
    rooms, num_bins = 0, 0
    waiting: list[list[int]] = [[] for _ in range(tokens_per_bin)]
    for index, length in zip(order.tolist(), lengths_S[order].tolist(), strict=True):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = waiting[room].pop()
            if not waiting[room]:
                rooms ^= 1 << room
        else:
            room, chosen = tokens_per_bin, num_bins
            num_bins += 1
        bin_S[index] = chosen
        if room > length:
            waiting[room - length].append(chosen)
            rooms |= 1 << (room - length)
    return np.split(np.argsort(bin_S, kind="stable"), np.cumsum(np.bincount(bin_S, minlength=num_bins))[:-1])


def deal_bins(costs_B: np.ndarray, num_workers: int) -> list[np.ndarray]:
    """Distribute bins over workers: equally many (give or take one) and, as far as that allows, equally costly.

    The costliest goes first, each to the worker that has least so far among those that may still take one.

    Args:
        costs_B: what each bin costs, e.g. the sum of its squared lengths.

    Returns:
        int64 indices of each worker's bins, ascending; none for some where there are fewer bins than workers.
    """
    costs_B = np.asarray(costs_B, dtype=np.float64)
    fewest, extra = divmod(len(costs_B), num_workers)
    costs, counts = np.zeros(num_workers), np.zeros(num_workers, dtype=np.int64)
    dealt: list[list[int]] = [[] for _ in range(num_workers)]
    for index in np.argsort(-costs_B, kind="stable").tolist():
        larger = int((counts > fewest).sum())
        may_take = (counts < fewest) | ((counts == fewest) & (larger < extra))
        worker = int(np.argmin(np.where(may_take, costs, np.inf)))
        dealt[worker].append(index)
        costs[worker] += costs_B[index]
        counts[worker] += 1
    return [np.array(sorted(bins), dtype=np.int64) for bins in dealt]
