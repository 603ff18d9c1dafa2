"""Bins: every sequence once, budget kept, like lengths together, the same whatever the order."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from pipeline.packing import deal_bins, fill, fill_bins, gather, look_ahead, plan_bins

lengths = st.lists(st.integers(1, 120), max_size=60).map(np.array)


@given(lengths, st.integers(1, 200))
def test_bins_hold_every_sequence_once_within_the_budget(lengths_S: np.ndarray, budget: int) -> None:
    bins = plan_bins(lengths_S, budget)
    assert sorted(np.concatenate([[], *bins]).astype(int).tolist()) == list(range(len(lengths_S)))
    for chosen in bins:
        assert len(chosen) >= 1
        assert lengths_S[chosen].sum() <= budget or len(chosen) == 1


@given(lengths, st.integers(1, 200))
def test_bins_are_sorted_and_neighbours_exceed_the_budget(lengths_S: np.ndarray, budget: int) -> None:
    bins = plan_bins(lengths_S, budget)
    flat = lengths_S[np.concatenate([[], *bins]).astype(int)]
    assert (np.diff(flat) <= 0).all()  # each bin holds a run of the sorted lengths: nothing is more alike
    for one, next_one in itertools.pairwise(bins):
        assert lengths_S[one].sum() + lengths_S[next_one[0]] > budget


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


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 100))
def test_look_ahead_tiles(sizes: list[int], tokens: int) -> None:
    parts = list(look_ahead(np.array(sizes, dtype=int), tokens))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(sizes)))
    for part in parts:
        assert sum(sizes[part]) <= tokens or part.stop - part.start == 1


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)), max_size=12))
def test_gather_is_the_concatenation_of_the_ranges(ranges: list[tuple[int, int]]) -> None:
    values = np.arange(100, 130)
    starts, ends = np.array([a for a, _ in ranges], int), np.array([a + n for a, n in ranges], int)
    expected = [v for a, n in ranges for v in values[a : a + n]]
    assert gather(values, starts, ends).tolist() == expected


@given(lengths, st.integers(120, 300))
def test_filled_bins_hold_every_sequence_once_and_no_two_would_go_together(lengths_S: np.ndarray, budget: int) -> None:
    bins = fill_bins(lengths_S, budget)
    assert sorted(np.concatenate([[], *bins]).astype(int).tolist()) == list(range(len(lengths_S)))
    used = [int(lengths_S[chosen].sum()) for chosen in bins]
    assert all(0 < tokens <= budget for tokens in used)
    assert all(a + b > budget for a, b in itertools.combinations(used, 2))


def test_filled_bins_are_almost_as_few_as_there_can_be_and_meet_other_company_in_another_order() -> None:
    rng = np.random.default_rng(0)
    lengths_S = np.clip(rng.lognormal(5.5, 1.2, 4000).astype(np.int64), 3, 1024)
    bins = fill_bins(lengths_S, 1024)
    assert len(bins) <= 1 + -(-lengths_S.sum() // 1024)
    assert fill(lengths_S, bins, 1024) > 0.998

    def pairs(bins: list[np.ndarray]) -> set[tuple[int, int]]:
        return {pair for chosen in bins for pair in itertools.combinations(sorted(chosen.tolist()), 2)}

    order = rng.permutation(len(lengths_S))
    again = [order[chosen] for chosen in fill_bins(lengths_S[order], 1024)]
    assert len(pairs(bins) & pairs(again)) < 0.1 * len(pairs(bins))
    assert [b.tolist() for b in fill_bins(np.array([3, 9, 4, 5, 1]), 10)] == [[1], [2, 3, 4], [0]]


@given(st.lists(st.floats(0, 1e9), max_size=40), st.integers(1, 9))
def test_bins_are_dealt_once_and_evenly(costs: list[float], num_workers: int) -> None:
    dealt = deal_bins(np.array(costs), num_workers)
    assert len(dealt) == num_workers
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(costs)))
    counts = [len(bins) for bins in dealt]
    assert max(counts) - min(counts) <= 1


def test_dealt_bins_cost_about_the_same() -> None:
    """Bins of 8,192 tokens: some hold one long sequence, most hold many short ones."""
    rng = np.random.default_rng(0)
    costs = np.where(rng.random(64) < 0.3, 8192.0**2, 8192.0 * rng.integers(100, 1500, 64))
    totals = [costs[bins].sum() for bins in deal_bins(costs, 8)]
    assert max(totals) < 1.1 * np.mean(totals), "19 long ones over 8 workers: some have three of them"
    in_order = [costs[worker::8].sum() for worker in range(8)]
    assert max(in_order) > 1.2 * np.mean(in_order), "which taking turns does not reach"
