"""Bins: every sequence once, budget kept, like lengths together, the same whatever the order."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from pipeline.packing import fill, gather, look_ahead, plan_bins

CALM = settings(deadline=None)
"""A busy machine is slow now and then: no test fails for that."""

lengths = st.lists(st.integers(1, 120), max_size=60).map(np.array)


@CALM
@given(lengths, st.integers(1, 200))
def test_bins_hold_every_sequence_once_within_the_budget(lengths_S: np.ndarray, budget: int) -> None:
    bins = plan_bins(lengths_S, budget)
    assert sorted(np.concatenate([[], *bins]).astype(int).tolist()) == list(range(len(lengths_S)))
    for chosen in bins:
        assert len(chosen) >= 1
        assert lengths_S[chosen].sum() <= budget or len(chosen) == 1


@CALM
@given(lengths, st.integers(1, 200))
def test_bins_are_sorted_and_neighbours_exceed_the_budget(lengths_S: np.ndarray, budget: int) -> None:
    bins = plan_bins(lengths_S, budget)
    flat = lengths_S[np.concatenate([[], *bins]).astype(int)]
    assert (np.diff(flat) <= 0).all()  # each bin holds a run of the sorted lengths: nothing is more alike
    for one, next_one in itertools.pairwise(bins):
        assert lengths_S[one].sum() + lengths_S[next_one[0]] > budget


@CALM
@given(lengths, st.integers(1, 200), st.randoms(use_true_random=False))
def test_order_does_not_matter(lengths_S: np.ndarray, budget: int, random: object) -> None:
    shuffled = lengths_S.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert [lengths_S[b].tolist() for b in plan_bins(lengths_S, budget)] == [
        shuffled[b].tolist() for b in plan_bins(shuffled, budget)
    ]


def test_worked_example_and_ties() -> None:
    assert [b.tolist() for b in plan_bins(np.array([3, 9, 4, 5]), 10)] == [[1], [3, 2], [0]]
    assert [b.tolist() for b in plan_bins(np.array([2, 2, 2, 2]), 4)] == [[0, 1], [2, 3]]
    assert plan_bins(np.array([], dtype=int), 4) == []
    with pytest.raises(InputError, match="tokens_per_batch"):
        plan_bins(np.array([1]), 0)


def test_real_lengths_fill_their_bins() -> None:
    lengths_S = np.clip(np.random.default_rng(0).lognormal(np.log(120), 0.8, 5000).astype(int), 1, 512)
    assert fill(lengths_S, plan_bins(lengths_S, 8192), 8192) > 0.97
    assert fill(lengths_S, [], 8192) == 1.0


@CALM
@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 100))
def test_look_ahead_tiles(sizes: list[int], tokens: int) -> None:
    parts = list(look_ahead(np.array(sizes, dtype=int), tokens))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(sizes)))
    for part in parts:
        assert sum(sizes[part]) <= tokens or part.stop - part.start == 1


@CALM
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)), max_size=12))
def test_gather_is_the_concatenation_of_the_ranges(ranges: list[tuple[int, int]]) -> None:
    values = np.arange(100, 130)
    starts, ends = np.array([a for a, _ in ranges], int), np.array([a + n for a, n in ranges], int)
    expected = [v for a, n in ranges for v in values[a : a + n]]
    assert gather(values, starts, ends).tolist() == expected
