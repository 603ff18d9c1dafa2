"""Length histograms and timelines: nothing is lost by counting in buckets, or by thinning."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.measures import (
    MOST_POINTS,
    MOST_TOKENS,
    Silent,
    Timeline,
    add_lengths,
    bucket_edges,
    count_lengths,
    shown_lengths,
)


def test_bucket_edges_are_half_octaves():
    edges = bucket_edges()
    assert edges[:9].tolist() == [1, 2, 3, 4, 6, 8, 12, 16, 23]
    assert edges[-1] == MOST_TOKENS
    assert (np.diff(edges) > 0).all()


@given(st.lists(st.integers(0, 4 * MOST_TOKENS), max_size=50))
def test_every_document_is_in_the_bucket_that_begins_at_or_below_its_length(lengths):
    shown = shown_lengths(count_lengths(np.array(lengths, np.int64)))
    edges = bucket_edges().tolist()
    clipped = [min(max(length, 1), MOST_TOKENS) for length in lengths]
    assert shown == [
        [edge, count]
        for edge, after in zip(edges, [*edges[1:], MOST_TOKENS + 1], strict=True)
        if (count := sum(edge <= length < after for length in clipped))
    ]


def test_histograms_of_parts_add_up():
    lengths = np.arange(1, 2000)
    parts = [count_lengths(part) for part in np.array_split(lengths, 7)]
    assert add_lengths([[], *parts]) == count_lengths(lengths)
    assert shown_lengths(add_lengths([])) == []


@given(st.lists(st.tuples(st.floats(0.01, 500), st.integers(0, 9), st.integers(0, 999)), max_size=900))
def test_a_timeline_stays_small_and_ends_with_all(arrivals):
    line, now = Timeline(begun=0.0), 0.0
    for step, documents, tokens in arrivals:
        now += step
        line.add(documents, tokens, now=now)
        assert len(line.points) <= MOST_POINTS
    rows = np.array(line.shown()["rows"])
    assert rows[0].tolist() == [0, 0, 0]
    assert (np.diff(rows, axis=0) >= 0).all()
    assert rows[-1].tolist() == [round(now, 2), sum(a[1] for a in arrivals), sum(a[2] for a in arrivals)]


def test_a_thinned_timeline_keeps_points_all_over_the_run():
    line = Timeline(begun=0.0)
    for second in range(1, 30_001):
        line.add(1, 10, now=float(second))
    rows = np.array(line.points)
    assert len(rows) > MOST_POINTS / 3
    assert np.diff(rows[:, 0]).max() < 30_000 / MOST_POINTS * 4
    assert (rows[:, 1] == rows[:, 0]).all()


def test_nothing_is_counted_where_nobody_reads():
    meter = Silent("table")
    meter.add(documents=1)
    meter.set(anything=2)
    meter.observe(block_seconds=3)
